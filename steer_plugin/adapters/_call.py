"""State of one call: a prompt forward and the tokens decoded from it, from layout to the contexts that were read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache

from steer_plugin.context import Aside, AsideTokens, Read
from steer_plugin.errors import PositionError
from steer_plugin.layout import TokenLayout
from steer_plugin.positions import Positions
from steer_plugin.sites import Site


@dataclass
class Call:
    """What is remembered from the prompt forward to the last decoded token; keyed by the KV cache.

    Attributes:
        layout: token classes of the prompt.
        prompt_ids: ids of the prompt, to recognise decoding without a cache.
        length: columns seen so far.
        values: what was read for which write, (row, d_model) each.
        resolved: whether late reads are in `values`.
        asides: for each write, what its texts have at its site; `pictured` what they have behind the input's picture.
        riding: whether twins ride as rows of the same forwards; None until the first of them.
        twin: the cache of a twin that runs alone.
    """

    layout: TokenLayout
    prompt_ids: Int[Tensor, "row pos"] | None
    length: int
    values: dict[tuple[int, Read], Float[Tensor, "row d_model"]] = field(default_factory=dict)
    memory: dict[int, dict[str, object]] = field(default_factory=dict)
    masks: dict[Positions, Bool[Tensor, "row pos"]] = field(default_factory=dict)
    resolved: bool = False
    asides: dict[int, tuple[AsideTokens, ...]] = field(default_factory=dict)
    pictured: dict[Aside, Mapping[Site, AsideTokens]] = field(default_factory=dict)
    riding: bool | None = None
    twin: Cache | None = None

    @property
    def width(self) -> int:
        """Columns of the prompt."""
        return self.layout.shape[1]

    def prompt_mask(self, positions: Positions) -> Bool[Tensor, "row pos"]:
        """Mask over the prompt, computed once per call."""
        if positions not in self.masks:
            self.masks[positions] = positions.mask(self.layout)
        return self.masks[positions]


@dataclass(frozen=True)
class Forward:
    """One forward of a call: it runs columns [start, stop)."""

    call: Call
    start: int
    stop: int

    @property
    def step(self) -> int:
        """0 for the prompt (and its replayed last token), then 1, 2, ... for tokens fed back."""
        return self.stop - self.call.width

    def mask(self, positions: Positions) -> Bool[Tensor, "row pos"] | bool:
        """True (all tokens of this forward), False (none), or a mask; no tensor is made while decoding with a cache."""
        call = self.call
        if self.start >= call.width:
            return positions.while_decoding()
        if self.stop == call.width:
            mask = call.prompt_mask(positions)
            return mask if self.start == 0 else mask[:, self.start :]
        return positions.mask(call.layout, self.start, self.stop)

    def read(self, index: int, read: Read, hidden: Float[Tensor, "row pos d_model"]) -> None:
        """Keep the mean of the read's tokens for write number `index`; only prompt forwards are read.

        Raises:
            PositionError: some row has no such token.
        """
        mask = self.mask(read.positions)
        if self.stop == self.call.width and isinstance(mask, Tensor):
            self.call.values[index, read] = mean_over(hidden, mask, read)


@dataclass(frozen=True)
class Tap:
    """A read of the user's own: sees what was written at its site; `take` gets each tensor and its mask."""

    site: Site
    positions: Positions
    take: Callable[[Tensor, Forward], None]


def mean_over(
    hidden: Float[Tensor, "row pos d_model"], mask: Bool[Tensor, "row pos"], read: Read
) -> Float[Tensor, "row d_model"]:
    """Mean of the masked tokens of each row; a single token is returned to the bit.

    Raises:
        PositionError: a row without such a token.
    """
    mask = mask.to(hidden.device)  # layers may lie on another device than the token ids
    count = mask.sum(-1)
    if bool((count == 0).any()):
        row = int((count == 0).nonzero()[0])
        raise PositionError(f"the read at {read.site} on {str(read.positions)!r} finds no token in row {row}.")
    if bool((count == 1).all()):
        return hidden[mask]
    kept = torch.where(mask[..., None], hidden, torch.zeros((), dtype=hidden.dtype, device=hidden.device))
    return kept.sum(1) / count[:, None].to(hidden.dtype)
