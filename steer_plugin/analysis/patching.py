"""Activation patching: put the stream of one run into another, and see how far a metric moves.

    effect(site, part) = mean(m[base with source's stream at site, part] - m[base]) / mean(m[source] - m[base])

0 leaves the base run as it was, 1 makes it the source. "denoise" puts clean streams into the corrupt run, "noise"
corrupt ones into the clean run; the two need not agree where several places carry the same thing. Source of the method:
Meng et al. 2022 (arXiv 2202.05262); both directions: Heimersheim and Nanda 2024 (arXiv 2404.15255).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from steer_plugin.adapters import AttachedModel
from steer_plugin.adapters._observe import Observed
from steer_plugin.analysis._sweeps import Patching
from steer_plugin.analysis.metrics import Metric, measured, name_of
from steer_plugin.analysis.tokens import PARTS, Parts, masks_of
from steer_plugin.context import Context
from steer_plugin.errors import InputError
from steer_plugin.intervention import Intervention, Steerable, Write, expand_rows
from steer_plugin.positions import Positions
from steer_plugin.sites import Site

Inputs: TypeAlias = Mapping[str, Tensor]
_EVERYWHERE = Positions.parse("everywhere")


@dataclass(frozen=True)
class StreamOf:
    """delta = the stream of another run on a mask, the run's own elsewhere; for a write of kind "replace".

    Of a forward that runs fewer columns (a replayed last token) the last ones are meant.
    """

    mask: Bool[Tensor, "row pos"]
    source: Float[Tensor, "row pos d_model"]

    def __call__(self, hidden: Float[Tensor, "row pos d_model"], context: Context) -> Tensor:
        """Return the stream to go on with; tokens that are fed back while decoding are nobody's.

        Raises:
            InputError: prompts of other sizes than those that the streams were taken from.
        """
        if context.step > 0:
            return hidden
        rows, width = hidden.shape[:2]
        if width > self.mask.shape[1]:
            raise InputError(f"streams of {self.mask.shape[1]} tokens cannot be put into prompts of {width}.")
        mask = expand_rows(self.mask, rows, "patched prompts")[:, -width:].to(hidden.device)
        source = expand_rows(self.source, rows, "patched prompts")[:, -width:].to(hidden)
        return torch.where(mask[..., None], source, hidden)


def patch_streams(
    site: Site | str, source: Float[Tensor, "row pos d_model"], mask: Bool[Tensor, "row pos"]
) -> Intervention:
    """Put whole streams of another run of the same prompts in place, on the tokens of a mask.

    Raises:
        InputError: a mask that does not fit the streams.
    """
    if tuple(mask.shape) != tuple(source.shape[:2]):
        raise InputError(f"the mask has shape {tuple(mask.shape)}, the streams have {tuple(source.shape[:2])} tokens.")
    delta = StreamOf(mask, source.detach())
    return Intervention((Write(Site.parse(site), _EVERYWHERE, delta, kind="replace", width=source.shape[-1]),))


@dataclass(frozen=True)
class Side:
    """One of the two runs: its inputs and what steers it."""

    inputs: Inputs
    steering: Steerable | None = None

    def with_(self, patch: Intervention) -> list[Steerable]:
        """Its steering and a patch."""
        return [patch] if self.steering is None else [self.steering, patch]


@dataclass
class Arriving:
    """What arrives at a site, before anything is added there; puts the same in place, for a write of kind "replace"."""

    stream: Tensor | None = None

    def __call__(self, hidden: Float[Tensor, "row pos d_model"], context: Context) -> Tensor:
        """Keep the stream and hand it on; of a token that runs again, only its own column."""
        seen, width = self.stream, hidden.shape[1]
        if seen is not None and seen.shape[1] > width:
            self.stream = torch.cat([seen[:, :-width], hidden], 1)
        else:
            self.stream = hidden.clone()
        return hidden


def between(
    vlm: AttachedModel, clean: Inputs, corrupt: Inputs, steering: Steerable | None, direction: str
) -> tuple[Side, Side]:
    """Base and source of a patch between two batches.

    Raises:
        InputError: an unknown direction, batches that do not align.
    """
    if direction not in ("denoise", "noise"):
        raise InputError(
            f"direction must be 'denoise' (clean into corrupt) or 'noise' (corrupt into clean), got {direction!r}."
        )
    check_aligned(vlm, clean, corrupt)
    runs = Side(corrupt, steering), Side(clean, steering)
    return runs if direction == "denoise" else (runs[1], runs[0])


def with_and_without(inputs: Inputs, steering: Steerable, way: str) -> tuple[Side, Side]:
    """Base and source of a patch between the steered and the unsteered run.

    Raises:
        InputError: an unknown way.
    """
    if way not in ("insert", "remove"):
        raise InputError(
            f"way must be 'insert' (steered into unsteered) or 'remove' (unsteered into steered), got {way!r}."
        )
    runs = Side(inputs), Side(inputs, steering)
    return runs if way == "insert" else (runs[1], runs[0])


def activation_patching(
    vlm: AttachedModel,
    clean: Inputs,
    corrupt: Inputs,
    metric: Metric,
    sites: Sequence[Site | str] | None = None,
    parts: Parts = PARTS,
    *,
    direction: str = "denoise",
    steering: Steerable | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Patching:
    """Patch between two batches of prompts whose tokens stand in the same columns (pictures swapped, a word changed).

    `sites`: resid_post of every layer by default. `parts`: position expressions, or masks of your own by name.
    `steering` is in force in both runs. One forward for each site and part; `seed` is that of the intervals.

    Raises:
        InputError: batches that do not align, a metric that is the same on both, an unknown direction.
        SiteError, PositionError: unknown places.
    """
    base, source = between(vlm, clean, corrupt, steering, direction)
    places = resolved(vlm, sites)
    return _sweep(vlm, base, source, metric, places, parts, direction, seed=seed, progress=progress)


def steering_patching(
    vlm: AttachedModel,
    inputs: Inputs,
    steering: Steerable,
    metric: Metric,
    sites: Sequence[Site | str] | None = None,
    parts: Parts = PARTS,
    *,
    way: str = "insert",
    seed: int = 0,
    progress: bool = True,
) -> Patching:
    """Patch between the steered and the unsteered run of the same prompts.

    "insert" puts steered streams into the unsteered run: what is enough for the steering's effect. "remove" puts
    unsteered ones into the steered run: what it cannot do without. `sites`: resid_post of every layer by default. A
    patch at a site comes before what the steering adds there.

    Raises:
        InputError: a steering that does not move the metric, an unknown way.
    """
    base, source = with_and_without(inputs, steering, way)
    return _sweep(vlm, base, source, metric, resolved(vlm, sites), parts, way, seed=seed, progress=progress)


def localise(
    vlm: AttachedModel,
    inputs: Inputs,
    steering: Steerable,
    metric: Metric,
    *,
    way: str = "remove",
    parts: Parts = ("everywhere",),
    seed: int = 0,
    progress: bool = True,
) -> Patching:
    """Find which layers' attn_out and mlp_out carry a steering's effect after its first write.

    "remove" gives each of them, one at a time, what it would be without steering: the share of the effect that is lost
    goes through it. The rest goes past it in the residual stream or through other layers; shares need not add up to 1.

    Raises:
        InputError: nothing behind the write, or as for `steering_patching`.
    """
    first = min(
        write.site.resolve(vlm.n_layers, vlm.parts.n_vision_layers).order for write in steering.intervention.writes
    )
    kinds = ("attn_out", "mlp_out")
    places = [Site(kind, layer) for layer in range(vlm.n_layers) for kind in kinds if Site(kind, layer).order > first]
    if not places:
        raise InputError("no attention or MLP lies behind the steering's first write, so nothing can carry it.")
    return steering_patching(vlm, inputs, steering, metric, places, parts, way=way, seed=seed, progress=progress)


def check_aligned(vlm: AttachedModel, clean: Inputs, corrupt: Inputs) -> None:
    """Refuse batches whose tokens do not stand in the same columns.

    Raises:
        InputError: other numbers of rows or tokens, other padding, image tokens elsewhere.
    """
    one, two = vlm.layout(clean), vlm.layout(corrupt)
    mend = "Patch between prompts of the same length: swap pictures of one size, or words of as many tokens."
    if one.shape != two.shape:
        raise InputError(f"clean inputs have {one.shape} (row, pos) tokens, corrupt ones {two.shape}. {mend}")
    for what, left, right in (("padding", one.real, two.real), ("image tokens", one.image, two.image)):
        if left is not None and right is not None and not torch.equal(left, right):
            row = int((left != right).any(1).nonzero()[0])
            raise InputError(f"clean and corrupt inputs have other {what} in row {row}. {mend}")


def resolved(vlm: AttachedModel, sites: Sequence[Site | str] | None) -> list[Site]:
    """Resolve the sites to patch, in order of execution; all layers' outputs by default."""
    asked = [Site("resid_post", layer) for layer in range(vlm.n_layers)] if sites is None else sites
    found = [vlm.parts.resolve(Site.parse(site)) for site in asked]
    if not found:
        raise InputError("name at least one site, as in [sp.resid_post(14)].")
    for site in found:
        if site.in_vision:
            raise InputError(
                f"{site} lies in the vision tower, whose tokens are patches; patch the decoder, or its image tokens."
            )
    return sorted(dict.fromkeys(found), key=lambda site: site.order)


def ends(
    vlm: AttachedModel, base: Side, source: Side, metric: Metric, sites: Sequence[Site]
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"], dict[Site, Float[Tensor, "row pos d_model"]]]:
    """Metric of both runs, and the streams of the source.

    What the base run adds at a site is added behind a patch. So the source's stream is taken before what is added
    there, unless its steering is one that the base run lacks.

    Raises:
        InputError: the metric is the same in both, so that there is nothing to localise.
    """
    if vlm.root.training:
        raise InputError("the model is in training mode, where two runs differ by chance; call model.eval() first.")
    giving, streams = _arriving(vlm, source, sites)
    taking, own = _arriving(vlm, base, sites)
    if source.steering is not None and base.steering is None:
        # What both runs add (a steering in force) is added behind the patch again.
        streams = {site: giving.at[site] - (taking.at[site] - own[site]) for site in sites}
    low, high = measured(metric, taking), measured(metric, giving)
    apart = (high - low).mean().abs()
    if float(apart) <= 1e-6 * float(torch.cat([low, high]).abs().max().clamp(min=1e-6)):
        raise InputError(
            f"the two runs have the same mean {name_of(metric)!r} ({float(low.mean()):.4g}); there is no effect to "
            "localise. Take other prompts, another metric or a stronger steering."
        )
    return low, high, streams


def _arriving(
    vlm: AttachedModel, side: Side, sites: Sequence[Site]
) -> tuple[Observed, dict[Site, Float[Tensor, "row pos d_model"]]]:
    """A run's logits and streams, and what arrives at the sites before anything is added there."""
    seen = {site: Arriving() for site in sites}
    looks = Intervention(tuple(Write(site, _EVERYWHERE, look, kind="replace") for site, look in seen.items()))
    run = vlm.observe(side.inputs, sites, side.with_(looks))
    return run, {site: look.stream for site, look in seen.items() if look.stream is not None}


def _sweep(
    vlm: AttachedModel, base: Side, source: Side, metric: Metric, sites: Sequence[Site], parts: Parts, way: str, *,
    seed: int, progress: bool,
) -> Patching:  # fmt: skip
    """Patch one site and part after the other."""
    masks = masks_of(vlm.layout(base.inputs), parts)
    low, high, streams = ends(vlm, base, source, metric, sites)
    found: list[Tensor] = []
    jobs = [(site, mask) for site in sites for mask in masks.values()]
    for site, mask in tqdm(jobs, desc="patching", disable=not progress, leave=False):
        steering = base.with_(patch_streams(site, streams[site], mask))
        found.append(measured(metric, vlm.observe(base.inputs, (), steering)).cpu())
    patched = torch.stack(found).reshape(len(sites), len(masks), -1)
    return Patching(tuple(sites), tuple(masks), low.cpu(), high.cpu(), patched, name_of(metric), way, seed)
