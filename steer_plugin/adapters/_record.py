"""Listens to what the deltas of a run note, (row, pos, dim) per name and site, and labels what `_kept` keeps of it.

Only tokens that the write selects count, and none from the end of an answer on: what `generate` feeds a finished row
while others still talk is padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from steer_plugin.adapters._call import Call, Forward
from steer_plugin.adapters._kept import Kept, labelled
from steer_plugin.adapters._parts import ModelParts
from steer_plugin.adapters._run import Run
from steer_plugin.errors import FrameworkError, InputError, PositionError, nearest
from steer_plugin.layout import TokenLayout
from steer_plugin.record import CLASSES, MOMENTS, PADDING, SUFFIXES, Record, Variable, analysis_module
from steer_plugin.sites import Site

KEEP = ("gate", "s", "change")
REDUCE = tuple(SUFFIXES)
GENERATED = CLASSES.index("generated")
NOTHING = (
    "nothing was noted: no write of this steering notes what it computes. SteerVLM does; a delta of your own does with "
    "context.note(name, tensor). A write of strength 0 is not run at all."
)


class Recorder:
    """Told by a run what its deltas note; `record` labels what was kept.

    Raises:
        InputError: unknown or no reductions, no names.
        FrameworkError: xarray is missing.
    """

    def __init__(
        self, parts: ModelParts, keep: Sequence[str] | str, reduce: Sequence[str] | str, options: Mapping[str, object]
    ) -> None:
        self.keep = (keep,) if isinstance(keep, str) else tuple(dict.fromkeys(keep))
        self.reduce = (reduce,) if isinstance(reduce, str) else tuple(dict.fromkeys(reduce))
        for name in self.reduce:
            if name not in REDUCE:
                raise InputError(f"unknown reduction {name!r}.{nearest(name, REDUCE)} Known: {', '.join(REDUCE)}.")
        if not self.keep or not self.reduce:
            raise InputError(f"record needs names to keep, such as {KEEP}, and a reduction out of {REDUCE}.")
        analysis_module("xarray")  # before any work
        self.parts = parts
        self.ends, self.pad = _endings(parts, options)
        self.noticed: dict[str, None] = {}
        self.call: Call | None = None
        self.held: dict[tuple[int, str], Kept] = {}
        self._classes = torch.zeros(0, 0, dtype=torch.long)
        self._forwards = 0
        self._over: Bool[Tensor, " row"] | None = None
        self._alive: Bool[Tensor, " row"] | None = None

    def install(self, run: Run) -> None:
        """Listen to a run; the hook goes with it."""
        run.noted = self.note
        run.attend(self, self.parts.root, Recorder._before)

    def _before(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Follow which rows have ended; a finished row is fed padding."""
        ids = self.parts.bind(args, kwargs).get("input_ids")
        self._forwards += 1
        if self._forwards == 1 or not isinstance(ids, Tensor):
            return
        fed = ids[:, -1].cpu()
        ended = torch.isin(fed, torch.tensor(self.ends, dtype=fed.dtype))
        self._over = ended if self._over is None else self._over | ended
        self._alive = ~self._over if self.pad is None else ~self._over & (fed != self.pad)

    def note(
        self, site: Site, forward: Forward, mask: Bool[Tensor, "row pos"] | bool, name: str, tensor: Tensor
    ) -> None:
        """Keep (row, pos, dim) values of the columns of a forward.

        Raises:
            InputError: another shape, or a name that two writes note at one layer.
        """
        self.noticed[name] = None
        if name not in self.keep or mask is False:
            return
        call, span = forward.call, forward.stop - forward.start
        rows = call.layout.shape[0]
        if tensor.ndim != 3 or tuple(tensor.shape[:2]) != (rows, span):
            raise InputError(
                f"the delta at {site} noted {name!r} as {tuple(tensor.shape)}; expected ({rows}, {span}, dim)."
            )
        kept = self._kept(site, name, call, tensor.shape[2])
        # Without a cache the whole text runs again with each token; what was seen stays as it was.
        start = max(forward.start, kept.stop)
        if start >= forward.stop or kept.site != site:
            raise InputError(
                f"two writes note {name!r} at layer {site.layer} ({kept.site}, {site}); record them one at a time."
            )
        kept.stop = forward.stop
        chosen = torch.ones(rows, forward.stop - start, dtype=torch.bool)
        if isinstance(mask, Tensor):
            chosen &= mask[:, start - forward.start :].cpu()
        if forward.step > 0 and self._alive is not None:
            chosen[:, -1] &= self._alive
        columns = chosen.any(0).nonzero()[:, 0]
        if len(columns):
            values = tensor.detach()[:, start - forward.start :]
            if len(columns) < values.shape[1]:
                values = values[:, columns.to(values.device)]
            classes = self._classes_of(start, forward.stop)[:, columns]
            kept.add(values.float(), chosen[:, columns], classes, (columns + start).tolist())

    def _kept(self, site: Site, name: str, call: Call, width: int) -> Kept:
        if self.call is None:
            self.call, self._classes = call, prompt_classes(call.layout)
        if call is not self.call:
            raise FrameworkError("a second prompt began while one was recorded; record one call at a time.")
        rows, layer = call.layout.shape[0], site.layer or 0
        if (layer, name) not in self.held:
            self.held[layer, name] = Kept(site, rows, width, self.reduce)
        if any(other.width != width for (_, one), other in self.held.items() if one == name):
            raise InputError(f"{name!r} has {width} dimensions at {site} and others elsewhere; note it by other names.")
        return self.held[layer, name]

    def _classes_of(self, start: int, stop: int) -> Int[Tensor, "row pos"]:
        prompt = self._classes[:, start:stop]
        fed = torch.full((len(self._classes), stop - start - prompt.shape[1]), GENERATED)
        return torch.cat([prompt, fed], 1)

    # -- what came of it -----------------------------------------------------------------------------------------

    def record(self, ids: Tensor | None) -> Record:
        """Label what was kept; `ids` (row, column) are the whole text.

        Raises:
            InputError: nothing was noted, unknown names, or names noted on different tokens.
            PositionError: no token was steered.
        """
        if not self.noticed:
            raise InputError(NOTHING)
        for name in self.keep:
            if name not in self.noticed:
                known = ", ".join(self.noticed)
                raise InputError(f"nothing notes {name!r}.{nearest(name, self.noticed)} This steering notes: {known}.")
        if self.call is None:
            raise FrameworkError("names were noted outside any forward; please report this.")
        if not any(bool(kept.tokens.any()) for kept in self.held.values()):
            raise PositionError("no token was steered, so nothing was recorded; 'generated' needs max_new_tokens.")
        layers = sorted({layer for layer, _ in self.held})
        first = [self._alike(layer) for layer in layers]
        rows, width = self.call.layout.shape
        if ids is None or ids.shape[1] < width:  # embeddings were given: `generate` returns the new tokens alone
            unknown = torch.full((rows, width), -1)
            ids = unknown if ids is None else torch.cat([unknown, ids.cpu()], 1)
        coords: dict[str, Variable] = {
            "layer": (("layer",), np.array(layers)),
            "site": (("layer",), np.array([str(kept.site) for kept in first])),
            "class": (("class",), np.array(CLASSES)),
            "moment": (("moment",), np.array(MOMENTS)),
        }
        variables: dict[str, Variable] = {
            "ids": (("row", "column"), ids.cpu().numpy()),
            "tokens": (("layer", "row", "class"), torch.stack([kept.tokens for kept in first]).numpy()),
        }
        columns = sorted({column for kept in first for column in kept.columns})
        at = {column: number for number, column in enumerate(columns)}
        if columns:
            valid = torch.zeros(len(layers), rows, len(columns), dtype=torch.bool)
            for number, kept in enumerate(first):
                if kept.columns:
                    valid[number][:, [at[column] for column in kept.columns]] = kept.picked.value
            classes = self._classes_of(0, columns[-1] + 1)[:, columns].numpy()
            coords |= {
                "token": (("token",), np.array(columns)),
                "step": (("token",), np.array([max(0, column - width + 1) for column in columns])),
                "token_class": (("row", "token"), np.array((*CLASSES, PADDING))[classes]),
                "valid": (("layer", "row", "token"), valid.numpy()),
            }
        widths = {name: self.held[layers[0], name].width for name in self.keep}
        for name in self.keep:
            dim = "dim" if widths[name] == max(widths.values()) else f"dim_{name}"
            arrays = labelled(name, dim, [self.held[layer, name] for layer in layers], at)
            if taken := sorted(arrays.keys() & (variables.keys() | coords.keys())):
                raise InputError(
                    f"the noted name {name!r} would be stored as {taken[0]!r}, which is taken; note another."
                )
            variables |= arrays
        return Record.of(variables, coords, {"names": [*self.keep], "reduce": [*self.reduce], "prompt_width": width})

    def _alike(self, layer: int) -> Kept:
        """What was kept at a layer first; all names must have the same tokens there."""
        found = {name: self.held.get((layer, name)) for name in self.keep}
        first = next(kept for kept in found.values() if kept is not None)
        for name, kept in found.items():
            if kept is None or not kept.same_tokens(first):
                raise InputError(
                    f"{name!r} was not noted on the same tokens of layer {layer} as the other names; record it alone, "
                    f"with keep={name!r}."
                )
        return first


def prompt_classes(layout: TokenLayout) -> Int[Tensor, "row pos"]:
    """Number of each prompt token's class in CLASSES, on the CPU; that of padding is one more than the last."""
    out = torch.where(layout.real, CLASSES.index("text"), len(CLASSES))
    if layout.image is not None:
        out[layout.image] = CLASSES.index("image")
    out[layout.named("completion")] = CLASSES.index("completion")
    out[layout.named("last_prompt")] = CLASSES.index("last_prompt")
    return out.cpu()


def check_generation(parts: ModelParts, max_new_tokens: int, options: Mapping[str, object]) -> None:
    """Refuse what cannot be recorded, before any work.

    Raises:
        InputError: beams, options without generation, a negative number of tokens.
    """
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens must be 0 (the prompt alone) or more, got {max_new_tokens}.")
    if not max_new_tokens:
        if options:
            raise InputError(f"{', '.join(options)} belong to generation; set max_new_tokens as well.")
        return
    beams = _setting(parts, options, "num_beams")
    if isinstance(beams, int) and beams > 1:
        raise InputError(f"record follows one text per row, and {beams} beams mix them; record with num_beams=1.")
    if _setting(parts, options, "return_dict_in_generate"):
        raise InputError("vlm.record generates token ids; leave return_dict_in_generate out.")


def _setting(parts: ModelParts, options: Mapping[str, Any], name: str) -> object:
    """A setting of generation, in transformers' order: keyword, generation_config, the model's own."""
    if name in options:
        return options[name]
    configs = (options.get("generation_config"), getattr(parts.root, "generation_config", None))
    return next((value for config in configs if (value := getattr(config, name, None)) is not None), None)


def _endings(parts: ModelParts, options: Mapping[str, object]) -> tuple[list[int], int | None]:
    """Token ids that end an answer, and the one that is fed behind it."""
    ends, pad = _setting(parts, options, "eos_token_id"), _setting(parts, options, "pad_token_id")
    some = ends.flatten().tolist() if isinstance(ends, Tensor) else ends
    several = [some] if isinstance(some, int) else list(some) if isinstance(some, Iterable) else []
    return [int(one) for one in several], pad if isinstance(pad, int) else None
