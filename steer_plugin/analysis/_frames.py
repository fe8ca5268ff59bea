"""Tables and intervals that the results of analyses share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from steer_plugin.record import analysis_module

if TYPE_CHECKING:
    from pandas import DataFrame
else:
    DataFrame = object  # imported when needed; run-time type checkers look the name up

LEVEL, RESAMPLES = 0.95, 1000


def over(count: int, what: str) -> str:
    """Say below which samples an interval was made, for a figure's title."""
    return f"mean of {count} {what}s, 95 % bootstrap intervals" if count > 1 else f"one {what}"


def frame(columns: Mapping[str, Sequence[object] | np.ndarray]) -> DataFrame:
    """Make a table of columns.

    Raises:
        FrameworkError: pandas is missing.
    """
    return analysis_module("pandas").DataFrame(dict(columns))


def spread(values: Float[np.ndarray, "*what row"], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over rows with its 95 % bootstrap interval (rows drawn anew, the same draws for every cell).

    Of one row there is no interval: its ends are NaN.
    """
    mean = values.mean(-1)
    rows = values.shape[-1]
    if rows < 2:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    drawn = np.random.default_rng(seed).integers(0, rows, (RESAMPLES, rows))
    weights = np.stack([np.bincount(one, minlength=rows) for one in drawn], -1) / rows
    low, high = np.quantile(values @ weights, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=-1)
    return mean, low, high


def ratio_spread(
    above: Float[np.ndarray, "*what row"], below: Float[np.ndarray, " row"], seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mean(above) / mean(below) with its 95 % bootstrap interval, rows of both drawn together.

    Where mean(below) itself cannot be told from 0 there is no interval: its ends are NaN.
    """
    share = above.mean(-1) / below.mean()
    rows = len(below)
    if rows < 2:
        return share, np.full_like(share, np.nan), np.full_like(share, np.nan)
    drawn = np.random.default_rng(seed).integers(0, rows, (RESAMPLES, rows))
    weights = np.stack([np.bincount(one, minlength=rows) for one in drawn], -1) / rows
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    drawn_below = below @ weights
    if np.prod(np.sign(np.quantile(drawn_below, ends))) <= 0:
        return share, np.full_like(share, np.nan), np.full_like(share, np.nan)
    low, high = np.quantile(above @ weights / drawn_below, ends, axis=-1)
    return share, low, high
