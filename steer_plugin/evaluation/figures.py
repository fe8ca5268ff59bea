"""Figures of an evaluation: each method's headline with its interval, and what it gained against what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from steer_plugin.analysis._figure import new_figure
from steer_plugin.errors import InputError
from steer_plugin.evaluation.result import MARK, Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = object  # imported when needed; run-time type checkers look the names up

_BLACK, _GREY = "0.1", "0.55"


def plot_scores(result: Evaluation, metric: str | None = None) -> Figure:
    """Each method's figure with its 95 % interval, unsteered as a line, controls hollow.

    Raises:
        InputError: an unknown metric.
        FrameworkError: matplotlib is not installed.
    """
    name = result.headline if metric is None else metric
    result.score("none", name)
    chosen = next(one for one in result.metrics if one.name == name)
    methods = [method for method in result.scores if name in result.scores[method]]
    figure = new_figure(6.4, 1.0 + 0.28 * len(methods))
    axes = figure.subplots()
    for place, method in enumerate(methods):
        one = result.scores[method][name].mean
        value, low, high = (chosen.scale * part for part in (one.value, one.low, one.high))
        hollow = method in result.controls
        color = _GREY if hollow else _BLACK
        axes.plot([low, high], [place, place], color=color, linewidth=1.2)
        axes.plot(value, place, "o", color=color, markerfacecolor="white" if hollow else color, markersize=5)
    axes.axvline(chosen.scale * result.score("none", name).value, color=_GREY, linestyle=":", linewidth=1)
    axes.set_yticks(range(len(methods)), [_label(result, method, name) for method in methods])
    axes.invert_yaxis()
    better = {"higher": "higher is better", "lower": "lower is better", "neither": "neither way is better"}
    axes.set_xlabel(f"{name}{' (%)' if chosen.scale == 100 else ''}, {better[chosen.better]}")
    axes.set_title(f"{result.benchmark}: {result.n} items, 95 % intervals over pictures", fontsize="medium", loc="left")
    _quiet(axes)
    return figure


def plot_costs(result: Evaluation) -> Figure:
    """The headline against KL to the unsteered model, for every method that has both.

    Raises:
        InputError: costs were not measured.
        FrameworkError: matplotlib is not installed.
    """
    there = {name: one.kl for name, one in result.costs.items() if one.kl is not None and name in result.scores}
    if not there:
        raise InputError("no method has costs: run the evaluation with costed above 0.")
    chosen = next(one for one in result.metrics if one.name == result.headline)
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    for name, kl in there.items():
        one, hollow = result.scores[name][result.headline].mean, name in result.controls
        color = _GREY if hollow else _BLACK
        y, low, high = (chosen.scale * part for part in (one.value, one.low, one.high))
        axes.plot([kl.low, kl.high], [y, y], color=color, linewidth=0.8)
        axes.plot([kl.value, kl.value], [low, high], color=color, linewidth=0.8)
        axes.plot(kl.value, y, "o", color=color, markerfacecolor="white" if hollow else color, markersize=5)
    _name_points(
        axes,
        {
            name: (kl.value, chosen.scale * result.score(name).value)
            for name, kl in there.items()
            if name not in result.controls
        },
    )
    axes.set_xlabel("KL to the unsteered model along its own answers (nats per token)")
    axes.set_ylabel(f"{result.headline}{' (%)' if chosen.scale == 100 else ''}")
    axes.set_title(
        f"{result.benchmark}: what it gains and what it costs (hollow: controls)", fontsize="medium", loc="left"
    )
    _quiet(axes)
    return figure


def write_figures(result: Evaluation, out: Path) -> list[Path]:
    """Draw what there is into a folder; return the files."""
    made = {"scores.png": plot_scores(result)}
    if any(one.kl is not None for one in result.costs.values()):
        made["costs.png"] = plot_costs(result)
    for name, figure in made.items():
        figure.savefig(out / name, dpi=150)
    return [out / name for name in made]


def _label(result: Evaluation, method: str, metric: str) -> str:
    gap = result.against.get(method, {}).get(metric)
    mark = "" if gap is None or gap.significant else f" {MARK}"
    return f"{'- ' if method in result.controls else ''}{method}{mark}"


def _name_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Name points of a finished plot; those that lie on each other share one label."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    clusters: list[tuple[tuple[float, float], list[str]]] = []
    for name, (x, y) in points.items():
        for (x0, y0), names in clusters:
            if abs(x - x0) < 0.08 * (right - left) and abs(y - y0) < 0.04 * (high - low):
                names.append(name)
                break
        else:
            clusters.append(((x, y), [name]))
    for place, names in clusters:
        axes.annotate(", ".join(names), place, xytext=(5, 4), textcoords="offset points", fontsize="small")


def _quiet(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize="small")
