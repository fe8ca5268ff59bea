"""What an evaluation says: marks against brute force, tables, figures read from their axes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _colours import Colours
from numpy.typing import NDArray

from steer_plugin.errors import InputError
from steer_plugin.evaluation.benchmark import Metric
from steer_plugin.evaluation.comparing import against_all
from steer_plugin.evaluation.cost_log import MethodCosts
from steer_plugin.evaluation.costs import TextCosts
from steer_plugin.evaluation.figures import plot_costs, plot_scores, write_figures
from steer_plugin.evaluation.intervals import Interval, ratio
from steer_plugin.evaluation.result import Evaluation
from steer_plugin.evaluation.seeds import across

PICTURES = 9
GROUPS = [str(k // 2) for k in range(2 * PICTURES)]
SHARE = Metric("share", ratio, "lower", scale=1.0, digits=2)
METRICS = (Metric("right"), SHARE, Metric("hidden", shown=False))
CONTROLS = {"good, swapped": "good", "good, random": "good", "weak, random": "weak"}
Values = NDArray[np.float64]


def drawn(seed: int, p: float) -> dict[str, Values]:
    random = np.random.default_rng(seed)
    right = (random.random((18, 1)) < p).astype(float)
    share = np.concatenate([right, np.maximum(right, random.integers(0, 2, (18, 1)))], axis=1)
    return {"right": right, "share": share, "hidden": right}


RUNS: dict[str, list[dict[str, Values]]] = {
    "none": [drawn(1, 0.1)],
    "good": [drawn(seed, 0.97) for seed in (2, 3)],
    "good, swapped": [drawn(seed, 0.05) for seed in (4, 5)],
    "good, random": [drawn(seed, 0.3) for seed in (6, 7)],
    "weak": [drawn(8, 0.25)],
    "weak, random": [drawn(seed, 0.2) for seed in (9, 10)],
    "fine": [drawn(11, 0.9)],
}


class Board(Colours):
    """Eighteen items on nine pictures, with the metrics above."""

    def __init__(self) -> None:
        super().__init__(range(PICTURES), training=False)
        self.metrics, self.headline, self.groups = METRICS, "right", GROUPS


def figure(values: Values) -> float:
    return float(values[:, 0].mean() if values.shape[1] == 1 else values[:, 0].sum() / values[:, 1].sum())


def brute_force(first: Sequence[Values], second: Sequence[Values]) -> float:
    """P(the difference is as far from 0) over all ways to swap the two methods picture by picture."""
    count = max(len(first), len(second))
    one, two = list(first) * (count // len(first)), list(second) * (count // len(second))
    members = np.array([int(group) for group in GROUPS])

    def gap(swaps: tuple[int, ...]) -> float:
        away = np.array(swaps)[members].astype(bool)[:, None]
        return float(np.mean([figure(np.where(away, b, a)) - figure(np.where(away, a, b))
                              for a, b in zip(one, two, strict=True)]))  # fmt: skip

    observed = abs(gap((0,) * PICTURES))
    return float(np.mean([abs(gap(swaps)) >= observed - 1e-9 for swaps in product((0, 1), repeat=PICTURES)]))


def corrected(ps: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down procedure, by its definition."""
    order, out, worst = sorted(ps, key=lambda name: ps[name]), dict[str, float](), 0.0
    for rank, name in enumerate(order):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[name]))
        out[name] = worst
    return out


@pytest.fixture(scope="module")
def found() -> Evaluation:
    against, over = against_all(Board(), RUNS, CONTROLS, seed=0)
    scores = {
        name: {m.name: across([run[m.name] for run in runs], GROUPS, m.statistic, seed=0) for m in METRICS}
        for name, runs in RUNS.items()
    }
    text = TextCosts(3.0, 2.0, 0.0, 0.25, 0.5, 0.6, 18)
    costs = {
        name: MethodCosts(None if name == "fine" else Interval(0.1 * k, 0.05 * k, 0.2 * k), 2.0 + k, text, 18)
        for k, name in enumerate(RUNS)
    }
    return Evaluation("board", "right", METRICS, 18, scores, against, over, costs, CONTROLS, {"seed": 0}, RUNS, GROUPS)


@pytest.mark.parametrize("metric", ["right", "share"])
@pytest.mark.parametrize("family", [("good", "weak", "fine"), tuple(CONTROLS)])
def test_p_values_are_those_of_every_way_to_swap_and_holms_within_a_family(
    found: Evaluation, metric: str, family: tuple[str, ...]
):
    none = [run[metric] for run in RUNS["none"]]
    ps = {name: brute_force([run[metric] for run in RUNS[name]], none) for name in family}
    held = corrected(ps)
    for name in family:
        gap = found.against[name][metric]
        assert gap.p_value == pytest.approx(ps[name]), name
        assert gap.p_holm == pytest.approx(held[name]), name
        assert gap.significant == (held[name] <= 0.05)
        differences = [figure(run[metric]) - figure(none[0]) for run in RUNS[name]]
        assert gap.difference.value == pytest.approx(np.mean(differences))


def test_the_family_holds_both_kinds(found: Evaluation):
    assert found.against["good"]["right"].significant and found.against["fine"]["right"].significant
    assert not found.against["weak"]["right"].significant
    assert "none" not in found.against


def test_methods_are_held_against_their_own_controls(found: Evaluation):
    runs = {name: [run["right"] for run in RUNS[name]] for name in RUNS}
    ps = {control: brute_force(runs[method], runs[control]) for control, method in CONTROLS.items()}
    held = corrected(ps)
    for control, method in CONTROLS.items():
        gap = found.over_controls[method][control]
        assert (gap.p_value, gap.p_holm) == (pytest.approx(ps[control]), pytest.approx(held[control]))
    assert set(found.over_controls) == {"good", "weak"}


def test_any_two_methods_are_compared(found: Evaluation):
    gap = found.compare("fine", "weak", "share")
    assert gap.p_value == gap.p_holm == pytest.approx(brute_force(*([RUNS[n][0]["share"]] for n in ("fine", "weak"))))
    with pytest.raises(InputError, match="no method 'fin'"):
        found.compare("fin", "weak")


def rows_of(table: str) -> dict[str, list[str]]:
    lines = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    return {cells[0]: cells[1:] for cells in lines if not set(cells[0]) <= {"-", ":", " "} or cells[0] == ""}


def test_marks_stand_behind_what_cannot_be_told_from_unsteered(found: Evaluation):
    table = rows_of(found.table())
    assert table["good"][0].endswith(f"± {100 * np.std([figure(r['right']) for r in RUNS['good']], ddof=1):.1f}")
    assert table["weak"][0].endswith("°") and not table["fine"][0].endswith("°")
    assert "°" not in table["none"][0]
    for name, gaps in found.against.items():
        shown = table[f"- {name}" if name in CONTROLS else name]
        assert [cell.endswith("°") for cell in shown] == [not gaps[m].significant for m in ("right", "share")]
    assert f"{100 * figure(RUNS['fine'][0]['right']):.1f}" in table["fine"][0]
    assert f"{figure(RUNS['fine'][0]['share']):.2f}" in table["fine"][1]
    head = found.table().splitlines()[0]
    assert "right (%) ↑" in head and "share ↓" in head and "hidden" not in head
    assert "hidden" in found.table(["hidden"]).splitlines()[0]


def test_the_page_holds_the_tables_and_what_they_mean(found: Evaluation):
    page = found.markdown()
    for part in ("# board", "18 items", "## Against unsteered, right", "## Against their own controls, right",
                 "good less good, random", "## What it costs", "their perplexity under it, on 18."):  # fmt: skip
        assert part in page
    rows = rows_of(page[page.index("## Against unsteered") : page.index("## What it costs")])
    for name, gap in [(name, found.against[name]["right"]) for name in found.against] + [
        (f"{method} less {control}", found.over_controls[method][control]) for control, method in CONTROLS.items()
    ]:
        low, high = 100 * gap.difference.low, 100 * gap.difference.high
        difference = f"{100 * gap.difference.value:.1f} [{low:.1f}, {high:.1f}]"
        assert rows[name][:3] == [difference, f"{gap.p_value:.2g}", f"{gap.p_holm:.2g}"]
        assert rows[name][3:] == ([] if gap.significant else ["°"])
    bare = replace(found, costs={}, over_controls={}, controls={}, against={})
    assert "What it costs" not in bare.markdown() and "own controls" not in bare.markdown()
    assert "Nothing beside unsteered." in bare.markdown()
    costs = rows_of(found.cost_table())
    assert costs["fine"][:2] == ["", "8.00"] and costs["good"][0].startswith("0.100")
    assert costs["good"][2:] == ["3.0", "0.0", "25.0", "0.500", "0.600"]


def test_json_holds_every_number(found: Evaluation):
    kept = json.loads(json.dumps(found.as_json(), allow_nan=False))
    one = found.scores["good"]["right"]
    assert kept["scores"]["good"]["right"] == {
        "value": one.mean.value, "low": one.mean.low, "high": one.mean.high, "spread": one.spread,
        "seeds": [figure(run["right"]) for run in RUNS["good"]],
    }  # fmt: skip
    assert kept["against_unsteered"]["weak"]["right"]["p_holm"] == found.against["weak"]["right"].p_holm
    assert kept["controls"] == CONTROLS and kept["costs"]["fine"]["kl"] is None
    assert kept["costs"]["good"]["kl"] == [pytest.approx(0.1), 0.05, 0.2]
    assert [row["name"] for row in kept["metrics"]] == ["right", "share", "hidden"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda one: one.score("god"), "no method 'god' here.*Did you mean 'good'"),
        (lambda one: one.score("good", "rigt"), "no metric 'rigt' here.*Did you mean 'right'"),
        (lambda one: one.table(["rigt"]), "no metric 'rigt' here.*Did you mean 'right'.*Metrics: right, share"),
        (lambda one: plot_scores(one, "rigt"), "no metric 'rigt' here"),
        (lambda one: plot_costs(replace(one, costs={})), "no method has costs: run the evaluation with costed above 0"),
    ],
)
def test_unknown_names_are_refused(found: Evaluation, call: Callable[[Evaluation], object], message: str):
    pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match=message):
        call(found)


# -- figures ----------------------------------------------------------------------------------------------------------


def drawn_points(axes: Any) -> list[tuple[float, float, str]]:
    """Markers of a plot: x, y, and the colour that they are filled with."""
    return [
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]), line.get_markerfacecolor())
        for line in axes.lines if line.get_marker() == "o"
    ]  # fmt: skip


@pytest.mark.parametrize(("metric", "scale"), [("right", 100.0), ("share", 1.0)])
def test_the_figure_of_scores_shows_the_scores(found: Evaluation, metric: str, scale: float):
    pytest.importorskip("matplotlib")
    (axes,) = plot_scores(found, metric).axes
    means = [found.scores[name][metric].mean for name in RUNS]
    assert drawn_points(axes) == [
        (pytest.approx(scale * one.value), k, "white" if name in CONTROLS else "0.1")
        for k, (name, one) in enumerate(zip(RUNS, means, strict=True))
    ]
    bars = [line for line in axes.lines if line.get_marker() != "o" and line.get_linestyle() == "-"]
    assert [np.asarray(bar.get_xdata()).tolist() for bar in bars] == [
        pytest.approx([scale * m.low, scale * m.high]) for m in means
    ]
    (unsteered,) = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert np.asarray(unsteered.get_xdata()).tolist() == pytest.approx([scale * means[0].value] * 2)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    marked = {name: not gaps[metric].significant for name, gaps in found.against.items()}
    assert labels == [f"{'- ' if name in CONTROLS else ''}{name}{' °' if marked.get(name) else ''}" for name in RUNS]
    assert ("lower is better" if metric == "share" else "higher is better") in axes.get_xlabel()


def test_the_figure_of_costs_shows_gain_against_kl(found: Evaluation):
    pytest.importorskip("matplotlib")
    (axes,) = plot_costs(found).axes
    names = [name for name in RUNS if name != "fine"]
    kls = [found.costs[name].kl for name in names]
    wanted = [
        (pytest.approx(kl.value), pytest.approx(100 * found.score(name).value), "white" if name in CONTROLS else "0.1")
        for name, kl in zip(names, kls, strict=True) if kl is not None
    ]  # fmt: skip
    assert drawn_points(axes) == wanted
    named = {part for text in axes.texts for part in text.get_text().split(", ")}
    assert named == {"none", "good", "weak"}


def test_figures_are_written(found: Evaluation, tmp_path: Path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    assert [path.name for path in write_figures(found, tmp_path)] == ["scores.png", "costs.png"]
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert picture.format == "PNG" and min(picture.size) > 200
    unpriced = replace(found, costs={"fine": found.costs["fine"]})
    assert [path.name for path in write_figures(unpriced, tmp_path)] == ["scores.png"]


def test_verdicts_without_a_number_are_named(found: Evaluation):
    assert "without a number" not in found.markdown()
    some = replace(found, provenance={"unread_verdicts": {"guard on good": 3}})
    assert "Verdicts without a number, left out: 3 of guard on good." in some.markdown()
