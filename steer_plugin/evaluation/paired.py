"""Comparing methods on the same questions: McNemar's test, sign flips of whole pictures, Holm's correction.

    b, c         questions that only the first, only the second method got right;  n = b + c,  X binomial (n, 1/2)
    exact        p = min(1, 2 P(X <= min(b, c)))
    mid-p        p = 2 P(X <= min(b, c)) - P(X = min(b, c)),  1 when b = c
    chi-square   p = P(chi2_1 >= x),  x = max(0, |b - c| - 1)^2 / n                      (Edwards 1948)
    sign flips   p = P(|sum_g s_g D_g| >= |sum_g D_g|),  s_g = +-1,  D_g the summed difference on picture g
    Holm         adjusted p_(i) = max over j <= i of min(1, (m - j + 1) p_(j)), p sorted upwards     (Holm 1979)

McNemar takes questions for independent. With several per picture whole pictures are flipped instead; with one per
picture and 0/1 scores, that is McNemar's exact test.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

from steer_plugin.errors import InputError
from steer_plugin.evaluation.intervals import (
    Interval,
    mcnemar_exact,
    paired_difference,
)
from steer_plugin.evaluation.table import Cell, markdown_table

Groups: TypeAlias = "Sequence[str] | Sequence[int] | None"
Kind: TypeAlias = Literal["auto", "exact", "mid-p", "chi-square"]

# Up to here McNemar's test is exact; above it, chi-square with continuity follows the exact p closely.
EXACT_PAIRS = 200
# Up to so many pictures that differ, every pattern of signs is counted; above, patterns are drawn.
COUNTED_PICTURES = 14
_BLOCK = 256


@dataclass(frozen=True)
class PairedTest:
    """A two-sided p-value in (0, 1], the test that gave it, and on how many questions each side scored higher."""

    test: str
    only_first: int
    only_second: int
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """One method against the baseline, both on the same questions.

    Attributes:
        difference: mean of the method minus mean of the baseline, bootstrapped over pictures.
        test: "exact", "chi-square" (both McNemar) or "sign flips".
        better, worse: questions on which the method scored higher, and lower, than the baseline.
        p_holm: the p-value corrected for the number of methods compared.
        significant: whether p_holm is at most 1 - level.
    """

    method: str
    difference: Interval
    test: str
    better: int
    worse: int
    p_value: float
    p_holm: float
    significant: bool


def mcnemar(first: ArrayLike, second: ArrayLike, kind: Kind = "auto") -> PairedTest:
    """Test whether two methods are right equally often on the same questions, two-sided.

    `first` and `second` hold 0/1 for each question. "auto" is exact up to 200 discordant questions and chi-square with
    continuity above. Raises InputError for unequal shapes or scores other than 0 and 1.
    """
    one, two = _scores(first, "first"), _scores(second, "second")
    for side, scores in (("first", one), ("second", two)):
        if not _binary(scores):
            odd = scores[(scores != 0) & (scores != 1)][0]
            raise InputError(f"{side} holds {odd}: McNemar's test takes 0 or 1 (right or wrong); use sign_flips.")
    _same_questions(one, two, "second")
    exact = mcnemar_exact((one == 1).tolist(), (two == 1).tolist())
    b, c = exact.only_first, exact.only_second
    if kind == "auto":
        kind = "exact" if b + c <= EXACT_PAIRS else "chi-square"
    p = {"exact": lambda: exact.p_value, "mid-p": lambda: _mid_p(b, c), "chi-square": lambda: _chi_square(b, c)}[kind]()
    return PairedTest(kind, b, c, _positive(p))


def sign_flips(
    first: ArrayLike, second: ArrayLike, groups: Groups = None, *, seed: int, flips: int = 9999
) -> PairedTest:
    """Test whether two methods score equally, by flipping the sign of each picture's summed difference.

    All patterns of signs are counted when at most 14 pictures differ, else `flips` are drawn and the observed one is
    added, so that p is never 0 (Phipson and Smyth 2010). Raises InputError for unequal shapes or no flips.
    """
    one, two = _scores(first, "first"), _scores(second, "second")
    _same_questions(one, two, "second")
    if flips < 1:
        raise InputError(f"flips is {flips}: expected at least 1, 9999 for p-values down to 0.0001.")
    by_row = one - two
    sums = _sums(by_row, groups)
    sums = sums[sums != 0]
    # Sums of the same differences in another order differ in their last bits.
    least = abs(float(sums.sum())) - 1e-9 * float(np.abs(sums).sum())
    if len(sums) <= COUNTED_PICTURES:
        patterns = (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1
        p = float((np.abs((1 - 2 * patterns) @ sums) >= least).mean())
    else:
        p = (1 + _as_far(sums, least, seed, flips)) / (1 + flips)
    return PairedTest("sign flips", int((by_row > 0).sum()), int((by_row < 0).sum()), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number, in the order given; raises InputError for one outside [0, 1]."""
    for p in p_values:
        if not 0 <= p <= 1:
            raise InputError(f"{p} is no p-value: expected numbers between 0 and 1.")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, where in enumerate(sorted(range(len(p_values)), key=lambda k: p_values[k])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[where]))
        adjusted[where] = highest
    return adjusted


def compare(
    baseline: ArrayLike,
    others: Mapping[str, ArrayLike],
    groups: Groups = None,
    *,
    seed: int,
    resamples: int = 2000,
    flips: int = 9999,
    level: float = 0.95,
) -> list[Comparison]:
    """Compare each method with the baseline on the same questions, in the order given.

    Scores are (question,), 0/1 or any numbers; `groups` names the picture of each question. The test is McNemar's for
    0/1 scores with every question on a picture of its own, else sign flips of pictures. Raises InputError for no
    methods, unequal questions, or what `paired_difference` refuses.
    """
    if not others:
        raise InputError("Got no method to compare with the baseline: expected {name: scores} with at least one.")
    base = _scores(baseline, "baseline")
    alone = groups is None or len(set(groups)) == len(groups)
    found: list[tuple[str, Interval, PairedTest]] = []
    for name, given in others.items():
        scores = _scores(given, name)
        _same_questions(base, scores, name)
        difference = paired_difference(scores, base, groups, seed=seed, resamples=resamples, level=level)
        plain = alone and _binary(base) and _binary(scores)
        test = mcnemar(scores, base) if plain else sign_flips(scores, base, groups, seed=seed, flips=flips)
        found.append((name, difference, test))
    corrected = holm([test.p_value for _, _, test in found])
    return [
        Comparison(
            name, difference, test.test, test.only_first, test.only_second, test.p_value, p, p <= 1 - level + 1e-12
        )
        for (name, difference, test), p in zip(found, corrected, strict=True)
    ]


def comparison_table(rows: Sequence[Comparison], digits: int = 1, scale: float = 100.0) -> str:
    """Comparisons as Markdown; differences times `scale` (100: percentage points). Raises InputError without rows."""
    cells: dict[str, dict[str, Cell]] = {
        row.method: {
            "difference": row.difference,
            "better : worse": f"{row.better} : {row.worse}",
            "p": f"{row.p_value:.2g}",
            "p (Holm)": f"{row.p_holm:.2g}",
            "significant": "yes" if row.significant else "no",
            "test": row.test,
        }
        for row in rows
    }
    return markdown_table(cells, digits=digits, scale=scale)


def _mid_p(b: int, c: int) -> float:
    if b == c:
        return 1.0
    few, n = min(b, c), b + c
    tail = sum(math.comb(n, k) for k in range(few + 1))
    # Twice the tail less the last term, in whole numbers: Python divides those rightly at any size.
    return (2 * tail - math.comb(n, few)) / 2**n


def _chi_square(b: int, c: int) -> float:
    if b == c:
        return 1.0
    # A chi-square of one degree of freedom is the square of a normal: P(>= x) = erfc(sqrt(x / 2)).
    return math.erfc(max(0, abs(b - c) - 1) / math.sqrt(2 * (b + c)))


def _as_far(sums: Float[np.ndarray, " picture"], least: float, seed: int, flips: int) -> int:
    random, count = np.random.default_rng(seed), 0
    for start in range(0, flips, _BLOCK):
        signs = random.integers(0, 2, (min(_BLOCK, flips - start), len(sums))) * 2.0 - 1
        count += int((np.abs(signs @ sums) >= least).sum())
    return count


def _sums(by_row: Float[np.ndarray, " row"], groups: Groups) -> NDArray[np.float64]:
    if groups is None:
        return by_row
    if len(groups) != len(by_row):
        raise InputError(f"Got {len(groups)} groups for {len(by_row)} rows: expected the picture of every row.")
    _, members = np.unique(np.asarray(groups), return_inverse=True)
    return np.bincount(members, weights=by_row).astype(np.float64)


def _scores(values: ArrayLike, name: str) -> NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or not np.isfinite(scores).all():
        raise InputError(
            f"{name} has shape {scores.shape}, finite: {bool(np.isfinite(scores).all())}: expected one finite score "
            "per question. Drop the questions that some method did not answer."
        )
    return scores


def _same_questions(base: Float[np.ndarray, " row"], scores: Float[np.ndarray, " other"], name: str) -> None:
    if base.shape != scores.shape:
        raise InputError(f"{name} has {len(scores)} scores against {len(base)}: expected the same questions in both.")


def _binary(scores: Float[np.ndarray, " row"]) -> bool:
    return bool(((scores == 0) | (scores == 1)).all())


def _positive(p: float) -> float:
    """A p-value too small for a float is the smallest float, never 0."""
    return max(p, sys.float_info.min)
