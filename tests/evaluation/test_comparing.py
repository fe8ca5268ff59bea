"""Methods against unsteered on scores by hand: differences, McNemar's test by scipy, what Holm's correction costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import scipy.stats
from numpy.typing import ArrayLike, NDArray

from steer_plugin.evaluation.benchmark import Benchmark, Metric, Texts, Verdicts, column
from steer_plugin.evaluation.comparing import Against, against_all
from steer_plugin.evaluation.intervals import paired_difference
from steer_plugin.evaluation.paired import holm

RANDOM = np.random.default_rng(3)


class Scored(Benchmark):
    """One metric on so many pictures."""

    name, headline = "scored", "right"

    def __init__(self, groups: Sequence[str]) -> None:
        self.groups, self.metrics = groups, [Metric("right")]

    def values(self, texts: Texts, verdicts: Verdicts) -> dict[str, NDArray[np.float64]]:
        raise NotImplementedError


def compared(
    base: ArrayLike, others: Mapping[str, ArrayLike], groups: Sequence[str] | None = None
) -> dict[str, Against]:
    rows = {name: np.asarray(scores, dtype=np.float64) for name, scores in {"none": base, **others}.items()}
    runs = {name: [{"right": column(scores.tolist())}] for name, scores in rows.items()}
    count = len(runs["none"][0]["right"])
    against, over = against_all(Scored(groups or [str(k) for k in range(count)]), runs, {}, seed=0)
    assert not over
    return {name: found["right"] for name, found in against.items()}


def mcnemars(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    only = int((first & ~second).sum()), int((second & ~first).sum())
    return scipy.stats.binomtest(only[0], sum(only)).pvalue if sum(only) else 1.0


def test_methods_on_pictures_of_their_own() -> None:
    base = RANDOM.random(300) < 0.7
    better = base | (RANDOM.random(300) < 0.4)
    noisy = np.where(RANDOM.random(300) < 0.05, ~base, base)
    rows = compared(base, {"better": better, "noisy": noisy, "same": base})
    assert list(rows) == ["better", "noisy", "same"]
    assert [row.significant for row in rows.values()] == [True, False, False]
    assert [row.p_holm for row in rows.values()] == pytest.approx(holm([row.p_value for row in rows.values()]))
    gap, expected = rows["better"].difference, paired_difference(better, base, seed=0)
    assert (gap.value, gap.low, gap.high) == pytest.approx((expected.value, expected.low, expected.high))
    assert gap.low > 0
    assert rows["better"].p_value == pytest.approx(mcnemars(better, base), abs=2e-4)
    assert rows["noisy"].p_value == pytest.approx(mcnemars(noisy, base), abs=0.02)
    assert (rows["same"].p_value, rows["same"].p_holm, rows["same"].difference.value) == (1.0, 1.0, 0.0)


def test_pictures_with_several_questions_are_swapped_whole_and_scores_may_be_any_number() -> None:
    # Differences by picture 3 and 1: |+-3 +-1| >= 4 for two of four patterns.
    four = compared([0, 0, 0, 0], {"m": [1, 1, 1, 1]}, ["a", "a", "a", "b"])["m"]
    assert (four.p_value, four.difference.value) == (0.5, 1.0)
    half = compared([0, 0, 0, 0], {"m": [0.5, 0.5, 0.5, 0.5]}, ["a", "a", "a", "b"])["m"]
    assert (half.p_value, half.difference.value) == (0.5, 0.5)


def test_holm_costs_significance() -> None:
    one = np.array([True] * 3 + [False] * 14 + [True] * 3)
    two = np.array([False] * 3 + [True] * 14 + [True] * 3)
    alone = compared(one, {"m": two})["m"]
    among = compared(one, {"m": two, **{f"m{k}": two for k in range(4)}})
    assert alone.significant and not any(row.significant for row in among.values())
    assert among["m"].p_holm == pytest.approx(5 * alone.p_value)
    assert alone.p_value == pytest.approx(mcnemars(one, two), abs=0.004)


def test_by_hand() -> None:
    row = compared([1, 0, 1, 1], {"m": [1, 1, 1, 1]})["m"]
    assert (row.difference.value, row.difference.low, row.difference.high) == (0.25, 0.0, 0.75)
    assert (row.p_value, row.p_holm, row.significant) == (1, 1, False)


def test_nothing_beside_unsteered() -> None:
    assert compared([1, 0], {}) == {}
