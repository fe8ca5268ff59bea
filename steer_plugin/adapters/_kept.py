"""What is kept of one noted name at one site: running sums over tokens, and values by token where they were asked for.

note (row, pos, dim) -> none (row, token, dim)   mean, norm (row, token)   dim_mean (row, class, dim)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from steer_plugin.record import CLASSES, MOMENTS, SUFFIXES, SUMMED, Variable
from steer_plugin.sites import Site

PER_TOKEN = ("none", "mean", "norm")


class Growing:
    """A tensor that grows along its second axis, without one object per token."""

    def __init__(self) -> None:
        self._held: Tensor | None = None
        self._used = 0

    def append(self, block: Shaped[Tensor, "row new ..."]) -> None:
        need = self._used + block.shape[1]
        if self._held is None:
            self._held = block.clone()
        elif need > self._held.shape[1]:
            wider = self._held.new_empty((block.shape[0], need + need // 4 + 8, *block.shape[2:]))
            wider[:, : self._used] = self.value
            self._held = wider
        self._held[:, self._used : need] = block
        self._used = need

    @property
    def value(self) -> Shaped[Tensor, "row used ..."]:
        return torch.zeros(0, 0) if self._held is None else self._held[:, : self._used]


class Kept:
    """One name at one site; columns before `stop` are dealt with.

    Attributes:
        tokens: (row, class) how many tokens were added.
        columns, picked: columns of the batch in which some row has a token, and which rows those are.
    """

    def __init__(self, site: Site, rows: int, width: int, reduce: Sequence[str]) -> None:
        kinds = len(CLASSES)
        self.site, self.width, self.reduce, self.stop = site, width, tuple(reduce), 0
        self.tokens: Int[Tensor, "row class"] = torch.zeros(rows, kinds, dtype=torch.long)
        self.columns: list[int] = []
        self.picked = Growing()
        self._values = {name: Growing() for name in reduce if name in PER_TOKEN}
        self._moments: Float[Tensor, "row class moment"] = torch.zeros(rows, kinds, len(MOMENTS), dtype=torch.float64)
        self._moments[..., SUMMED], self._moments[..., SUMMED + 1] = torch.inf, -torch.inf
        self._dim_sums: Float[Tensor, "row class dim"] | None = None
        if "dim_mean" in reduce:
            self._dim_sums = torch.zeros(rows, kinds, width, dtype=torch.float64)

    def add(
        self,
        values: Float[Tensor, "row new dim"],
        chosen: Bool[Tensor, "row new"],
        classes: Int[Tensor, "row new"],
        columns: Sequence[int],
    ) -> None:
        """Take in the chosen tokens of some columns."""
        moments, norms = _by_token(values)
        sums, low, high = moments.split([SUMMED, 1, 1], -1)
        for number in classes[chosen].unique().tolist():
            own = chosen & (classes == number)
            other = ~own[..., None]
            self.tokens[:, number] += own.sum(1)
            self._moments[:, number, :SUMMED] += sums.masked_fill(other, 0).sum(1)
            ends = self._moments[:, number, SUMMED:]
            ends[:, :1] = ends[:, :1].minimum(low.masked_fill(other, torch.inf).amin(1))
            ends[:, 1:] = ends[:, 1:].maximum(high.masked_fill(other, -torch.inf).amax(1))
            if self._dim_sums is not None:
                self._dim_sums[:, number] += values.masked_fill(other.to(values.device), 0).sum(1).cpu()
        if self._values:
            self.columns += columns
            self.picked.append(chosen)
        for name, growing in self._values.items():
            growing.append(values.cpu() if name == "none" else norms if name == "norm" else moments[..., 0].float())

    def same_tokens(self, other: Kept) -> bool:
        """Whether both were told of the same tokens."""
        if self.columns != other.columns or not torch.equal(self.tokens, other.tokens):
            return False
        return not self.columns or torch.equal(self.picked.value, other.picked.value)

    def taken(self, reduction: str) -> Tensor:
        """Values by token, NaN where no token was chosen; they are dropped here, so that large ones exist once."""
        value = self._values.pop(reduction).value
        gone = ~self.picked.value
        return value.masked_fill(gone[..., None] if value.ndim == 3 else gone, torch.nan)

    @property
    def moments(self) -> Float[Tensor, "row class moment"]:
        """Sums over tokens."""
        return self._moments

    @property
    def dim_means(self) -> Float[Tensor, "row class dim"] | None:
        """Means over tokens, NaN where there is none."""
        return None if self._dim_sums is None else (self._dim_sums / self.tokens[..., None]).float()


def labelled(name: str, dim: str, layers: Sequence[Kept], columns: Mapping[int, int]) -> dict[str, Variable]:
    """All arrays of a name, one Kept for each layer; `columns` says where a column of the batch stands."""
    one, out = layers[0], dict[str, Variable]()
    for reduction in [reduction for reduction in PER_TOKEN if reduction in one.reduce]:
        rest, more = ((one.width,), (dim,)) if reduction == "none" else ((), ())
        values = torch.full((len(layers), one.tokens.shape[0], len(columns), *rest), torch.nan)
        for number, kept in enumerate(layers):
            if kept.columns:
                values[number][:, [columns[column] for column in kept.columns]] = kept.taken(reduction)
        out[f"{name}{SUFFIXES[reduction]}"] = (("layer", "row", "token", *more), values.numpy())
    moments = torch.stack([kept.moments for kept in layers])
    out[f"{name}_moments"] = (("layer", "row", "class", "moment"), moments.numpy())
    means = [mean for kept in layers if (mean := kept.dim_means) is not None]
    if means:
        out[f"{name}_dim_mean"] = (("layer", "row", "class", dim), torch.stack(means).numpy())
    return out


def _by_token(
    values: Float[Tensor, "row pos dim"],
) -> tuple[Float[Tensor, "row pos moment"], Float[Tensor, "row pos"]]:
    """Moments (float64) and norm of each token over its dimensions, on the CPU."""
    mean, norm = values.mean(-1), torch.linalg.vector_norm(values, dim=-1)
    root = sqrt(values.shape[-1])
    # Hoyer: 0 where all are alike, 1 where one alone differs from 0.
    spread = values.abs().sum(-1) / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    sparsity = (root - spread) / max(root - 1, 1e-9) * (norm > 0)
    low, high = values.aminmax(dim=-1)
    variance = values.var(-1, correction=0)
    parts = [mean, variance, (values > 0.5).float().mean(-1), sparsity, low, high, norm]
    # One copy from the device; squares are added in float64, or the spread of a gate near one value would drown.
    moments = torch.stack(parts, -1).cpu().double()
    moments[..., 1] += moments[..., 0].square()
    return moments[..., :-1], moments[..., -1].float()
