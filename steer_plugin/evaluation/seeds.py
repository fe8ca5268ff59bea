"""Several runs of one method that differ by seed: their mean, the spread between them, and two methods compared.

    T        = (1/S) sum_s statistic(run s),   of two methods: statistic(first's run s) - statistic(second's run s)
    interval   of (1/S) sum_s c_s statistic(run s, weights w), seeds c and pictures w resampled independently
    spread   = sqrt(sum_s (statistic(run s) - T)^2 / (S - 1))
    p        = P(|T with the pictures g swapped where s_g = 1| >= |T|),  s_g = 0 or 1, all patterns alike

Independent resampling of two factors: Owen 2007, "The pigeonhole bootstrap". Swapping the methods' rows on a picture is
to any statistic what sign flips are to a mean. A method that does not depend on the seed may have one run: it is held
against each run of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from steer_plugin.errors import InputError
from steer_plugin.evaluation.intervals import Interval, Statistic, Values, bootstrap_interval, mean
from steer_plugin.evaluation.paired import COUNTED_PICTURES, Groups, PairedTest, sign_flips

_BLOCK = 256


@dataclass(frozen=True)
class SeedSummary:
    """Several runs of one method, or their differences from another's.

    Attributes:
        mean: mean of the runs' statistics, with its interval.
        spread: standard deviation between the runs' statistics; None for a single run, which has none.
        means: the statistic of each run.
    """

    mean: Interval
    spread: float | None
    means: tuple[float, ...]


@dataclass(frozen=True)
class Permutation:
    """A two-sided permutation test: T, its p-value in (0, 1], how many pictures differ, and whether all ways count."""

    difference: float
    p_value: float
    pictures: int
    exact: bool


def across(
    runs: Sequence[ArrayLike],
    groups: Groups = None,
    statistic: Statistic = mean,
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> SeedSummary:
    """Combine runs of one method that differ by seed: (question,) or (question, column) each, on the same questions.

    `groups` names the picture of each question. Over S runs a bootstrap sees (S - 1)/S of the variance between them, so
    with two or three the interval is a lower bound; with a single run it is that of `bootstrap_interval`, which knows
    nothing of seeds, and the spread is None. Raises InputError for no runs, runs on different questions, and what
    `bootstrap_interval` refuses.
    """
    tables = _tables(runs, "run")
    count, columns = len(tables), tables[0].shape[1]
    random = np.random.default_rng([seed, count])

    def per_run(values: Values, weights: Values) -> Values:
        parts = [values[:, s * columns : (s + 1) * columns] for s in range(count)]
        return np.stack([statistic(part, weights) for part in parts], axis=1)

    def over_both(values: Values, weights: Values) -> Values:
        times = random.multinomial(count, np.full(count, 1 / count), size=len(weights))
        return (per_run(values, weights) * times).sum(axis=1) / count

    joined = np.concatenate(tables, axis=1)
    drawn = bootstrap_interval(joined, groups, over_both, seed=seed, resamples=resamples, level=level)
    found = per_run(joined, np.ones((1, len(joined))))[0]
    spread = float(np.std(found, ddof=1)) if count > 1 else None
    return SeedSummary(Interval(float(found.mean()), drawn.low, drawn.high, level), spread, tuple(found.tolist()))


def difference_across(
    first: Sequence[ArrayLike],
    second: Sequence[ArrayLike],
    groups: Groups = None,
    statistic: Statistic = mean,
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> SeedSummary:
    """Return statistic(first) - statistic(second), run k of one with run k of the other; shapes as for `across`.

    A side with one run is held against each run of the other. Raises InputError for other unequal numbers of runs, and
    what `across` refuses.
    """
    one, two = _matched(first, second)
    columns = one[0].shape[1]

    def less(values: Values, weights: Values) -> Values:
        return statistic(values[:, :columns], weights) - statistic(values[:, columns:], weights)

    pairs = [np.concatenate(pair, axis=1) for pair in zip(one, two, strict=True)]
    return across(pairs, groups, less, seed=seed, resamples=resamples, level=level)


def sign_flips_across(
    first: Sequence[ArrayLike], second: Sequence[ArrayLike], groups: Groups = None, *, seed: int, flips: int = 9999
) -> PairedTest:
    """Test whether two methods score equally, by sign flips on each question's mean over its runs, (question,) each.

    The seeds at hand are taken as given: other pictures would show the same, other seeds are for `difference_across`.
    Raises InputError as `difference_across` and `sign_flips` do, and for scores of several columns.
    """
    one, two = _matched(first, second)
    if one[0].shape[1] != 1:
        raise InputError(
            f"The runs have {one[0].shape[1]} columns: sign flips take one score per question. Use permutation_across, "
            "which takes any statistic."
        )
    ours, theirs = (np.mean([run[:, 0] for run in side], axis=0) for side in (one, two))
    return sign_flips(ours, theirs, groups, seed=seed, flips=flips)


def permutation(
    first: ArrayLike,
    second: ArrayLike,
    groups: Groups = None,
    statistic: Statistic = mean,
    *,
    seed: int,
    flips: int = 9999,
) -> Permutation:
    """Test whether a statistic is the same for two methods, by swapping their rows picture by picture, two-sided.

    `first` and `second` are (question,) or (question, column), row k of both the same question. All ways to swap are
    counted when at most 14 pictures differ, else `flips` are drawn and the observed one is added, so that p is never 0
    (Phipson and Smyth 2010). Raises InputError for unequal shapes, values that are not finite, or no flips.
    """
    return permutation_across([first], [second], groups, statistic, seed=seed, flips=flips)


def permutation_across(
    first: Sequence[ArrayLike],
    second: Sequence[ArrayLike],
    groups: Groups = None,
    statistic: Statistic = mean,
    *,
    seed: int,
    flips: int = 9999,
) -> Permutation:
    """Test the mean difference over runs, swapping a picture in all runs at once; the seeds are taken as given.

    Runs as for `difference_across`, errors as for it and `permutation`.
    """
    if flips < 1:
        raise InputError(f"flips is {flips}: expected at least 1, 9999 for p-values down to 0.0001.")
    one, two = _matched(first, second)
    members = _members(groups, len(one[0]))
    unlike = np.any([(a != b).any(axis=1) for a, b in zip(one, two, strict=True)], axis=0)
    differing = np.unique(members[unlike])
    # The column of each row in a pattern of swaps; rows of pictures that do not differ are never swapped.
    where = np.searchsorted(differing, members)
    moves = np.isin(members, differing)
    both = [np.concatenate(pair) for pair in zip(one, two, strict=True)]

    def value(swaps: Values) -> Values:
        """T for each pattern (way, picture): a swapped row counts for the other method, which is a weight of 0 or 1."""
        away = np.zeros((len(swaps), len(members)))
        away[:, moves] = swaps[:, where[moves]]
        kept, moved = np.concatenate([1 - away, away], axis=1), np.concatenate([away, 1 - away], axis=1)
        return np.mean([statistic(run, kept) - statistic(run, moved) for run in both], axis=0)

    observed = float(value(np.zeros((1, len(differing))))[0])
    exact = len(differing) <= COUNTED_PICTURES
    found = np.concatenate([value(swaps) for swaps in _swaps(len(differing), exact, seed, flips)])
    # The same rows summed in another order differ in their last bits.
    least = abs(observed) - 1e-9 * max(float(np.abs(found).max()), abs(observed))
    far = int((np.abs(found) >= least).sum())
    p = far / len(found) if exact else (1 + far) / (1 + flips)
    return Permutation(observed, p, len(differing), exact)


def _swaps(pictures: int, exact: bool, seed: int, flips: int) -> list[Values]:
    """Patterns (way, picture) of 0 and 1, in blocks."""
    ways = 2**pictures if exact else flips
    random = np.random.default_rng(seed)
    blocks: list[Values] = []
    for start in range(0, ways, _BLOCK):
        numbers = np.arange(start, min(start + _BLOCK, ways))
        drawn = (
            (numbers[:, None] >> np.arange(pictures)) & 1 if exact else random.integers(0, 2, (len(numbers), pictures))
        )
        blocks.append(drawn.astype(np.float64))
    return blocks


def _members(groups: Groups, rows: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    if groups is None:
        return np.arange(rows)
    if len(groups) != rows:
        raise InputError(f"Got {len(groups)} groups for {rows} rows: expected the picture of every row.")
    return np.unique(np.asarray(groups), return_inverse=True)[1]


def _matched(first: Sequence[ArrayLike], second: Sequence[ArrayLike]) -> tuple[list[Values], list[Values]]:
    """Tables of both methods, as many of one as of the other."""
    one, two = _tables(first, "first, run"), _tables(second, "second, run")
    if one[0].shape != two[0].shape:
        raise InputError(f"The methods have shapes {one[0].shape} and {two[0].shape}: expected the same questions.")
    if len(one) != len(two) and 1 not in (len(one), len(two)):
        raise InputError(
            f"Got {len(one)} runs of the first method and {len(two)} of the second: expected as many of each, or one "
            "of a method that does not depend on the seed."
        )
    count = max(len(one), len(two))
    return one * (count // len(one)), two * (count // len(two))


def _tables(runs: Sequence[ArrayLike], what: str) -> list[Values]:
    """Each run as (question, column); refuses what is not finite or not on the questions of the first run."""
    tables = [np.asarray(run, dtype=np.float64) for run in runs]
    if not tables:
        raise InputError("Got no runs: expected at least one, several for a spread between seeds.")
    for number, table in enumerate(tables):
        if table.ndim not in (1, 2) or table.size == 0 or not np.isfinite(table).all():
            raise InputError(
                f"{what} {number} has shape {table.shape}, finite: {bool(np.isfinite(table).all())}: expected finite "
                "scores (question,) or (question, column). Several runs go into a list, one array each."
            )
        if table.shape != tables[0].shape:
            raise InputError(f"{what} {number} has shape {table.shape}, run 0 has {tables[0].shape}: expected equal.")
    return [table[:, None] if table.ndim == 1 else table for table in tables]
