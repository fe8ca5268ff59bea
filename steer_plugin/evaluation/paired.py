"""Comparing methods on the same questions: sign flips of whole pictures, Holm's correction.

    sign flips   p = P(|sum_g s_g D_g| >= |sum_g D_g|),  s_g = +-1,  D_g the summed difference on picture g
    Holm         adjusted p_(i) = max over j <= i of min(1, (m - j + 1) p_(j)), p sorted upwards     (Holm 1979)

Questions on one picture are not independent, so whole pictures are flipped; with one 0/1 question per picture, that is
McNemar's exact test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

from steer_plugin.errors import InputError

Groups: TypeAlias = "Sequence[str] | Sequence[int] | None"

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
