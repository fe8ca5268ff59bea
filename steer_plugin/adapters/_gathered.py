"""Activations of some tokens of many prompts, collected over the forwards in which these tokens run.

mean    (item, d_model), in float32; a single token is kept to the bit
tokens  one (token, d_model) for each item
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Pick(NamedTuple):
    """Columns of one row of a forward that belong to an item."""

    item: int
    row: int
    columns: Sequence[int]


class Gathered:
    """What was seen of each item so far."""

    def __init__(self, items: int) -> None:
        self._seen: list[list[Tensor]] = [[] for _ in range(items)]

    def taking(self, picks: Sequence[Pick]) -> Callable[[Float[Tensor, "row pos d_model"]], None]:
        """Return what takes these columns of a forward's tensor."""
        chosen = [pick for pick in picks if pick.columns]
        rows = torch.tensor([pick.row for pick in chosen for _ in pick.columns], dtype=torch.long)
        columns = torch.tensor([column for pick in chosen for column in pick.columns], dtype=torch.long)

        def take(hidden: Float[Tensor, "row pos d_model"]) -> None:
            if chosen:
                found = hidden[rows.to(hidden.device), columns.to(hidden.device)]
                parts = found.split([len(pick.columns) for pick in chosen])
                for pick, part in zip(chosen, parts, strict=True):
                    self._seen[pick.item].append(part)

        return take

    def tokens(self) -> list[Float[Tensor, "token d_model"]]:
        """Every token of each item, in order."""
        return [torch.cat(seen) for seen in self._seen]

    def mean(self) -> Float[Tensor, "item d_model"]:
        """Mean over each item's tokens."""
        return torch.stack([torch.cat(seen).float().mean(0) for seen in self._seen])
