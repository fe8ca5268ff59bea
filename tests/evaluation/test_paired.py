"""Sign flips and Holm's correction against scipy, by hand, by their laws, and by how often they cry wolf."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from steer_plugin.errors import InputError
from steer_plugin.evaluation.paired import COUNTED_PICTURES, holm, sign_flips

SOME = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=120)


def answers(b: int, c: int, both: int = 3) -> tuple[list[bool], list[bool]]:
    return [True] * b + [False] * c + [True] * both, [False] * b + [True] * c + [True] * both


def mcnemars(b: int, c: int) -> float:
    """McNemar's exact test of b questions against c, by scipy."""
    return scipy.stats.binomtest(b, b + c).pvalue if b + c else 1.0


@given(SOME.filter(lambda pairs: sum(a != b for a, b in pairs) <= 14))
def test_flips_of_single_questions_are_mcnemars_exact_test(pairs: list[tuple[bool, bool]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found = sign_flips(first, second, seed=0)
    b, c = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    assert (found.only_first, found.only_second) == (b, c)
    assert found.p_value == pytest.approx(mcnemars(b, c), rel=1e-9)
    # Questions on which both agree say nothing.
    assert sign_flips([*first, True, False], [*second, True, False], seed=0).p_value == found.p_value


def test_mcnemar_by_hand() -> None:
    found = sign_flips(*answers(1, 7), seed=0)
    assert found.p_value == 2 * (1 + 8) / 256
    assert (found.only_first, found.only_second) == (1, 7)
    assert sign_flips([True] * 5, [False] * 5, seed=0).p_value == 2 / 32


def test_p_falls_as_the_disagreement_leans() -> None:
    for n in (9, COUNTED_PICTURES, COUNTED_PICTURES + 10):
        ps = [sign_flips(*answers(k, n - k), seed=0, flips=999).p_value for k in range(n // 2 + 1)]
        assert all(low <= high for low, high in itertools.pairwise(ps))
        assert ps[0] < 0.01 and ps[-1] > 0.6


def test_counting_gives_way_to_drawing_without_a_jump() -> None:
    counted = sign_flips(*answers(4, COUNTED_PICTURES - 4), seed=0)
    drawn = sign_flips(*answers(4, COUNTED_PICTURES - 3), seed=0, flips=40000)
    assert counted.p_value == pytest.approx(mcnemars(4, COUNTED_PICTURES - 4), rel=1e-9)
    assert drawn.p_value == pytest.approx(mcnemars(4, COUNTED_PICTURES - 3), abs=0.005)


def test_flips_by_hand_and_drawn() -> None:
    # Two pictures with D = 3 and 1: |+-3 +-1| >= 4 for two of four patterns.
    assert sign_flips([1, 1, 1, 1], [0, 0, 0, 0], ["a", "a", "a", "b"], seed=0).p_value == 0.5
    # D = 3 and -1: all four patterns reach 2.
    assert sign_flips([1, 1, 1, 0], [0, 0, 0, 1], ["a", "a", "a", "b"], seed=0).p_value == 1.0
    b, c = 30, 14
    drawn = sign_flips(*answers(b, c), seed=0, flips=40000)
    assert drawn.p_value == pytest.approx(mcnemars(b, c), abs=0.003)
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
        wolf += mcnemars(int((first & ~second).sum()), int((second & ~first).sum())) <= 0.05
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


def test_bad_input() -> None:
    for call, message in (
        (lambda: sign_flips([1, 0], [1], seed=0), "second has 1 scores against 2"),
        (lambda: sign_flips([1, float("nan")], [1, 0], seed=0), "finite: False"),
        (lambda: sign_flips([1], [0], seed=0, flips=0), "flips is 0"),
        (lambda: sign_flips([1, 0], [0, 0], ["a"], seed=0), "1 groups for 2 rows"),
        (lambda: holm([0.1, 1.5]), "1.5 is no p-value"),
        (lambda: holm([float("nan")]), "nan is no p-value"),
    ):
        with pytest.raises(InputError, match=message):
            call()
