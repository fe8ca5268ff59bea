"""State of one call: a prompt forward and the tokens decoded from it, from layout to the contexts that were read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache

from steer_plugin.adapters._put import Reach, Scaled, Strength
from steer_plugin.context import Aside, AsideTokens, Read
from steer_plugin.errors import PositionError
from steer_plugin.layout import TokenLayout
from steer_plugin.positions import Positions
from steer_plugin.sites import Site


@dataclass(frozen=True)
class Chosen:
    """What the host knows of the prompt tokens that an expression selects, so that no layer has to ask the device.

    Attributes:
        counts: tokens of each row.
        first, stop: the columns in which any row has one; both 0 where there is none.
        whole: whether every row has all of these columns.
    """

    counts: tuple[int, ...]
    first: int
    stop: int
    whole: bool

    @classmethod
    def of(cls, mask: Bool[Tensor, "row pos"]) -> Chosen:
        """Describe a mask that lies on the host."""
        cells = mask.numpy()
        columns = np.flatnonzero(cells.any(0))
        first, stop = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (0, 0)
        return cls(tuple(cells.sum(1).tolist()), first, stop, bool(cells[:, first:stop].all()))


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
        shown: what deltas are shown of `values` while decoding: on their device, one for each row.
        strengths: alpha of each write as it multiplies; `scaled` alpha * delta where that stays the same in the call.
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
    shown: dict[tuple[int, int, torch.device], tuple[Float[Tensor, "row d_model"], ...]] = field(default_factory=dict)
    strengths: dict[tuple[int, int, torch.device], Strength] = field(default_factory=dict)
    scaled: dict[int, Scaled] = field(default_factory=dict)
    _chosen: dict[Positions, Chosen] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Columns of the prompt."""
        return self.layout.shape[1]

    def prompt_mask(self, positions: Positions) -> Bool[Tensor, "row pos"]:
        """Mask over the prompt, computed once per call."""
        if positions not in self.masks:
            self.masks[positions] = positions.mask(self.layout)
        return self.masks[positions]

    def choose(self, expressions: Iterable[Positions]) -> None:
        """Look at the masks of several expressions with one copy to the host, before the prompt runs."""
        new = [one for one in dict.fromkeys(expressions) if one not in self._chosen]
        if new:
            masks = torch.stack([self.prompt_mask(one) for one in new]).cpu()
            self._chosen.update(zip(new, map(Chosen.of, masks), strict=True))

    def chosen(self, positions: Positions) -> Chosen:
        """What the host knows of an expression's tokens."""
        self.choose([positions])
        return self._chosen[positions]


@dataclass(frozen=True)
class Forward:
    """One forward of a call: it runs columns [start, stop)."""

    call: Call
    start: int
    stop: int
    _reaches: dict[tuple[Positions, torch.device], Reach] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

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

    def reach(self, positions: Positions, device: torch.device) -> Reach:
        """What a write on these positions changes of this forward; made once for all layers of a device."""
        known = self._reaches.get((positions, device))
        if known is None:
            known = self._reaches[positions, device] = self._reach(positions, device)
        return known

    def _reach(self, positions: Positions, device: torch.device) -> Reach:
        mask, span = self.mask(positions), self.stop - self.start
        if isinstance(mask, bool):
            return Reach(0, span if mask else 0)
        if self.stop != self.call.width:
            return Reach(0, span, mask[..., None].to(device))
        chosen = self.call.chosen(positions)
        start, stop = max(chosen.first - self.start, 0), max(chosen.stop - self.start, 0)
        return Reach(start, stop, None if chosen.whole else mask[:, start:stop, None].to(device))

    def read(self, index: int, read: Read, hidden: Float[Tensor, "row pos d_model"]) -> None:
        """Keep the mean of the read's tokens for write number `index`; only prompt forwards are read.

        Raises:
            PositionError: some row has no such token.
        """
        mask = self.mask(read.positions)
        if self.stop == self.call.width and isinstance(mask, Tensor):
            chosen = self.call.chosen(read.positions) if self.start == 0 else None
            self.call.values[index, read] = mean_over(hidden, mask, read, chosen)


@dataclass(frozen=True)
class Tap:
    """A read of the user's own: sees what was written at its site; `take` gets each tensor and its mask."""

    site: Site
    positions: Positions
    take: Callable[[Tensor, Forward], None]


def mean_over(
    hidden: Float[Tensor, "row pos d_model"], mask: Bool[Tensor, "row pos"], read: Read, chosen: Chosen | None = None
) -> Float[Tensor, "row d_model"]:
    """Mean of the masked tokens of each row; a single token is returned to the bit.

    Raises:
        PositionError: a row without such a token.
    """
    chosen = Chosen.of(mask.cpu()) if chosen is None else chosen
    if 0 in chosen.counts:
        row = chosen.counts.index(0)
        raise PositionError(f"the read at {read.site} on {str(read.positions)!r} finds no token in row {row}.")
    if max(chosen.counts) == 1 and chosen.whole:
        return hidden[:, chosen.first].clone()
    mask = mask.to(hidden.device)  # layers may lie on another device than the token ids
    if max(chosen.counts) == 1:
        return hidden[torch.arange(mask.shape[0], device=hidden.device), mask.int().argmax(-1)]
    kept = torch.where(mask[..., None], hidden, torch.zeros((), dtype=hidden.dtype, device=hidden.device))
    return kept.sum(1) / mask.sum(-1)[:, None].to(hidden.dtype)
