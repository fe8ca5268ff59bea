"""Which rows: numbers in any order, a mask, or ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray
from torch import Tensor

from steer_plugin.errors import InputError, nearest

Rows: TypeAlias = "Sequence[int] | Sequence[bool] | Sequence[str]"
Selection: TypeAlias = "Rows | Shaped[np.ndarray, ' any'] | Shaped[Tensor, ' any']"


def chosen(
    which: Selection, count: int, ids: Callable[[], Sequence[str]], folder: Path
) -> Shaped[NDArray[np.int64], " some"]:
    """Return the numbers of the rows that are asked for, of `count`; `ids` is called for their ids only if needed."""
    asked = which.detach().cpu().numpy() if isinstance(which, Tensor) else np.asarray(which)
    if asked.ndim == 1 and not asked.size and asked.dtype.kind != "b":
        return np.zeros(0, dtype=np.int64)
    if asked.ndim == 1 and asked.dtype.kind == "U":
        return _numbers([str(row) for row in asked], ids(), folder)
    if asked.ndim != 1 or asked.dtype.kind not in "biu":
        raise InputError(
            f"The selection has shape {asked.shape} and dtype {asked.dtype}: expected row numbers, ids or a boolean "
            f"mask of {count} rows."
        )
    if asked.dtype.kind == "b":
        if len(asked) != count:
            raise InputError(f"The mask has {len(asked)} entries for {count} rows: expected one per row.")
        return np.flatnonzero(asked)
    if not (-count <= asked.min() and asked.max() < count):
        raise InputError(f"Row numbers reach from {asked.min()} to {asked.max()}: expected 0 to {count - 1}.")
    return asked.astype(np.int64) % count


def _numbers(asked: Sequence[str], ids: Sequence[str], folder: Path) -> Shaped[NDArray[np.int64], " some"]:
    numbers = {row: k for k, row in enumerate(ids)}
    for row in asked:
        if row not in numbers:
            raise InputError(f"{folder} has no row {row!r}.{nearest(row, ids[:1000])}")
    return np.array([numbers[row] for row in asked], dtype=np.int64)
