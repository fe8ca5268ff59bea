"""A grid of strengths and layers: behaviour and damage in every cell, and the cell that a bound would choose.

Points, bounds, kept prompts and files are those of `calibrate`; each batch of prompts runs once for the whole grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from steer_plugin.adapters import AttachedModel
from steer_plugin.analysis._figure import new_figure
from steer_plugin.atomic import JSON
from steer_plugin.errors import InputError
from steer_plugin.evaluation.asking import Asked
from steer_plugin.evaluation.bounds import (
    UNSTEERED,
    Behaviour,
    Bound,
    KLBound,
    Point,
    Steered,
    check_number,
    named,
    to_frame,
)
from steer_plugin.evaluation.choosing import Choice, choose
from steer_plugin.evaluation.points import Points
from steer_plugin.evaluation.task import KEEP_BYTES, Groups, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from pandas import DataFrame
else:
    DataFrame = Figure = Rectangle = object  # imported when needed; run-time type checkers look the names up

Shown = Literal["behaviour", "damage"]


@dataclass(frozen=True)
class Sweep:
    """What `sweep` measured.

    Attributes:
        unsteered: strength 0.
        points: every cell, by name and then strength.
        reused: share of prompt tokens that this process did not run again.
    """

    unsteered: Point
    points: tuple[Point, ...]
    alphas: tuple[float, ...]
    names: tuple[str, ...]
    bound: Bound
    reused: float
    seed: int
    _points: Points = field(repr=False, compare=False)

    def at(self, name: str, alpha: float | int) -> Point:
        """One cell.

        Raises:
            InputError: no such cell.
        """
        found = [one for one in self.points if one.where == (name, alpha)]
        if not found:
            raise InputError(
                f"the sweep has no cell {name!r}, alpha {alpha}: it has {list(self.names)} and {list(self.alphas)}."
            )
        return found[0]

    def best(self, bound: Bound | float | int | None = None) -> Choice:
        """The gentlest cell that cannot be told from the best within a bound on the damage, and why.

        `bound` is a limit, or a bound of the kind that was measured; the sweep's own where it is left out.

        Raises:
            InputError: a bound of another kind.
        """
        if isinstance(bound, (int, float)):
            check_number("bound", bound, "a limit of the damage, 0 or more", bound >= 0)
            return choose(self._points, self.points, float(bound))
        if bound is not None and bound.kind != self.bound.kind:
            raise InputError(
                f"the sweep measured {self.bound.kind!r} damage, and the bound is on {bound.kind!r}: run "
                f"sweep(..., damage={type(bound).__name__}(...)) again."
            )
        return choose(self._points, self.points, None if bound is None else bound.limit)

    def to_frame(self) -> DataFrame:
        """A pandas table, the unsteered model first; raises FrameworkError where pandas is missing."""
        return to_frame([self.unsteered, *self.points])

    def as_json(self) -> dict[str, JSON]:
        """Every cell, and the bound."""
        return {
            "damage": self.bound.kind, "limit": self.bound.limit, "reused": self.reused, "seed": self.seed,
            "unsteered": self.unsteered.as_json(), "cells": [point.as_json() for point in self.points],
        }  # fmt: skip

    def plot(self, metric: Shown = "behaviour") -> Figure:
        """Heat map, strengths by names, each value in its cell; cells that break the bound are hatched.

        Raises:
            InputError: an unknown metric.
            FrameworkError: matplotlib is not installed.
        """
        if metric not in ("behaviour", "damage"):
            raise InputError(f"metric {metric!r} is not shown; choose 'behaviour' or 'damage'.")
        values = np.array([[self._value(name, alpha, metric) for alpha in self.alphas] for name in self.names])
        figure = new_figure(1.8 + 0.85 * len(self.alphas), 1.5 + 0.5 * len(self.names))
        axes = figure.subplots()
        # What is beyond all measure is as dark as the darkest.
        finite = np.where(np.isfinite(values), values, values[np.isfinite(values)].max(initial=0.0))
        image = axes.imshow(finite, cmap="Greys", aspect="auto")
        axes.set_xticks(range(len(self.alphas)), [f"{alpha:g}" for alpha in self.alphas])
        axes.set_yticks(range(len(self.names)), self.names)
        axes.set_xlabel("alpha (hatched: breaks the bound)")
        for (row, column), value in np.ndenumerate(values):
            broken = not self.at(self.names[row], self.alphas[column]).feasible
            if broken:
                axes.add_patch(_hatched((column - 0.5, row - 0.5)))
            red, green, blue, _ = image.cmap(image.norm(finite[row, column]))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            plate = {"boxstyle": "round,pad=0.15", "lw": 0, "fc": (red, green, blue)} if broken else None
            shown = f"{value:#.3g}" if math.isfinite(value) else "inf"
            axes.text(column, row, shown, ha="center", va="center", color="w" if dark else "k", bbox=plate)
        own = f"behaviour (unsteered {self.unsteered.behaviour.value:#.3g})"
        axes.set_title(self.bound.label if metric == "damage" else own, fontsize="medium")
        return figure

    def _value(self, name: str, alpha: float, metric: Shown) -> float:
        point = self.at(name, alpha)
        return point.behaviour.value if metric == "behaviour" else point.damage.value


def sweep(
    vlm: AttachedModel,
    steering: Steered | Mapping[str, Steered],
    items: Sequence[Asked],
    behaviour: Behaviour,
    alphas: Sequence[float | int],
    *,
    damage: Bound | None = None,
    groups: Groups = None,
    seed: int = 0,
    level: float | int = 0.95,
    batch_size: int = 32,
    max_new_tokens: int = 12,
    keep_bytes: int = KEEP_BYTES,
    out: Path | str | None = None,
    job: Mapping[str, JSON] | None = None,
    progress: bool = True,
) -> Sweep:
    """Evaluate every strength of every layer or choice on the same items; arguments as for `calibrate`.

    `damage` says how damage is measured, and marks the cells that break its limit; KLBound() by default. The grid is
    worked through batch by batch, so that prompts run once however little memory there is to keep them.

    Raises:
        InputError: unusable settings or scores.
        JobError: `out` belongs to another job.
    """
    strengths = [float(alpha) for alpha in alphas]
    fine = bool(strengths) and all(map(math.isfinite, strengths)) and len({*strengths, 0.0}) == len(strengths) + 1
    if not fine:
        raise InputError(f"alphas={list(alphas)} cannot be swept: expected different finite numbers other than 0.")
    choices, bound = named(steering), KLBound() if damage is None else damage
    task = Task(
        vlm, items, behaviour, bound, choices, groups, seed, level, batch_size, max_new_tokens, keep_bytes,
        None if out is None else Path(out), job, progress,
    )  # fmt: skip
    points = Points(task)
    unsteered, *cells = points.at([UNSTEERED, *((name, alpha) for name in choices for alpha in strengths)])
    return Sweep(unsteered, tuple(cells), tuple(strengths), tuple(choices), bound, points.reused, seed, points)


def _hatched(corner: tuple[float, float]) -> Rectangle:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 1, 1, fill=False, hatch="////", ec="0.55", lw=0)
