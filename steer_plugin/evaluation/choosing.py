"""Which of many points to take: the gentlest of those that cannot be told from the best, within a bound on damage.

best   = argmax of behaviour over the feasible points
near   = feasible points that beat the unsteered model, within one standard error of the best (paired bootstrap)
choice = argmin of damage over near;   the unsteered model where the best cannot be told from it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from steer_plugin.evaluation.bounds import Point
from steer_plugin.evaluation.intervals import Interval
from steer_plugin.evaluation.points import Points

# The interval of one standard error to either side.
ONE_ERROR = 0.6827


@dataclass(frozen=True)
class Choice:
    """The point that was chosen, and why, in plain English."""

    point: Point
    why: str


def choose(points: Points, curve: Sequence[Point], limit: float | int | None = None) -> Choice:
    """The gentlest of the feasible points that cannot be told from the best; the unsteered one where none beats it."""
    unsteered, bound = points.unsteered, points.task.bound
    limit = bound.limit if limit is None else limit
    fine = [one for one in curve if one.damage.value <= limit and one.alpha]
    if not fine:
        return Choice(unsteered, f"No steering: no strength keeps the {bound.label} within {limit:g}.")
    best = max(fine, key=lambda one: one.behaviour.value)
    gain = points.difference(best, unsteered)
    told = (
        f"{_at(best)} reaches {_shown(best.behaviour)} against {_shown(unsteered.behaviour)} unsteered (n = {best.n})"
    )
    if gain.low <= 0:
        return Choice(
            unsteered,
            f"No steering: {told}, and the difference {_shown(gain, '+')} cannot be told from 0 among "
            f"{len(fine)} feasible points.",
        )
    near = [one for one in near_best(points, best, fine) if points.difference(one, unsteered).low > 0]
    gentle = gentlest(near)
    gain = points.difference(gentle, unsteered)
    why = f"{_at(gentle)}: behaviour {_shown(gentle.behaviour)} against {_shown(unsteered.behaviour)} unsteered, "
    why += f"difference {_shown(gain, '+')}, n = {gentle.n}; {bound.label} {_shown(gentle.damage)}, at most {limit:g}."
    if gentle is best:
        return Choice(gentle, f"{why} It is the best of {len(fine)} feasible points, and none within one standard "
                      "error of it is gentler.")  # fmt: skip
    gap = points.difference(best, gentle)
    why += f" The best of {len(fine)} feasible points is {_at(best)} with {_shown(best.behaviour)}, damage "
    why += f"{best.damage.value:.3g}; it lies within one standard error (difference {_shown(gap, '+')}), and of "
    return Choice(gentle, f"{why}{len(near)} such points the chosen one does the least damage.")


def near_best(points: Points, best: Point, others: Sequence[Point]) -> list[Point]:
    """The best point, and those that lie within one standard error of it."""
    return [one for one in others if one is best or points.difference(best, one, level=ONE_ERROR).low <= 0]


def gentlest(some: Sequence[Point]) -> Point:
    """The point with the least damage."""
    return min(some, key=lambda one: (one.damage.value, one.alpha))


def falling(points: Points, steered: Sequence[Point]) -> str:
    """Where damage falls, beyond its interval, as the strength of a choice rises; empty where it does not."""
    found: list[str] = []
    for one, two in pairwise(steered):
        known = one.name == two.name and not np.isinf([one.costs, two.costs]).any()
        if known and points.difference(two, one, "costs").high < 0:
            found.append(f"from alpha {one.alpha:g} to {two.alpha:g} for {one.name!r}")
    return f"Damage FELL {', '.join(found)}: there may be feasible strengths that were not looked at." if found else ""


def _at(point: Point) -> str:
    return f"alpha {point.alpha:g} of {point.name!r}"


def _shown(value: Interval, sign: str = "") -> str:
    return f"{value.value:{sign}.3f} [{value.low:{sign}.3f}, {value.high:{sign}.3f}]"
