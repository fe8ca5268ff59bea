"""Strengths and layers: chosen on validation items before anything is tested, and never by another fit's search."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _colours import Colours
from _steerings import PAIR
from _tiny import tiny_llava, tiny_processor

import steer_plugin as sp
from steer_plugin.errors import InputError, JobError
from steer_plugin.evaluation import strengths as module
from steer_plugin.evaluation.bounds import KLBound, Point
from steer_plugin.evaluation.calibrate import Calibration
from steer_plugin.evaluation.evaluate import evaluate
from steer_plugin.evaluation.intervals import Interval
from steer_plugin.evaluation.lineup import Lineup
from steer_plugin.evaluation.strengths import Strengths

TEST, HELD = (0, 1), (200, 201, 202)
LAYERS = (("resid_post.1", "resid_post.1"), ("resid_post.2", "resid_post.1"))
LINEUP = Lineup(("none", "mean", "l2s", "norm_rnd"), hidden=4, controls=False)


@pytest.fixture(scope="module")
def vlm() -> sp.AttachedModel:
    return sp.attach(tiny_llava(), tiny_processor())


def quick(**changes: Any) -> Strengths:
    given: dict[str, Any] = {"bound": KLBound(50.0), "alphas": (1.0, 4.0), "layers": LAYERS, "max_points": 4, **changes}
    return Strengths(**given)


def run(vlm: sp.AttachedModel, benchmark: Colours, out: Path, strengths: Strengths, lineup: Lineup = LINEUP) -> Any:
    return evaluate(vlm, benchmark, lineup, out, strengths=strengths, costed=0, progress=False)


def test_no_test_item_is_asked_before_the_choice(
    vlm: sp.AttachedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []
    before: list[list[str]] = []
    choose = Strengths.choose

    def spied(self: Strengths, *args: Any, **options: Any) -> Any:
        made = choose(self, *args, **options)
        before.append(list(asked))
        return made

    monkeypatch.setattr(Strengths, "choose", spied)
    strengths = quick()
    found = run(vlm, Colours(TEST, watch=asked.append, validation=HELD), tmp_path, strengths)
    held = {f"{number}-{word}" for number in HELD for word in (20, 21)}
    assert set(before[0]) == held
    after = asked[len(before[0]) :]
    assert set(after) == {f"{number}-{word}" for number in TEST for word in (20, 21)}
    # The choice, its curve and the layers that all methods share are on record.
    kept = json.loads((tmp_path / "metrics.json").read_text())["provenance"]
    assert set(kept["calibration"]) == {"mean", "l2s"}
    assert kept["calibration"] == found.provenance["calibration"]
    where = {
        (row[0]["note"]["write"], row[0]["note"]["read"]) for name, row in kept["methods"].items() if name != "none"
    }
    assert len(where) == 1 and where <= set(LAYERS)
    for name in ("mean", "l2s"):
        curve = kept["calibration"][name]["curve"]
        assert kept["methods"][name][0]["note"]["alpha"] in [point["alpha"] for point in curve[1:]]
    assert kept["methods"]["norm_rnd"][0]["note"]["alpha"] == kept["lineup"]["alphas"]["l2s"]
    assert kept["lineup"]["write"] == where.pop()[0]
    # Only the chosen layers are searched for the other methods.
    assert len({point["name"] for point in kept["calibration"]["l2s"]["curve"][1:]}) == 2
    assert len({point["name"] for point in kept["calibration"]["mean"]["curve"][1:]}) == 1
    assert strengths.as_json() == kept["calibration"]


def test_one_object_serves_several_evaluations(vlm: sp.AttachedModel, tmp_path: Path):
    strengths = quick(layers=LAYERS[:1], max_points=1)
    for name in ("l2s", "mean"):
        run(vlm, Colours(TEST, validation=HELD), tmp_path / name, strengths, replace(LINEUP, methods=(name,)))
    assert list(strengths.found) == ["mean"]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"methods": ("l2s",)}, {"methods": ("l2s",), "hidden": 5}),
        ({"methods": ("l2s",)}, {"methods": ("l2s",), "seeds": (3,)}),
        ({"methods": ("mean",)}, {"methods": ("mean",), "positions": "last_prompt"}),
        (
            {"methods": ("actadd",), "write": "resid_post.1", "pair": PAIR},
            {"methods": ("actadd",), "write": "resid_post.1", "pair": PAIR[::-1]},
        ),
    ],
)
def test_a_search_of_another_fit_is_not_taken_up(
    vlm: sp.AttachedModel, tmp_path: Path, first: dict[str, Any], then: dict[str, Any]
):
    def choose(changes: dict[str, Any]) -> None:
        strengths = quick(layers=LAYERS[:1], max_points=1)
        lineup = replace(LINEUP, **changes)
        strengths.choose(vlm, Colours(TEST, validation=HELD), lineup, tmp_path, progress=False)

    choose(first)
    with pytest.raises(JobError, match="another job"):
        choose(then)


def curve(*points: tuple[str, float, float, bool]) -> Calibration:
    """A calibration that would rather not steer."""
    one = Interval(0.0, 0.0, 0.0)
    made = [
        Point(name, alpha, replace(one, value=value), one, feasible, 2, np.zeros(2), np.zeros(2), {})
        for name, alpha, value, feasible in (("", 0.0, 0.5, True), *points)
    ]
    return Calibration(tuple(made), 0.0, "", None, "no", 0.0, 0, KLBound(), True)


@pytest.mark.parametrize(
    ("points", "place", "alpha"),
    [
        ((("A", 1.0, 0.1, True), ("B", 2.0, 0.4, True), ("B", 4.0, 0.9, False)), LAYERS[1], 2.0),
        ((("A", 1.0, 0.4, True), ("B", 2.0, 0.1, True)), LAYERS[0], 1.0),
        ((("A", 1.0, 0.4, False), ("B", 2.0, 0.1, False)), LAYERS[0], 1.0),
    ],
)
def test_what_would_rather_be_left_out_is_tested_at_its_best_point_layers_included(
    vlm: sp.AttachedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: Any, place: Any, alpha: float
):
    names = {"A": "resid_post.1 from resid_post.1", "B": "resid_post.2 from resid_post.1"}
    made = curve(*((names[name], *rest) for name, *rest in points))
    monkeypatch.setattr(module, "calibrate", lambda *args, **options: made)
    lineup = replace(LINEUP, methods=("l2s",))
    chosen, fitting = quick().choose(vlm, Colours(TEST, validation=HELD), lineup, tmp_path, progress=False)
    assert (chosen.write, chosen.read) == place
    assert chosen.of("l2s") == alpha and fitting.lineup == chosen


def test_behaviours_that_only_validation_tells_are_not_steered(vlm: sp.AttachedModel, tmp_path: Path):
    benchmark = Colours(TEST, validation=HELD)
    held = benchmark.training.validation if benchmark.training else None
    assert held is not None and held.training is not None
    held.training = replace(held.training, told=dict.fromkeys(held.training.told, "rare"))
    strengths = quick(layers=LAYERS[:1], max_points=1)
    strengths.choose(vlm, benchmark, replace(LINEUP, methods=("mean_ba",)), tmp_path, progress=False)
    unsteered, steered = strengths.found["mean_ba"].curve
    assert steered.texts == unsteered.texts and steered.damage.value == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("lineup", "benchmark", "strengths", "message"),
    [
        (LINEUP, Colours(TEST), {}, "colours has no validation items to choose strengths on; give alpha"),
        (replace(LINEUP, methods=("norm_rnd",)), Colours(TEST, validation=HELD), {}, "have no strength to choose"),
        (LINEUP, Colours(TEST, validation=HELD), {"layers": ()}, "write"),
        (replace(LINEUP, methods=("l2s", "prompt"), prompt=None), Colours(TEST, validation=HELD), {}, "no instruction"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_is_refused_before_any_work(
    vlm: sp.AttachedModel, tmp_path: Path, lineup: Lineup, benchmark: Colours, strengths: Any, message: str
):
    benchmark.prompt = ""
    with pytest.raises(InputError, match=message):
        run(vlm, benchmark, tmp_path, quick(**strengths), lineup)
    assert not list(tmp_path.iterdir())


def test_p2s_needs_the_pairs_of_the_validation_items(vlm: sp.AttachedModel, tmp_path: Path):
    benchmark = Colours(TEST, validation=HELD)
    held = benchmark.training.validation if benchmark.training else None
    assert held is not None and held.training is not None
    held.training = replace(held.training, oracle=())
    with pytest.raises(InputError, match="no contrastive pairs of its validation items; give alpha for p2s"):
        run(vlm, benchmark, tmp_path, quick(), replace(LINEUP, methods=("p2s",)))
