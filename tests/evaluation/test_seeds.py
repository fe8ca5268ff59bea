"""Several seeds: against formulas spelled out, brute force over all swaps, and how often the test cries wolf."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from steer_plugin.errors import InputError
from steer_plugin.evaluation.intervals import Statistic, bootstrap_interval, f1, mean, paired_difference, ratio
from steer_plugin.evaluation.paired import sign_flips
from steer_plugin.evaluation.seeds import (
    across,
    difference_across,
    permutation,
    permutation_across,
    sign_flips_across,
)

RANDOM = np.random.default_rng(3)
Table = NDArray[np.float64]
STATISTICS: dict[str, Statistic] = {"mean": mean, "ratio": ratio, "f1": f1}


def drawn(statistic: str, rows: int, seed: int = 0) -> Table:
    random = np.random.default_rng(seed)
    if statistic == "mean":
        return random.normal(size=(rows, 1))
    if statistic == "ratio":
        said = random.integers(1, 5, rows)
        return np.stack([random.integers(0, said + 1), said], 1).astype(float)
    return random.integers(0, 2, (rows, 2)).astype(float)


def by_hand(name: str, table: Table) -> float:
    """The statistic in plain words."""
    if name == "mean":
        return float(table[:, 0].mean())
    if name == "ratio":
        return float(table[:, 0].sum() / table[:, 1].sum())
    hits = float(((table == 1).all(1)).sum())
    return 2 * hits / float(table.sum()) if table.any() else 0.0


def test_means_over_seeds_and_pictures() -> None:
    pictures = [k // 4 for k in range(200)]
    base = RANDOM.random(200)
    runs = [base + shift + RANDOM.normal(0, 0.05, 200) for shift in (-0.2, 0.0, 0.1, 0.2)]
    found = across(runs, pictures, seed=0)
    means = [run.mean() for run in runs]
    assert found.mean.value == pytest.approx(np.mean(means)) and found.means == pytest.approx(means)
    assert found.spread == pytest.approx(np.std(means, ddof=1))
    assert found == across(runs, pictures, seed=0)
    # It holds both sources: wider than questions alone, and its variance is about the sum of the two.
    alone = bootstrap_interval(np.mean(runs, axis=0), pictures, seed=0)
    assert found.mean.high - found.mean.low > 1.3 * (alone.high - alone.low)
    by_runs = np.var(means) / len(means)
    by_pictures = ((alone.high - alone.low) / 3.92) ** 2
    assert ((found.mean.high - found.mean.low) / 3.92) ** 2 == pytest.approx(by_runs + by_pictures, rel=0.25)


@pytest.mark.parametrize("name", list(STATISTICS))
def test_any_statistic_resampled_by_hand(name: str) -> None:
    """Drawing seeds and pictures as lists, and computing the statistic on what was drawn, gives the same interval."""
    runs = [drawn(name, 120, seed) for seed in range(5)]
    if name == "mean":
        runs = [run + 0.3 * number for number, run in enumerate(runs)]
    pictures = np.repeat(np.arange(40), 3)
    found = across(runs, pictures.tolist(), STATISTICS[name], seed=1, resamples=4000)
    assert found.means == pytest.approx([by_hand(name, run) for run in runs])
    assert found.mean.value == pytest.approx(np.mean(found.means))
    assert found.spread == pytest.approx(np.std(found.means, ddof=1))
    random, values = np.random.default_rng(7), list[float]()
    for _ in range(2000):
        rows = np.concatenate([np.flatnonzero(pictures == p) for p in random.integers(0, 40, 40)])
        values.append(float(np.mean([by_hand(name, runs[s][rows]) for s in random.integers(0, 5, 5)])))
    low, high = np.quantile(values, [0.025, 0.975])
    width = high - low
    assert (found.mean.low, found.mean.high) == pytest.approx((low, high), abs=0.1 * width)


@pytest.mark.parametrize("name", list(STATISTICS))
def test_one_run_is_the_plain_bootstrap(name: str) -> None:
    run, pictures = drawn(name, 60), [k // 2 for k in range(60)]
    found = across([run], pictures, STATISTICS[name], seed=4)
    assert found.spread is None and found.means == pytest.approx((by_hand(name, run),))
    assert found.mean == bootstrap_interval(run, pictures, STATISTICS[name], seed=4)
    # And so are equal runs, which do differ by nothing.
    equal = across([run, run, run], pictures, STATISTICS[name], seed=4)
    assert equal.spread == pytest.approx(0, abs=1e-12)
    assert (equal.mean.low, equal.mean.high) == pytest.approx((found.mean.low, found.mean.high))


@pytest.mark.parametrize("name", list(STATISTICS))
def test_differences(name: str) -> None:
    statistic = STATISTICS[name]
    one, two = [drawn(name, 80, k) for k in range(3)], [drawn(name, 80, 10 + k) for k in range(3)]
    found = difference_across(one, two, None, statistic, seed=0)
    gaps = [by_hand(name, a) - by_hand(name, b) for a, b in zip(one, two, strict=True)]
    assert found.means == pytest.approx(gaps) and found.mean.value == pytest.approx(np.mean(gaps))
    # A method without seeds is held against each run of the other, whichever side it is on.
    alone = difference_across(one, two[:1], None, statistic, seed=0)
    assert alone.means == pytest.approx([by_hand(name, run) - by_hand(name, two[0]) for run in one])
    back = difference_across(two[:1], one, None, statistic, seed=0)
    assert (back.mean.low, back.mean.high) == pytest.approx((-alone.mean.high, -alone.mean.low))
    single = difference_across(one[:1], two[:1], None, statistic, seed=0)
    assert single.mean == paired_difference(one[0], two[0], None, statistic, seed=0) and single.spread is None


def brute(name: str, first: list[Table], second: list[Table], groups: list[int]) -> tuple[float, float]:
    """T and the p-value of every way to swap, spelled out."""
    members, found = np.array(groups), list[float]()
    pictures = sorted(set(groups))
    for swaps in itertools.product([False, True], repeat=len(pictures)):
        turned = np.isin(members, [p for p, s in zip(pictures, swaps, strict=True) if s])[:, None]
        sides = [
            by_hand(name, np.where(turned, b, a)) - by_hand(name, np.where(turned, a, b))
            for a, b in zip(first, second, strict=True)
        ]
        found.append(float(np.mean(sides)))
    return found[0], float(np.mean(np.abs(found) >= abs(found[0]) - 1e-9))


@pytest.mark.parametrize("name", list(STATISTICS))
@pytest.mark.parametrize("seeds", [1, 3])
def test_permutation_is_brute_force(name: str, seeds: int) -> None:
    groups = [k % 8 for k in range(20)]
    for trial in range(6):
        one, two = ([drawn(name, 20, 100 * trial + 10 * side + k) for k in range(seeds)] for side in (0, 1))
        two = [np.where((np.array(groups) < 2)[:, None], a, b) for a, b in zip(one, two, strict=True)]
        found = permutation_across(one, two, groups, STATISTICS[name], seed=0)
        difference, p = brute(name, one, two, groups)
        assert found.difference == pytest.approx(difference) and found.p_value == pytest.approx(p)
        # Pictures on which both agree in every run change nothing and are not counted.
        assert found.exact and found.pictures <= 6
        if seeds == 1:
            assert permutation(one[0], two[0], groups, STATISTICS[name], seed=0) == found


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.integers(0, 6)), min_size=2, max_size=40),
    st.integers(0, 2**31),
)
def test_for_means_swaps_are_sign_flips(rows: list[tuple[float, float, int]], seed: int) -> None:
    first, second, groups = ([row[k] for row in rows] for k in range(3))
    flipped, found = (
        sign_flips(first, second, groups, seed=seed),
        permutation(first, second, groups, seed=seed, flips=200),
    )
    assert found.p_value == pytest.approx(flipped.p_value)
    assert permutation(second, first, groups, seed=seed).p_value == pytest.approx(found.p_value)
    assert permutation(first, first, groups, seed=seed).p_value == 1.0
    assert sign_flips_across([first], [second], groups, seed=seed) == flipped


def test_flips_over_seeds_use_the_mean_of_the_runs() -> None:
    one, two = [RANDOM.normal(size=30) for _ in range(4)], [RANDOM.normal(0.3, size=30) for _ in range(4)]
    found = sign_flips_across(one, two, seed=0)
    assert found == sign_flips(np.mean(one, axis=0), np.mean(two, axis=0), seed=0)
    assert permutation_across(one, two, seed=0, flips=40000).p_value == pytest.approx(found.p_value, abs=0.012)
    assert sign_flips_across(one, two[:1], seed=0).p_value == sign_flips(np.mean(one, axis=0), two[0], seed=0).p_value


def test_drawn_swaps_come_near_all_of_them_and_never_give_zero() -> None:
    one, two = drawn("ratio", 15, 1), drawn("ratio", 15, 2)
    two[14] = one[14]
    exact = permutation(one, two, None, ratio, seed=0)
    assert exact.exact and exact.pictures == 14
    # The same pictures twice are twice as many, and must be drawn.
    double, other = np.concatenate([one, one]), np.concatenate([two, two])
    many = permutation(double, other, None, ratio, seed=0, flips=20000)
    assert not many.exact and many.pictures == 28
    scipys = scipy.stats.permutation_test(
        (np.arange(28), np.arange(28) + 28),
        lambda a, b: _ratio_of(double, other, a) - _ratio_of(double, other, b),
        permutation_type="samples", n_resamples=5000, rng=np.random.default_rng(0), vectorized=False,
    )  # fmt: skip
    assert many.p_value == pytest.approx(scipys.pvalue, abs=0.03)
    certain = permutation(np.ones(50), np.zeros(50), seed=0, flips=99)
    assert certain.p_value == 0.01


def _ratio_of(double: Table, other: Table, chosen: NDArray[np.int64]) -> float:
    """Ratio over the 28 pictures that differ, numbered 0-27 for the first method and 28-55 for the second."""
    unlike = np.flatnonzero((double != other).any(1))
    return by_hand("ratio", np.concatenate([double[unlike], other[unlike]])[chosen.astype(int)])


def test_permutation_keeps_its_level_for_a_ratio() -> None:
    """Two methods with one law, several answers to a picture that err together: 5 % of the tests reject."""
    random, rejected, trials = np.random.default_rng(11), 0, 300
    groups = np.repeat(np.arange(30), 3)
    for trial in range(trials):
        share = np.repeat(random.beta(1, 2, (2, 30)), 3, axis=1)
        said = random.integers(1, 6, (2, 90))
        wrong = random.binomial(said, share)
        one, two = (np.stack([wrong[k], said[k]], 1) for k in (0, 1))
        rejected += permutation(one, two, groups.tolist(), ratio, seed=trial, flips=199).p_value <= 0.05
    assert 0.02 * trials < rejected < 0.09 * trials


def test_bad_input() -> None:
    nan = [1, float("nan")]
    for call, message in (
        (lambda: across([], seed=0), "Got no runs"),
        (lambda: across([[1, 0], [1]], seed=0), r"run 1 has shape \(1,\), run 0 has \(2,\)"),
        (lambda: across([[1, 0], nan], seed=0), "run 1 has shape .* finite: False"),
        (lambda: across([np.zeros((2, 2, 2))], seed=0), r"run 0 has shape \(2, 2, 2\).*into a list"),
        (lambda: across([[1, 0], [1, 1]], ["a"], seed=0), "1 groups for 2 rows"),
        (lambda: across([[1, 0], [1, 1]], ["a", "a"], seed=0), "at least two pictures"),
        (lambda: difference_across([[1, 0]] * 2, [[1, 0]] * 3, seed=0), "2 runs of the first method and 3 of"),
        (lambda: difference_across([[1, 0]], [[1, 0, 1]], seed=0), "expected the same questions"),
        (lambda: sign_flips_across([[[1, 0]]], [[[1, 0]]], seed=0), "2 columns.*permutation_across"),
        (lambda: permutation([1, 0], [0, 0], seed=0, flips=0), "flips is 0"),
        (lambda: permutation([1, 0], [0, 0], ["a"], seed=0), "1 groups for 2 rows"),
        (lambda: permutation([1, 0], nan, seed=0), "second, run 0 has shape"),
    ):
        with pytest.raises(InputError, match=message):
            call()
