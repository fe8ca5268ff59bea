"""Intervals for scores: resample pictures, not questions, because questions about one picture err together.

A bootstrap resample is a weight per row (how often its picture was drawn), so a statistic is a function of weights:

    statistic(values (row, column), weights (resample, row)) -> (resample,)      mean: weights @ values / sum of weights

The interval reaches from the (1 - level)/2 to the (1 + level)/2 quantile of the resampled statistic (Efron 1979); two
methods on the same questions are compared by their difference within each resample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

from steer_plugin.errors import InputError

Values: TypeAlias = NDArray[np.float64]
Statistic: TypeAlias = Callable[[Values, Values], Values]

# Resamples worked on at once: bounds the memory at this many weights per row.
_BLOCK = 256


@dataclass(frozen=True)
class Interval:
    """A value with its interval at the given level (0.95 for 95 %)."""

    value: float
    low: float
    high: float
    level: float = 0.95


@dataclass(frozen=True)
class SumStatistic:
    """A statistic of weighted sums: of(weights @ columns(values)), values (row, column) -> (resample,).

    As rows of one picture always have one weight, their columns may be summed beforehand (`summed`).
    """

    columns: Callable[[Values], Values]
    of: Callable[[Values], Values]

    def __call__(
        self, values: Float[np.ndarray, "row column"], weights: Float[np.ndarray, "resample row"]
    ) -> Float[np.ndarray, " resample"]:
        """The statistic of each resample."""
        return self.of(weights @ self.columns(values))


def _share(sums: Float[np.ndarray, "resample 2"]) -> Float[np.ndarray, " resample"]:
    return np.divide(sums[:, 0], sums[:, 1], out=np.zeros(len(sums)), where=sums[:, 1] != 0)


def _counted(values: Float[np.ndarray, "row 1"]) -> Float[np.ndarray, "row 2"]:
    return np.concatenate([values, np.ones_like(values)], axis=1)


def _agreement(values: Float[np.ndarray, "row 2"]) -> Float[np.ndarray, "row 2"]:
    said, true = values[:, 0], values[:, 1]
    return np.stack([2 * said * true, said + true], axis=1)


# The mean of one column, such as the accuracy of 0/1 answers.
mean = SumStatistic(_counted, _share)
# The sum of the first column over that of the second (CHAIR_i, precision); 0 where the latter is 0.
ratio = SumStatistic(lambda values: values, _share)
# POPE's F1 from the columns prediction and label, 1 for yes; 0 without any yes.
f1 = SumStatistic(_agreement, _share)


def summed(
    values: Float[np.ndarray, "row column"], groups: Sequence[str], statistic: SumStatistic
) -> tuple[Float[np.ndarray, "picture sum"], list[str], SumStatistic]:
    """Sum the columns of each picture's rows: the same statistic of as many rows as there are pictures.

    Pictures come in the order of their first row, so that a bootstrap draws as it would from the rows.
    """
    members = _members(groups, len(values))
    columns = statistic.columns(values)
    sums = np.stack([np.bincount(members, weights=column) for column in columns.T], axis=1)
    return sums, list(dict.fromkeys(groups)), SumStatistic(lambda table: table, statistic.of)


def bootstrap_interval(
    values: ArrayLike,
    groups: Sequence[str] | Sequence[int] | None = None,
    statistic: Statistic = mean,
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Return a statistic with its percentile bootstrap interval, resampling whole groups.

    `values` is (row,) or (row, column), numbers or booleans; `groups` names the picture of each row (None: each row
    is a group of its own). Raises InputError for no or non-finite values, fewer than two groups, or a level
    outside (0, 1).
    """
    table = _table(values)
    members = _members(groups, len(table))
    drawn = _resampled(lambda weights: statistic(table, weights), members, seed, resamples)
    return _interval(float(statistic(table, np.ones((1, len(table))))[0]), drawn, level)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    groups: Sequence[str] | Sequence[int] | None = None,
    statistic: Statistic = mean,
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Return statistic(first) - statistic(second) on the same questions, with its percentile bootstrap interval.

    Shapes, groups and errors as for `bootstrap_interval`; row k of both belongs to the same question.
    """
    one, two = _table(first), _table(second)
    if one.shape != two.shape:
        raise InputError(f"The methods have shapes {one.shape} and {two.shape}: expected the same questions in both.")
    members = _members(groups, len(one))
    drawn = _resampled(lambda weights: statistic(one, weights) - statistic(two, weights), members, seed, resamples)
    whole = np.ones((1, len(one)))
    return _interval(float((statistic(one, whole) - statistic(two, whole))[0]), drawn, level)


def _table(values: ArrayLike) -> Values:
    table = np.asarray(values, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all():
        raise InputError(
            f"The values have shape {table.shape}, finite: {bool(np.isfinite(table).all())}: expected one finite row "
            "per question, at least two. Drop unanswered questions first."
        )
    return table


def _members(groups: Sequence[str] | Sequence[int] | None, rows: int) -> NDArray[np.int64]:
    """Return the number of each row's group, groups numbered in the order of their first row."""
    if groups is not None and len(groups) != rows:
        raise InputError(f"Got {len(groups)} groups for {rows} rows: expected the picture of every row.")
    numbers: dict[str | int, int] = {}
    for group in groups if groups is not None else range(rows):
        numbers.setdefault(group, len(numbers))
    if len(numbers) < 2:
        raise InputError(f"All {rows} rows belong to one group: expected at least two pictures to resample.")
    return np.array([numbers[g] for g in (groups if groups is not None else range(rows))], dtype=np.int64)


def _resampled(
    statistic: Callable[[Values], Values], members: NDArray[np.int64], seed: int, resamples: int
) -> Float[np.ndarray, " resample"]:
    if resamples < 1:
        raise InputError(f"resamples is {resamples}: expected at least 1, 2000 for a 95 % interval.")
    count = int(members.max()) + 1
    random = np.random.default_rng(seed)
    drawn: list[Values] = []
    for start in range(0, resamples, _BLOCK):
        times = random.multinomial(count, np.full(count, 1 / count), size=min(_BLOCK, resamples - start))
        drawn.append(statistic(times.astype(np.float64)[:, members]))
    return np.concatenate(drawn)


def _interval(value: float, drawn: Float[np.ndarray, " resample"], level: float) -> Interval:
    _check_level(level)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"level is {level}: expected a share between 0 and 1, 0.95 for 95 %.")
