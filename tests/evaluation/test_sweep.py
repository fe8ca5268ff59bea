"""Grids of strengths and layers: cells against plain calls, marks, choices, and pictures that can be read in grey."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from _tiny import draw

import steer_plugin as sp
from steer_plugin.demo.data import held_out_items
from steer_plugin.errors import InputError, JobError
from steer_plugin.evaluation.asking import Method, answers
from steer_plugin.evaluation.bounds import KLBound, QualityBound
from steer_plugin.evaluation.intervals import Interval
from steer_plugin.evaluation.sweep import Sweep, sweep

ALPHAS = (0.5, 2.0, 6.0)


@cache
def pocket() -> tuple[Any, list[Any], dict[str, Any]]:
    model, processor = sp.pocket.load()
    items = held_out_items(sp.pocket.World(0), 3, "validation")
    layers = {f"layer {n}": sp.MeanSteering(draw(128, seed=n, scale=0.5), f"resid_post.{n}") for n in (1, 2)}
    return sp.attach(model, processor), items, layers


def yes(texts: Any) -> list[float]:
    return [float(texts[item.key].lower().startswith("yes")) for item in pocket()[1]]


def swept(**more: Any) -> Sweep:
    vlm, items, layers = pocket()
    settings = {"max_new_tokens": 3, "batch_size": 4, "progress": False, "groups": [i.group for i in items]}
    return sweep(vlm, layers, items, yes, ALPHAS, **{**settings, "damage": KLBound(1.0), **more})


@cache
def made() -> Sweep:
    return swept()


def test_every_cell_is_what_was_asked_for() -> None:
    vlm, items, layers = pocket()
    found = made()
    assert found.names == ("layer 1", "layer 2") and found.alphas == ALPHAS
    assert [one.where for one in found.points] == [(name, alpha) for name in layers for alpha in ALPHAS]
    for name, alpha in (("layer 1", 6.0), ("layer 2", 2.0)):
        method = Method("m", lambda ids, name=name, alpha=alpha: layers[name].with_alpha(alpha))
        expected = answers(vlm, items, method, batch_size=4, max_new_tokens=3, progress=False)
        assert found.at(name, alpha).texts == expected
        assert found.at(name, alpha).behaviour.value == np.mean(yes(expected))
    for name in layers:
        damage = [found.at(name, alpha).damage.value for alpha in ALPHAS]
        assert 0 < damage[0] < damage[1] < damage[2]
    assert {one.feasible for one in found.points} == {True, False}
    assert found.reused > 0.85


def test_prompts_run_once_without_memory_to_keep_them() -> None:
    assert swept(keep_bytes=0).reused == made().reused


def test_the_best_within_a_bound() -> None:
    found = made()
    assert found.best(1e-9).why.startswith("No steering: no strength keeps")
    chosen = found.best()
    assert chosen.point.damage.value <= 1.0
    assert found.best(KLBound(1.0)) == chosen
    loose = found.best(1000.0)
    assert loose.point.behaviour.value >= chosen.point.behaviour.value
    with pytest.raises(InputError, match=r"sweep\(\.\.\., damage=QualityBound"):
        found.best(QualityBound(yes, 0.5))
    with pytest.raises(InputError, match="bound=-1"):
        found.best(-1)


def test_tables() -> None:
    found = made()
    frame = found.to_frame()
    assert frame.shape[0] == 7 and list(frame["alpha"])[:3] == [0.0, 0.5, 2.0]
    assert {"behaviour", "damage_low", "feasible", "n"} <= set(frame.columns)
    assert len(json.loads(json.dumps(found.as_json(), allow_nan=False))["cells"]) == 6


@pytest.mark.parametrize("metric", ["behaviour", "damage"])
def test_the_heat_map_shows_every_value(metric: Any) -> None:
    found = made()
    (axes,) = found.plot(metric).axes
    values = [getattr(one, metric).value for one in found.points]
    assert [text.get_text() for text in axes.texts] == [f"{value:#.3g}" for value in values]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.5", "2", "6"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["layer 1", "layer 2"]
    hatched = [patch.get_xy() for patch in axes.patches if patch.get_hatch()]
    broken = [(i % 3 - 0.5, i // 3 - 0.5) for i, one in enumerate(found.points) if not one.feasible]
    assert hatched == broken and broken
    # Grey as printed: each number differs from its cell by more than half of all there is between black and white.
    image = axes.images[0]
    for text, value in zip(axes.texts, values, strict=True):
        red, green, blue, _ = image.cmap(image.norm(value))
        assert abs((0.3 * red + 0.6 * green + 0.1 * blue) - (text.get_color() == "w")) > 0.49


def test_damage_beyond_all_measure_is_shown() -> None:
    found = made()
    endless = replace(found.points[-1], damage=Interval(math.inf, math.inf, math.inf), feasible=False)
    (axes,) = replace(found, points=(*found.points[:-1], endless)).plot("damage").axes
    assert axes.texts[-1].get_text() == "inf" and axes.texts[-1].get_color() == "w"
    assert endless.as_json()["damage"] is None


def test_a_file_is_taken_up(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sweep.jsonl"
    whole = swept(out=path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    again = swept(out=path)
    assert [(one.where, one.texts) for one in again.points] == [(one.where, one.texts) for one in whole.points]
    assert path.read_bytes().count(b"\n") == data.count(b"\n")
    with pytest.raises(JobError, match="max_new_tokens is '3' there and '4' here"):
        swept(out=path, max_new_tokens=4)
    monkeypatch.setattr(type(pocket()[0]), "prefix", lambda *a, **k: pytest.fail("nothing is left to run"))
    assert swept(out=path, damage=KLBound(3.0)).at("layer 2", 6.0).texts == whole.at("layer 2", 6.0).texts


@pytest.mark.parametrize("alphas", [(), (0.0, 1.0), (1.0, 1.0), (float("nan"),)])
def test_strengths_that_cannot_be_swept(alphas: tuple[float, ...]) -> None:
    vlm, items, layers = pocket()
    with pytest.raises(InputError, match="different finite numbers other than 0"):
        sweep(vlm, layers, items, yes, alphas, progress=False)


def test_unknown_cells_and_metrics() -> None:
    with pytest.raises(InputError, match="no cell 'layer 9'"):
        made().at("layer 9", 2.0)
    with pytest.raises(InputError, match="no cell 'layer 1', alpha 3"):
        made().at("layer 1", 3)
