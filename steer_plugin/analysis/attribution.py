"""Attribution patching: all patches estimated at once, by the gradient of the metric in the base run.

    m[base with source's stream at (site, part)] - m[base] ~ sum_{tokens of part} (h_source - h_base) . dm/dh_base

Three forwards and one backward for any number of sites and parts. First order only: where the metric is curved (a
saturated softmax, a norm under a large change) it is off; check a few places with `activation_patching`. Source of the
method: Nanda 2023, "Attribution patching"; Syed et al. 2023 (arXiv 2310.10348).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from steer_plugin.adapters import AttachedModel
from steer_plugin.analysis._sweeps import Patching
from steer_plugin.analysis.metrics import Metric, measured, name_of
from steer_plugin.analysis.patching import Inputs, Side, between, ends, resolved, with_and_without
from steer_plugin.analysis.tokens import PARTS, Parts, masks_of
from steer_plugin.context import Context
from steer_plugin.intervention import Intervention, Steerable, Write
from steer_plugin.positions import Positions
from steer_plugin.sites import Site


@dataclass
class Probe:
    """delta = 0 that remembers itself: the gradient by it is the gradient by the stream, frozen weights or not.

    Attributes:
        stream: what arrived at the site, before anything is written there.
    """

    zeros: list[Tensor] = field(default_factory=list)
    stream: Tensor | None = field(default=None)

    def __call__(self, hidden: Float[Tensor, "row pos d_model"], context: Context) -> Tensor:
        """Return a zero of the stream's shape that takes a gradient."""
        self.stream = hidden.detach()
        self.zeros.append(torch.zeros_like(hidden, requires_grad=True))
        return self.zeros[-1]


def gradients(
    vlm: AttachedModel, side: Side, metric: Metric, sites: Sequence[Site]
) -> tuple[Float[Tensor, " row"], dict[Site, Tensor], dict[Site, Tensor]]:
    """Metric of a run, what arrives at the sites, and the gradient of each row's metric by its own stream there."""
    probes = {site: Probe() for site in sites}
    everywhere = Positions.parse("everywhere")
    writes = tuple(Write(site, everywhere, probe) for site, probe in probes.items())
    steering = side.with_(Intervention(writes))
    value = measured(metric, vlm.observe(side.inputs, (), steering, grad=True))
    streams = {site: probe.stream for site, probe in probes.items() if probe.stream is not None}
    # A late read runs the prompt twice; the metric depends on the stream of both passes.
    zeros = [zero for probe in probes.values() for zero in probe.zeros]
    # Rows do not look at each other, so the gradient of the sum holds each row's own.
    found = iter(torch.autograd.grad(value.sum(), zeros, allow_unused=True, materialize_grads=True))
    slopes = {site: torch.stack([next(found) for _ in probe.zeros]).sum(0) for site, probe in probes.items()}
    return value.detach(), streams, slopes


def attribution_patching(
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
) -> Patching:
    """Estimate what `activation_patching` would find, for all sites and parts by one backward pass.

    Raises:
        InputError, SiteError, PositionError: as `activation_patching`.
    """
    base, source = between(vlm, clean, corrupt, steering, direction)
    return _estimated(vlm, base, source, metric, resolved(vlm, sites), parts, direction, seed)


def attributed_steering(
    vlm: AttachedModel,
    inputs: Inputs,
    steering: Steerable,
    metric: Metric,
    sites: Sequence[Site | str] | None = None,
    parts: Parts = PARTS,
    *,
    way: str = "insert",
    seed: int = 0,
) -> Patching:
    """Estimate what `steering_patching` would find, for all sites and parts by one backward pass.

    Raises:
        InputError, SiteError, PositionError: as `steering_patching`.
    """
    base, source = with_and_without(inputs, steering, way)
    return _estimated(vlm, base, source, metric, resolved(vlm, sites), parts, way, seed)


def _estimated(
    vlm: AttachedModel,
    base: Side,
    source: Side,
    metric: Metric,
    sites: Sequence[Site],
    parts: Parts,
    way: str,
    seed: int,
) -> Patching:
    masks = masks_of(vlm.layout(base.inputs), parts)
    low, high, streams = ends(vlm, base, source, metric, sites)
    _, own, slopes = gradients(vlm, base, metric, sites)
    by_token = torch.stack(
        [((streams[site] - own[site]).float() * slopes[site].float()).sum(-1).cpu() for site in sites]
    )
    chosen = torch.stack([mask.cpu() for mask in masks.values()])
    moved = torch.where(chosen[None], by_token[:, None], 0.0).sum(-1)
    low = low.cpu()
    return Patching(
        tuple(sites), tuple(masks), low, high.cpu(), low + moved, name_of(metric), way, seed, estimated=True
    )
