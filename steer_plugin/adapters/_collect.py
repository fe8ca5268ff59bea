"""Activations of many prompts on disk: chosen sites, chosen tokens, each or their mean; nothing else is kept.

    reduce "mean"    one (d_model) for each prompt and site        "none"    one (token, d_model), ragged

Prompts about one picture share its forward, and forwards stop behind the last site (`_tree` does the same for P2S).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import ProcessorMixin

from steer_plugin.adapters._batches import Size
from steer_plugin.adapters._branches import Branches
from steer_plugin.adapters._bulk import Bulk, Rows
from steer_plugin.adapters._gathered import Gathered, Pick
from steer_plugin.adapters._nodes import Node
from steer_plugin.adapters._parts import ModelParts
from steer_plugin.adapters._plan import Prompted
from steer_plugin.adapters._shared import Shared, shared_prompts
from steer_plugin.adapters._taps import Ends, Taps
from steer_plugin.adapters._tree import selected
from steer_plugin.atomic import JSON
from steer_plugin.context import Read
from steer_plugin.errors import InputError, SiteError, nearest
from steer_plugin.positions import Positions
from steer_plugin.sites import Site

REDUCTIONS = ("mean", "none")


@dataclass(frozen=True)
class Kept:
    """What a collection keeps.

    Raises:
        InputError: no sites, unknown reduction.
    """

    sites: tuple[Site, ...]
    positions: Positions
    reduce: str
    dtype: torch.dtype

    def __post_init__(self) -> None:
        """Refuse what cannot be kept."""
        if not self.sites:
            raise InputError("vlm.collect needs at least one site, as in [sp.resid_post(14)].")
        if self.reduce not in REDUCTIONS:
            raise InputError(
                f"unknown reduction {self.reduce!r}.{nearest(self.reduce, REDUCTIONS)} Known: {', '.join(REDUCTIONS)}."
            )
        if not self.dtype.is_floating_point:
            raise InputError(f"activations cannot be kept as {self.dtype}; give a floating-point dtype.")


class Collection(Bulk[Prompted, Shared]):
    """One collection on one model; `ends` says where a site's tensor passes."""

    what, unit = "collection", "prompt"

    def __init__(
        self, parts: ModelParts, processor: ProcessorMixin, ends: Ends, kept: Kept, batch_size: int | None
    ) -> None:
        super().__init__(parts, processor, batch_size)
        for site in kept.sites:
            if site.in_vision:
                raise SiteError(
                    f"vlm.collect keeps tokens of the decoder, and {site} is in the vision tower; vlm.cache reads it."
                )
            parts.point(site)
            parts.check_positions(site, kept.positions)
        self.kept, self.branches = kept, Branches(parts, ends)
        self.last = max(kept.sites, key=lambda site: site.order)

    def asked(self, items: Sequence[Prompted]) -> dict[str, JSON]:
        """Sites, positions, reduction and prompts."""
        digest = hashlib.sha256()
        for item in items:
            digest.update("\x1f".join([item.id, item.prompt, self.sizes.pictures(item.images)]).encode())
        return {
            "kind": "activations",
            "sites": [str(site) for site in self.kept.sites],
            "positions": str(self.kept.positions),
            "reduce": self.kept.reduce,
            "dtype": str(self.kept.dtype).removeprefix("torch."),
            "prompts": len(items),
            "prompts_sha256": digest.hexdigest(),
        }

    def size(self, item: Prompted) -> Size:
        """Size of the prompt."""
        return self.sizes.of(item.prompt, item.images)

    def batch(self, items: Sequence[Prompted]) -> Shared:
        """Tokenise prompts and open their pictures."""
        return shared_prompts(
            self.parts,
            self.processor,
            [item.prompt for item in items],
            [self.sizes.pictures(item.images) for item in items],
            lambda number: items[number].load_images(),
        )

    @torch.no_grad()
    def rows(self, batch: Shared) -> Rows:
        """The sites' tensors by name, and how many tokens each prompt has in them."""
        found = {site: Gathered(len(batch.ids)) for site in self.kept.sites}
        read = Read(self.last, self.kept.positions)
        asked = selected(self.parts, batch.ids, read)

        def taps(picks: Sequence[Pick]) -> Taps:
            return [(site, gathered.taking(picks)) for site, gathered in found.items()]

        front, behind = batch.split(asked)
        trunk = self.branches.trunk(
            batch.inputs, taps([Pick(i, batch.rows[i], row) for i, row in enumerate(front)]), self.last
        )
        if any(behind):
            placed = self.branches.placed([Node(*one) for one in zip(batch.rows, batch.tails, strict=True)], trunk)
            picks = [Pick(i, *placed.columns(i, row)) for i, row in enumerate(behind)]
            self.branches.grow(trunk, placed, taps(picks), self.last)
        about: list[dict[str, JSON]] = [{"tokens": len(row)} for row in asked]
        if self.kept.reduce == "mean":
            return Rows({str(site): one.mean().to("cpu", self.kept.dtype) for site, one in found.items()}, about)
        return Rows(
            {str(site): [t.to("cpu", self.kept.dtype) for t in one.tokens()] for site, one in found.items()}, about
        )
