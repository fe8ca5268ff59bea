"""How a change gets into a stream: as few new tensors as it takes, and nothing asked of the device.

    h[start:stop] <- h[start:stop] + alpha * delta     in the columns that are written, under a mask where rows differ

Bits of all other tokens stay. A tensor that somebody else made is never changed in place: a hook of the user's, a
recorder or autograd may hold it. One that the write before at the same site made is ours alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from steer_plugin.intervention import expand_rows


@dataclass(frozen=True)
class Reach:
    """Columns [start, stop) of a forward, in them the tokens of `mask`, or all of them."""

    start: int
    stop: int
    mask: Bool[Tensor, "row pos 1"] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Cut these columns out of what has columns, (..., pos, dim); what has one for all stays."""
        if tensor.ndim < 2 or tensor.shape[-2] == 1 or (self.start, self.stop) == (0, tensor.shape[-2]):
            return tensor
        return tensor[..., self.start : self.stop, :]


@dataclass(frozen=True)
class Strength:
    """What multiplies a change, and which rows it leaves alone (None: no row).

    A row of strength 0 keeps its bits: even adding +0.0 would turn -0.0 into 0.0.
    """

    factor: float | int | Tensor
    rows: Bool[Tensor, "row 1 1"] | None = None

    @classmethod
    def of(cls, alpha: float | int | Tensor, rows: int, device: torch.device, *, every_row: bool = False) -> Strength:
        """Lay a strength out for a stream; one for each row is repeated over its beams, `every_row`: none is 0."""
        if not isinstance(alpha, Tensor) or (alpha.ndim == 0 and alpha.is_cpu):
            return cls(alpha)
        if alpha.ndim == 0:
            return cls(alpha.to(device))
        factor = expand_rows(alpha.to(device), rows, "strengths")[:, None, None]
        return cls(factor, None if every_row else factor != 0)


@dataclass(frozen=True)
class Scaled:
    """alpha * change, ready to be added, and of which change: kept while the delta hands out the same tensor."""

    change: Tensor
    version: int
    value: Tensor

    @classmethod
    def keep(cls, change: Tensor, value: Tensor, memory: Iterable[object]) -> Scaled | None:
        """Keep a product if its change is remembered for the whole call and neither is part of a graph."""
        if change.is_inference() or value.requires_grad or (change.ndim > 1 and change.shape[-2] != 1):
            return None
        held = change.untyped_storage().data_ptr()
        if any(isinstance(one, Tensor) and one.untyped_storage().data_ptr() == held for one in memory):
            return cls(change, change._version, value)
        return None

    def serves(self, change: Tensor, out: Tensor) -> bool:
        """Whether this is the same change, unchanged, and for such a stream."""
        if change is not self.change:
            # The storage of our change lives as long as we do, so the same address is the same memory.
            if change.is_inference() or change.data_ptr() != self.change.data_ptr():
                return False
            if (change.shape, change.stride(), change.dtype) != (
                self.change.shape, self.change.stride(), self.change.dtype,
            ):  # fmt: skip
                return False
        same = (out.dtype, out.device) == (self.value.dtype, self.value.device)
        return same and change._version == self.version and not change.requires_grad


def put(out: Tensor, new: Tensor, reach: Reach, rows: Tensor | None, *, own: bool) -> Tensor:
    """Return the stream with `new` in the reached columns, where mask and rows say so; in place only if it is our own.

    Args:
        out: (row, pos, d_model).
        new: what comes in place of the reached columns of `out`, of their shape.
        reach: which tokens.
        rows: which rows, (row, 1, 1), or None for all.
        own: whether nobody else can hold `out`.
    """
    part = reach.of(out)
    mask = reach.mask if rows is None else rows if reach.mask is None else rows & reach.mask
    if mask is not None:
        new = torch.where(mask, new, part)
    if part is out:
        return new
    if own:
        part.copy_(new)
        return out
    pieces = (out[:, : reach.start], new, out[:, reach.stop :])
    return torch.cat([piece for piece in pieces if piece.shape[1]], 1)
