"""Paired comparisons against scipy, by hand, by their laws, and by how often they cry wolf."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given
from hypothesis import strategies as st

from steer_plugin.errors import InputError
from steer_plugin.evaluation.intervals import paired_difference
from steer_plugin.evaluation.paired import (
    EXACT_PAIRS,
    compare,
    comparison_table,
    holm,
    mcnemar,
    sign_flips,
)

KINDS = ("exact", "mid-p", "chi-square")
RANDOM = np.random.default_rng(3)
SOME = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=120)


def answers(b: int, c: int, both: int = 3) -> tuple[list[bool], list[bool]]:
    return [True] * b + [False] * c + [True] * both, [False] * b + [True] * c + [True] * both


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_scipys(b: int, c: int) -> None:
    first, second = answers(b, c)
    law = scipy.stats.binom(b + c, 0.5)
    exact = scipy.stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar(first, second, "exact").p_value == pytest.approx(exact, rel=1e-9)
    mid = min(1.0, 2 * law.cdf(min(b, c) - 1) + law.pmf(min(b, c))) if b + c else 1.0
    assert mcnemar(first, second, "mid-p").p_value == pytest.approx(mid, rel=1e-9)
    chi = scipy.stats.chi2(1).sf(max(0, abs(b - c) - 1) ** 2 / (b + c)) if b + c else 1.0
    assert mcnemar(first, second, "chi-square").p_value == pytest.approx(chi, rel=1e-9)


def test_mcnemar_by_hand() -> None:
    first, second = answers(1, 7)
    exact, mid, chi = (mcnemar(first, second, kind) for kind in KINDS)
    assert exact.p_value == 2 * (1 + 8) / 256
    assert mid.p_value == (2 * (1 + 8) - 8) / 256
    assert chi.p_value == pytest.approx(0.0771, abs=1e-4)  # (7 - 1 - 1)^2 / 8 = 3.125
    assert (exact.only_first, exact.only_second, exact.test) == (1, 7, "exact")


def test_auto_changes_hands_without_a_jump() -> None:
    few, many = mcnemar(*answers(80, EXACT_PAIRS - 80)), mcnemar(*answers(80, EXACT_PAIRS - 79))
    assert (few.test, many.test) == ("exact", "chi-square")
    exact = mcnemar(*answers(80, EXACT_PAIRS - 79), "exact")
    assert many.p_value == pytest.approx(exact.p_value, rel=0.03)


@given(SOME, st.sampled_from(KINDS))
def test_laws_of_mcnemar(pairs: list[tuple[bool, bool]], kind: str) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found, back = mcnemar(first, second, kind), mcnemar(second, first, kind)
    assert found.p_value == back.p_value and 0 < found.p_value <= 1
    assert (found.only_first, found.only_second) == (back.only_second, back.only_first)
    assert mcnemar(first, first, kind).p_value == 1.0
    # Questions on which both agree say nothing.
    assert mcnemar([*first, True, False], [*second, True, False], kind).p_value == found.p_value


@example(EXACT_PAIRS + 1, "auto")
@given(st.integers(0, 40), st.sampled_from([*KINDS, "auto"]))
def test_p_falls_as_the_disagreement_leans(n: int, kind: str) -> None:
    ps = [mcnemar(*answers(k, n - k), kind).p_value for k in range(n // 2 + 1)]
    assert all(low <= high for low, high in itertools.pairwise(ps))


@pytest.mark.parametrize("kind", [*KINDS, "auto"])
def test_p_is_never_zero(kind: str) -> None:
    assert 0 < mcnemar(*answers(5000, 0), kind).p_value < 1e-300


@given(SOME.filter(lambda pairs: sum(a != b for a, b in pairs) <= 14))
def test_flips_of_single_questions_are_mcnemars_exact_test(pairs: list[tuple[bool, bool]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    assert sign_flips(first, second, seed=0).p_value == pytest.approx(mcnemar(first, second, "exact").p_value)


def test_flips_by_hand_and_drawn() -> None:
    # Two pictures with D = 3 and 1: |+-3 +-1| >= 4 for two of four patterns.
    assert sign_flips([1, 1, 1, 1], [0, 0, 0, 0], ["a", "a", "a", "b"], seed=0).p_value == 0.5
    # D = 3 and -1: all four patterns reach 2.
    assert sign_flips([1, 1, 1, 0], [0, 0, 0, 1], ["a", "a", "a", "b"], seed=0).p_value == 1.0
    b, c = 30, 14
    drawn = sign_flips(*answers(b, c), seed=0, flips=40000)
    assert drawn.p_value == pytest.approx(mcnemar(*answers(b, c), "exact").p_value, abs=0.003)
    assert (drawn.only_first, drawn.only_second) == (b, c)
    everywhere = sign_flips(np.ones(50), np.zeros(50), seed=0, flips=99)
    assert everywhere.p_value == 0.01


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.integers(0, 30)), min_size=1, max_size=60),
    st.integers(0, 2**31),
)
def test_laws_of_flips(rows: list[tuple[float, float, int]], seed: int) -> None:
    first, second, groups = ([row[k] for row in rows] for k in range(3))
    p = sign_flips(first, second, groups, seed=seed, flips=99).p_value
    assert 0 < p <= 1
    assert sign_flips(second, first, groups, seed=seed, flips=99).p_value == pytest.approx(p)
    assert sign_flips(first, first, groups, seed=seed, flips=99).p_value == 1.0


def test_clusters_need_flips() -> None:
    """Where whole pictures go one way, McNemar cries wolf; flips of pictures keep their level."""
    random, wolf, flipped, trials = np.random.default_rng(5), 0, 0, 200
    groups = np.repeat(np.arange(40), 6)
    for trial in range(trials):
        lean = np.repeat(random.integers(0, 2, 40), 6)
        first = random.random(240) < np.where(lean, 0.9, 0.5)
        second = random.random(240) < np.where(lean, 0.5, 0.9)
        wolf += mcnemar(first, second).p_value <= 0.05
        flipped += sign_flips(first, second, groups.tolist(), seed=trial, flips=199).p_value <= 0.05
    assert wolf > 0.12 * trials
    assert flipped < 0.1 * trials


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.randoms())
def test_laws_of_holm(ps: list[float], random: object) -> None:
    adjusted, m = holm(ps), len(ps)
    for p, corrected in zip(ps, adjusted, strict=True):
        assert p <= corrected <= min(1.0, m * p)
    # The definition: step down, stop at the first that fails.
    for alpha in (0.01, 0.05, 0.2):
        order, rejected = sorted(range(m), key=lambda k: ps[k]), set()
        for rank, k in enumerate(order):
            if (m - rank) * ps[k] > alpha:
                break
            rejected.add(k)
        assert rejected == {k for k in range(m) if adjusted[k] <= alpha}
    back = holm(ps[::-1])[::-1]
    assert back == adjusted


def test_compare() -> None:
    base = RANDOM.random(300) < 0.7
    better = base | (RANDOM.random(300) < 0.4)
    noisy = np.where(RANDOM.random(300) < 0.05, ~base, base)
    rows = compare(base, {"better": better, "noisy": noisy, "same": base}, seed=0)
    assert [row.method for row in rows] == ["better", "noisy", "same"]
    assert [row.significant for row in rows] == [True, False, False]
    assert [row.p_holm for row in rows] == pytest.approx(holm([row.p_value for row in rows]))
    assert rows[0].difference == paired_difference(better, base, seed=0) and rows[0].difference.low > 0
    assert rows[0].p_value == mcnemar(better, base).p_value and rows[0].test == "exact"
    assert (rows[0].better, rows[0].worse) == (int((better & ~base).sum()), 0)
    assert (rows[2].p_value, rows[2].p_holm, rows[2].difference.value) == (1.0, 1.0, 0.0)
    # Several questions per picture, or scores that are no 0/1: sign flips.
    pictures = [k // 3 for k in range(300)]
    assert compare(base, {"better": better}, pictures, seed=0)[0].test == "sign flips"
    assert compare(base * 0.5, {"better": better}, seed=0)[0].test == "sign flips"
    assert compare(base, {"better": better}, list(range(300)), seed=0)[0].test == "exact"


def test_holm_costs_significance() -> None:
    one, two = answers(3, 14)
    alone = compare(one, {"m": two}, seed=0)
    among = compare(one, {"m": two, **{f"m{k}": two for k in range(4)}}, seed=0)
    assert alone[0].significant and not any(row.significant for row in among)
    assert among[0].p_holm == pytest.approx(5 * alone[0].p_value)


def test_table() -> None:
    table = comparison_table(compare([1, 0, 1, 1], {"m": [1, 1, 1, 1]}, seed=0))
    assert [cell.strip() for cell in table.splitlines()[2].split("|")[1:-1]] == [
        "m", "25.0 [0.0, 75.0]", "1 : 0", "1", "1", "no", "exact",
    ]  # fmt: skip
    with pytest.raises(InputError, match="at least one"):
        comparison_table([])


def test_bad_input() -> None:
    for call, message in (
        (lambda: mcnemar([1, 0], [1]), "second has 1 scores against 2"),
        (lambda: mcnemar([1, 0.5], [1, 0]), "first holds 0.5"),
        (lambda: mcnemar([1, float("nan")], [1, 0]), "finite: False"),
        (lambda: sign_flips([1], [0], seed=0, flips=0), "flips is 0"),
        (lambda: sign_flips([1, 0], [0, 0], ["a"], seed=0), "1 groups for 2 rows"),
        (lambda: holm([0.1, 1.5]), "1.5 is no p-value"),
        (lambda: holm([float("nan")]), "nan is no p-value"),
        (lambda: compare([1, 0], {}, seed=0), "no method"),
        (lambda: compare([1, 0], {"L2S": [1]}, seed=0), "L2S has 1 scores against 2"),
        (lambda: compare([1, 0], {"L2S": [1, 0]}, ["a"], seed=0), "1 groups for 2 rows"),
    ):
        with pytest.raises(InputError, match=message):
            call()
