"""Every method against unsteered, and against its own controls: differences, p-values, Holm's correction per metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float

from steer_plugin.evaluation.benchmark import Benchmark, Metric, asked_rows
from steer_plugin.evaluation.intervals import Interval, Statistic, SumStatistic, Values, mean, summed
from steer_plugin.evaluation.paired import holm
from steer_plugin.evaluation.seeds import difference_across, permutation_across, sign_flips_across

# One mapping from metric to (item, column) for each seed.
Runs: TypeAlias = "Sequence[Mapping[str, Float[np.ndarray, 'item column']]]"
Gaps: TypeAlias = "dict[str, dict[str, Against]]"
LEVEL = 0.05
# p-values of ratios and F1 down to 0.0005: Holm over forty methods still gets below 5 %.
FLIPS = 1999


@dataclass(frozen=True)
class Against:
    """A method less another on the same questions: the difference, its p-value alone and corrected."""

    difference: Interval
    p_value: float
    p_holm: float
    significant: bool


def against_all(
    benchmark: Benchmark, runs: Mapping[str, Runs], controls: Mapping[str, str], *, seed: int
) -> tuple[Gaps, Gaps]:
    """Return each method's differences from "none" for every metric, and the headline's from the method's controls.

    Methods and controls are two families of tests: what controls do must not cost methods their significance.
    """
    methods = [name for name in runs if name != "none" and name not in controls]
    against: Gaps = {}
    for metric in benchmark.metrics:
        for family in (methods, [name for name in runs if name in controls]):
            there = [name for name in family if comparable(metric.name, benchmark.groups, runs[name], runs["none"])]
            gaps = _compared(benchmark, metric, [(runs[name], runs["none"]) for name in there], seed)
            for name, gap in zip(there, gaps, strict=True):
                against.setdefault(name, {})[metric.name] = gap
    headline = benchmark.metric(benchmark.headline)
    pairs = [
        (method, name)
        for name, method in controls.items()
        if method in runs and comparable(headline.name, benchmark.groups, runs[method], runs[name])
    ]
    gaps = _compared(benchmark, headline, [(runs[method], runs[name]) for method, name in pairs], seed)
    over: Gaps = {}
    for (method, name), gap in zip(pairs, gaps, strict=True):
        over.setdefault(method, {})[name] = gap
    # In the order of the runs, whichever family a row is of.
    return {name: against[name] for name in runs if name in against}, over


def scored_rows(metric: str, *sides: Runs) -> Bool[np.ndarray, " item"]:
    """True where every run has a score: a metric may not ask about an item, and a judge may find no score."""
    return np.logical_and.reduce([asked_rows(run[metric]) for side in sides for run in side])


def comparable(metric: str, pictures: Sequence[str], *sides: Runs) -> bool:
    """Whether at least two pictures have a score in every run: fewer have no interval."""
    if any(metric not in side[0] for side in sides):
        return False
    use = scored_rows(metric, *sides)
    return len({picture for picture, chosen in zip(pictures, use, strict=True) if chosen}) > 1


def _compared(benchmark: Benchmark, metric: Metric, pairs: Sequence[tuple[Runs, Runs]], seed: int) -> list[Against]:
    found = [gap(metric, benchmark.groups, first, second, seed=seed) for first, second in pairs]
    corrected = holm([p for _, p in found])
    return [Against(one, p, held, held <= LEVEL) for (one, p), held in zip(found, corrected, strict=True)]


def gap(metric: Metric, pictures: Sequence[str], first: Runs, second: Runs, *, seed: int) -> tuple[Interval, float]:
    """Difference of a metric between two methods with its interval, and its two-sided p-value by permuted pictures."""
    use = scored_rows(metric.name, first, second)
    groups = [group for group, chosen in zip(pictures, use, strict=True) if chosen]
    one, two = ([run[metric.name][use] for run in side] for side in (first, second))
    first_sums, _, _ = by_picture(one, groups, metric.statistic)
    second_sums, named, statistic = by_picture(two, groups, metric.statistic)
    found = difference_across(first_sums, second_sums, named, statistic, seed=seed).mean
    if metric.statistic is mean:
        # The same test as the permutation, on one sum per picture instead of all rows.
        return found, sign_flips_across(one, two, groups, seed=seed).p_value
    return found, permutation_across(first_sums, second_sums, named, statistic, seed=seed, flips=FLIPS).p_value


def by_picture(
    runs: Sequence[Float[np.ndarray, "row column"]], groups: Sequence[str], statistic: Statistic
) -> tuple[list[Values], list[str], Statistic]:
    """Sum the rows of each picture where the statistic is one of sums: hundreds of rows instead of thousands."""
    if not isinstance(statistic, SumStatistic):
        return list(runs), list(groups), statistic
    found = [summed(run, groups, statistic) for run in runs]
    return [sums for sums, _, _ in found], found[0][1], found[0][2]
