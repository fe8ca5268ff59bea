"""Intervals against scipy, against a plain loop, and by their coverage."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from steer_plugin.errors import InputError
from steer_plugin.evaluation import intervals
from steer_plugin.evaluation.intervals import (
    Interval,
    bootstrap_interval,
    f1,
    mean,
    paired_difference,
    ratio,
    summed,
)

RANDOM = np.random.default_rng(8)
CORRECT = RANDOM.random(400) < 0.8


def test_unclustered_mean_agrees_with_scipy() -> None:
    found = bootstrap_interval(CORRECT, seed=1, resamples=20000)
    expected = scipy.stats.bootstrap(
        (CORRECT.astype(float),), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert found.value == CORRECT.mean()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.003)
    wilson = scipy.stats.binomtest(int(CORRECT.sum()), len(CORRECT)).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high), abs=0.01)


def test_clusters_agree_with_a_bootstrap_of_the_clusters_by_scipy() -> None:
    groups = np.repeat(np.arange(50), 6)
    values = (RANDOM.random((50, 1)) + 0.3 * RANDOM.random((50, 6))).ravel()
    found = bootstrap_interval(values, groups.tolist(), seed=3, resamples=20000)
    expected = scipy.stats.bootstrap(
        (values.reshape(50, 6).mean(axis=1),),
        np.mean,
        n_resamples=20000,
        method="percentile",
        rng=np.random.default_rng(4),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.006)


def test_clusters_widen_and_their_names_do_not_matter() -> None:
    values, pictures = np.repeat(CORRECT[:100], 6), [f"p{k // 6}" for k in range(600)]
    alone, clustered = bootstrap_interval(values, seed=5), bootstrap_interval(values, pictures, seed=5)
    assert clustered.high - clustered.low > 2 * (alone.high - alone.low)
    numbered = bootstrap_interval(values, [k // 6 for k in range(600)], seed=5)
    assert numbered == clustered
    # Six equal copies of a row in one cluster are one row.
    once = bootstrap_interval(CORRECT[:100], seed=5)
    assert (clustered.low, clustered.high) == pytest.approx((once.low, once.high))


def test_weights_are_a_plain_resampling() -> None:
    """The weighted statistics agree with repeating the rows, for every statistic."""
    table = RANDOM.integers(0, 2, (30, 2)).astype(float)
    times = RANDOM.integers(0, 4, (5, 30))
    for drawn, weighted in zip(times, f1(table, times.astype(float)), strict=True):
        repeated = np.repeat(table, drawn, axis=0).astype(bool)
        assert weighted == pytest.approx(f1_score(repeated[:, 1], repeated[:, 0], zero_division=0))
    for drawn, average, share in zip(times, mean(table[:, :1], times * 1.0), ratio(table, times * 1.0), strict=True):
        repeated = np.repeat(table, drawn, axis=0)
        assert average == pytest.approx(repeated[:, 0].mean())
        assert share == pytest.approx(repeated[:, 0].sum() / repeated[:, 1].sum())
    assert ratio(np.zeros((3, 2)), np.ones((1, 3))).tolist() == [0.0]


def test_f1_interval() -> None:
    labels = np.arange(200) % 2 == 0
    said = np.where(RANDOM.random(200) < 0.85, labels, ~labels)
    found = bootstrap_interval(np.stack([said, labels], axis=1), statistic=f1, seed=0)
    assert found.value == pytest.approx(f1_score(labels, said))
    assert found.low < found.value < found.high


def test_seeds_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    first = bootstrap_interval(CORRECT, seed=0, resamples=600)
    assert bootstrap_interval(CORRECT, seed=0, resamples=600) == first
    assert bootstrap_interval(CORRECT, seed=1, resamples=600) != first
    monkeypatch.setattr(intervals, "_BLOCK", 7)
    assert bootstrap_interval(CORRECT, seed=0, resamples=600) == first


def test_paired_difference() -> None:
    pictures = [k // 4 for k in range(400)]
    better = CORRECT | (RANDOM.random(400) < 0.3)
    found = paired_difference(better, CORRECT, pictures, seed=0)
    assert found.value == pytest.approx(better.mean() - CORRECT.mean()) and 0 < found.low < found.value < found.high
    back = paired_difference(CORRECT, better, pictures, seed=0)
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low))
    same = paired_difference(CORRECT, CORRECT, pictures, seed=0)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    # Pairing removes what the questions have in common.
    one, two = bootstrap_interval(better, pictures, seed=0), bootstrap_interval(CORRECT, pictures, seed=0)
    assert found.high - found.low < (one.high - one.low) + (two.high - two.low)
    # For the mean, it is the interval of the differences.
    rows = bootstrap_interval(better.astype(float) - CORRECT, pictures, seed=0)
    assert (rows.low, rows.high) == pytest.approx((found.low, found.high))


def test_coverage() -> None:
    """Of 95 % intervals for clustered answers, about 95 % hold the truth; unclustered ones do not."""
    random, held, held_alone = np.random.default_rng(11), 0, 0
    groups = np.repeat(np.arange(60), 5)
    for trial in range(200):
        share = random.choice([0.5, 0.9], 60)  # easy and hard pictures, 0.7 on average
        values = random.random(300) < np.repeat(share, 5)
        found = bootstrap_interval(values, groups.tolist(), seed=trial, resamples=400)
        alone = bootstrap_interval(values, seed=trial, resamples=400)
        held += found.low <= 0.7 <= found.high
        held_alone += alone.low <= 0.7 <= alone.high
    assert 180 <= held <= 199
    assert held_alone < held


@given(st.lists(st.booleans(), min_size=2, max_size=40), st.integers(0, 2**32), st.floats(0.01, 0.99))
def test_intervals_stay_in_range_and_nest(values: list[bool], seed: int, level: float) -> None:
    found = bootstrap_interval(values, seed=seed, resamples=50, level=level)
    wider = bootstrap_interval(values, seed=seed, resamples=50, level=(1 + level) / 2)
    assert 0 <= wider.low <= found.low <= found.high <= wider.high <= 1
    if len(set(values)) == 1:
        assert found == Interval(float(values[0]), float(values[0]), float(values[0]), level)


def test_bad_input() -> None:
    for call, message in (
        (lambda: bootstrap_interval([], seed=0), "expected one finite row"),
        (lambda: bootstrap_interval([1.0, float("nan")], seed=0), "finite: False"),
        (lambda: bootstrap_interval([1, 0], ["a", "a"], seed=0), "All 2 rows belong to one group"),
        (lambda: bootstrap_interval([1, 0], ["a"], seed=0), "1 groups for 2 rows"),
        (lambda: bootstrap_interval([1, 0], seed=0, level=95.0), "level is 95"),
        (lambda: bootstrap_interval([1, 0], seed=0, resamples=0), "resamples is 0"),
        (lambda: paired_difference([1, 0], [1], seed=0), "same questions in both"),
        (lambda: paired_difference([1, 0], [1, 0], seed=0, level=1.0), "level is 1.0"),
    ):
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize("name", ["mean", "ratio", "f1"])
@given(st.integers(0, 2**32 - 1), st.integers(2, 9))
def test_rows_summed_by_picture_give_the_same_figure_and_interval(name: str, seed: int, pictures: int):
    statistic = {"mean": mean, "ratio": ratio, "f1": f1}[name]
    random = np.random.default_rng(seed)
    groups = [f"p{one}" for one in random.permutation(np.repeat(np.arange(pictures), 3))]
    values = random.integers(0, 2, (len(groups), 1 if name == "mean" else 2)).astype(float)
    sums, named, of_sums = summed(values, groups, statistic)
    assert named == list(dict.fromkeys(groups)) and len(sums) == pictures
    rows = bootstrap_interval(values, groups, statistic, seed=1, resamples=50)
    short = bootstrap_interval(sums, named, of_sums, seed=1, resamples=50)
    assert (short.value, short.low, short.high) == pytest.approx((rows.value, rows.low, rows.high), abs=1e-12)
