"""Strength (and layer) of a steering: the best behaviour within a bound on damage, found by a bracketed search.

    choice = argmax over feasible (name, alpha) of behaviour,   feasible: damage(name, alpha) <= limit

1. Bracket: from `low` the strength doubles (with several choices: is multiplied by 4, all of them at once) until the
   bound breaks, the behaviour falls below the best by more than its interval, or `high` is reached.
2. Refine, for the best choice and the second best unless that one is told worse: halve, on the log scale, the wider
   gap beside the best feasible strength. Beside a broken bound this is the bisection to the largest feasible strength,
   elsewhere a search for the peak. On a plateau (neither neighbour is told worse), and when the peak is found, halve
   the gap below the gentlest strength within one standard error of the best. It ends at `tolerance` or `max_points`.
3. Choose (`choosing`): the gentlest of the points that cannot be told from the best; no steering where none helps.

Learning to Steer (arXiv 2508.12815) leaves the choice of the strength open and bounds the loss of quality by 10 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from steer_plugin.adapters import AttachedModel
from steer_plugin.analysis._figure import new_figure
from steer_plugin.atomic import JSON
from steer_plugin.evaluation.asking import Asked
from steer_plugin.evaluation.bounds import (
    Behaviour,
    Bound,
    KLBound,
    Point,
    Steered,
    at_strength,
    check_number,
    named,
    to_frame,
)
from steer_plugin.evaluation.choosing import choose, falling, gentlest, near_best
from steer_plugin.evaluation.intervals import Interval
from steer_plugin.evaluation.points import Points
from steer_plugin.evaluation.task import KEEP_BYTES, Groups, Task
from steer_plugin.intervention import Steerable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
else:
    DataFrame = Figure = object  # imported when needed; run-time type checkers look the names up

_MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` tried and chose.

    Attributes:
        curve: every point, by name and strength; the unsteered model first.
        alpha, name: the choice; 0 and "" for the unsteered model.
        steering: ready to use; None for the unsteered model, a function of the ids of a batch where one was given.
        why: the reasons, with their numbers.
        reused: share of prompt tokens that this process did not run again.
        monotone: whether damage never fell, beyond its interval, as the strength rose.
    """

    curve: tuple[Point, ...]
    alpha: float
    name: str
    steering: Steerable | Callable[[Sequence[str]], Steerable | None] | None = field(repr=False)
    why: str
    reused: float
    seed: int
    bound: Bound
    monotone: bool

    @property
    def point(self) -> Point:
        """The chosen point."""
        return next(one for one in self.curve if one.where == (self.name, self.alpha))

    def to_frame(self) -> DataFrame:
        """A pandas table of the curve; raises FrameworkError where pandas is missing."""
        return to_frame(self.curve)

    def as_json(self) -> dict[str, JSON]:
        """The choice, its reasons and the curve."""
        return {
            "name": self.name, "alpha": self.alpha, "why": self.why, "damage": self.bound.kind,
            "limit": self.bound.limit, "monotone": self.monotone, "reused": self.reused, "seed": self.seed,
            "curve": [point.as_json() for point in self.curve],
        }  # fmt: skip

    def plot(self) -> Figure:
        """Behaviour above damage, against the strength; raises FrameworkError where matplotlib is missing."""
        figure = new_figure(8.0, 5.0)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        base, names = self.curve[0], list(dict.fromkeys(one.name for one in self.curve[1:]))
        upper.axhspan(base.behaviour.low, base.behaviour.high, color="0.9", lw=0)
        upper.axhline(base.behaviour.value, color="0.4", lw=1, ls=":", label="unsteered")
        for number, name in enumerate(names):
            rows = [one for one in self.curve[1:] if one.name == name]
            look = {"marker": _MARKERS[number % len(_MARKERS)], "ms": 5, "lw": 1.2, "color": f"C{number}"}
            for axes, values in ((upper, [p.behaviour for p in rows]), (lower, [p.damage for p in rows])):
                _line(axes, [p.alpha for p in rows], values, {**look, "label": name})
            broken = [one for one in rows if not one.feasible]
            upper.plot([p.alpha for p in broken], [p.behaviour.value for p in broken], "x", color="0.1", ms=9, mew=1.5)
        lower.axhline(self.bound.limit, color="0.1", lw=1, ls="--", label=f"bound {self.bound.limit:g}")
        upper.plot([], [], "x", color="0.1", ms=9, mew=1.5, ls="", label="breaks the bound")
        if self.alpha:
            ring = {"marker": "o", "ms": 15, "mfc": "none", "mec": "0.1", "mew": 1.5, "ls": ""}
            upper.plot([self.alpha], [self.point.behaviour.value], **ring, label=f"chosen: {self.alpha:g}")
            lower.plot([self.alpha], [self.point.damage.value], **ring)
        upper.set_xscale("log", base=2)
        upper.xaxis.set_major_formatter("{x:g}")
        upper.set_ylabel("behaviour")
        lower.set_ylabel(self.bound.label.replace(" (", "\n("))
        lower.set_xlabel("alpha")
        found = {
            label: handle
            for axes in (upper, lower)
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(list(found.values()), list(found), loc="outside right upper", fontsize="small", frameon=False)
        return figure


def calibrate(
    vlm: AttachedModel,
    steering: Steered | Mapping[str, Steered],
    items: Sequence[Asked],
    behaviour: Behaviour,
    *,
    bound: Bound | None = None,
    groups: Groups = None,
    alphas: tuple[float | int, float | int] = (0.25, 16.0),
    tolerance: float | int = 0.25,
    max_points: int = 24,
    seed: int = 0,
    level: float | int = 0.95,
    batch_size: int = 32,
    max_new_tokens: int = 12,
    keep_bytes: int = KEEP_BYTES,
    out: Path | str | None = None,
    job: Mapping[str, JSON] | None = None,
    progress: bool = True,
) -> Calibration:
    """Choose the strength of a steering, or strength and layer of several, on validation items.

    `steering` is something with `with_alpha`, an intervention (alpha multiplies it), a function of (ids of a batch,
    alpha), or a mapping of names to these. `behaviour` goes from {item.key: answer} to one score per item: higher is
    better, NaN does not count. `bound` is KLBound() by default; `groups` names the picture of each item, for intervals
    that resample pictures. `alphas` are the least and the largest strength; neighbours nearer than a factor of
    1 + `tolerance` are not parted further; `max_points` counts steered points, those on disk included. `out` is a JSONL
    file from which a killed run goes on, and where several processes meet (each calls this and gets the same choice);
    `job` says what decides the answers besides, where a function steers. `keep_bytes` bounds the memory for kept
    prompts.

    Raises:
        InputError: unusable settings or scores.
        JobError: `out` belongs to another job.
    """
    low, high = (float(alpha) for alpha in alphas)
    check_number("alphas", alphas[0], f"finite 0 < low <= high, got {alphas}", 0 < low <= high < math.inf)
    check_number("tolerance", tolerance, "a number above 0, as 0.25 for 25 %", 0 < tolerance < math.inf)
    choices = named(steering)
    check_number("max_points", max_points, f"at least one point for each of {len(choices)}", max_points >= len(choices))
    chosen_bound, path = KLBound() if bound is None else bound, None if out is None else Path(out)
    task = Task(
        vlm, items, behaviour, chosen_bound, choices, groups, seed, level, batch_size, max_new_tokens, keep_bytes, path,
        job, progress,
    )  # fmt: skip
    points = Points(task)
    search = Search(points, low, high, tolerance, max_points)
    search.run()
    curve = [points.unsteered, *search.steered]
    choice, falls = choose(points, curve), falling(points, search.steered)
    name, alpha = choice.point.where
    ready = at_strength(choices[name], alpha) if alpha else None
    why = f"{choice.why} {search.reached()} {falls or 'Damage did not fall anywhere as alpha rose.'}"
    return Calibration(tuple(curve), alpha, name, ready, why, points.reused, seed, chosen_bound, not falls)


class Search:
    """The points of a bracketed search, by name and strength."""

    def __init__(self, points: Points, low: float, high: float, tolerance: float | int, max_points: int) -> None:
        self.points, self.low, self.high = points, low, high
        self.tolerance, self.max_points = tolerance, max_points
        self.tried: dict[str, dict[float, Point]] = {name: {} for name in points.task.steerings}

    @property
    def steered(self) -> list[Point]:
        """Every point but the unsteered one, by name and strength."""
        return [found[alpha] for found in self.tried.values() for alpha in sorted(found)]

    def run(self) -> None:
        """Bracket every choice, then refine the best two."""
        self._bracket()
        refined = self._leading()
        while wanted := [(name, alpha) for name in refined if (alpha := self._between(name)) is not None]:
            if not self._try(wanted):
                break

    def reached(self) -> str:
        """How far up the bound held."""
        parts: list[str] = []
        for name, found in self.tried.items():
            broken = [alpha for alpha in sorted(found) if not found[alpha].feasible]
            said = (
                f"breaks at alpha {broken[0]:g}" if broken else f"holds up to alpha {max(found):g}, the largest tried"
            )
            parts.append(f"for {name!r} it {said}" if found else f"{name!r} was not tried")
        return f"The bound: {'; '.join(parts)}."

    def _try(self, wanted: Sequence[tuple[str, float]]) -> bool:
        room = self.max_points - len(self.steered)
        for point in self.points.at(list(wanted)[:room]) if room > 0 else []:
            self.tried[point.name][point.alpha] = point
        return room >= len(wanted)

    def _bracket(self) -> None:
        factor = 2.0 if len(self.tried) == 1 else 4.0
        climbing, alpha = list(self.tried), self.low
        while climbing and self._try([(name, alpha) for name in climbing]) and alpha < self.high:
            climbing = [name for name in climbing if self._may_climb(name, alpha)]
            alpha = min(rounded(alpha * factor), self.high)

    def _may_climb(self, name: str, alpha: float) -> bool:
        point, best = self.tried[name][alpha], self._best(name)
        return point.feasible and best is not None and not self._worse(point, best)

    def _best(self, name: str) -> Point | None:
        return max(
            (one for one in self.tried[name].values() if one.feasible), key=lambda p: p.behaviour.value, default=None
        )

    def _worse(self, point: Point, best: Point) -> bool:
        return point is not best and self.points.difference(best, point).low > 0

    def _leading(self) -> list[str]:
        """Names worth refining: the best one, and the second unless it is told worse."""
        best = {name: one for name in self.tried if (one := self._best(name)) is not None}
        order = sorted(best, key=lambda name: -best[name].behaviour.value)[:2]
        return [name for name in order if not self._worse(best[name], best[order[0]])]

    def _between(self, name: str) -> float | None:
        """The next strength to try; None where nothing is left to find."""
        best = self._best(name)
        if best is None:
            return None
        gap = self._beside(name, best) or self._below(name, best)
        return None if gap is None else rounded(math.sqrt(gap[0] * gap[1]))

    def _beside(self, name: str, best: Point) -> tuple[float, float] | None:
        """The wider gap beside the best point, unless it lies on a plateau."""
        alphas = sorted(self.tried[name])
        at = alphas.index(best.alpha)
        beside = [self.tried[name][alphas[i]] for i in (at - 1, at + 1) if 0 <= i < len(alphas)]
        if all(one.feasible and not self._worse(one, best) for one in beside):
            return None
        return max(
            (gap for one in beside if self._wide(gap := (one.alpha, best.alpha))),
            key=lambda gap: abs(math.log(gap[0] / gap[1])),
            default=None,
        )

    def _below(self, name: str, best: Point) -> tuple[float, float] | None:
        """The gap below the gentlest point that is as good as the best."""
        fine = [one for one in self.tried[name].values() if one.feasible]
        gentle = gentlest(near_best(self.points, best, fine)).alpha
        lower = max((alpha for alpha in self.tried[name] if alpha < gentle), default=gentle)
        return (lower, gentle) if self._wide((lower, gentle)) else None

    def _wide(self, gap: tuple[float, float]) -> bool:
        return max(gap) / min(gap) > 1 + self.tolerance


def rounded(alpha: float) -> float:
    """Three digits: the same strength is the same number when a search is taken up again."""
    return float(f"{alpha:.3g}")


def _line(axes: object, alphas: Sequence[float], values: Sequence[Interval], look: Mapping[str, object]) -> None:
    """A line with intervals; values beyond all measure are left out."""
    fine = [(alpha, one) for alpha, one in zip(alphas, values, strict=True) if math.isfinite(one.value)]
    middle = [one.value for _, one in fine]
    reach = [[one.value - one.low for _, one in fine], [one.high - one.value for _, one in fine]]
    axes.errorbar([alpha for alpha, _ in fine], middle, yerr=np.clip(reach, 0, None), capsize=2, **look)  # pyright: ignore[reportAttributeAccessIssue]
