"""Choosing a strength: known curves against brute force, points against plain calls, kills against whole runs."""

from __future__ import annotations

import json
import math
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _forked
import numpy as np
import pytest
from _tiny import draw
from hypothesis import given
from hypothesis import strategies as st

import steer_plugin as sp
from steer_plugin.demo.data import held_out_items
from steer_plugin.errors import FrameworkError, InputError, JobError
from steer_plugin.evaluation.asking import distinct
from steer_plugin.evaluation.bounds import UNSTEERED, KLBound, Point, QualityBound, at_strength, identity, named
from steer_plugin.evaluation.calibrate import Search, calibrate
from steer_plugin.evaluation.choosing import choose, falling
from steer_plugin.evaluation.costs import answer_tokens, forced_costs
from steer_plugin.evaluation.intervals import Interval, bootstrap_interval
from steer_plugin.evaluation.points import Points
from steer_plugin.evaluation.task import Task

# -- known curves ----------------------------------------------------------------------------------------------------

Curve = Callable[[float], float]


class Known(Points):
    """Points of curves that are known: every item scores as the curve says, give or take a fixed share of items."""

    def __init__(self, behaviour: Mapping[str, Curve], damage: Mapping[str, Curve], limit: float, noise: float = 0.0):
        bound = KLBound(limit)
        self.task: Any = SimpleNamespace(steerings=dict(behaviour), bound=bound, groups=None, seed=0, level=0.95)
        self.behaviour, self.damage = {"": lambda a: 0.3, **behaviour}, {"": lambda a: 0.0, **damage}
        self.spread = noise * np.random.default_rng(0).standard_normal(50)
        self._told = {}
        self.looked: list[tuple[str, float]] = []
        self.rounds: list[list[tuple[str, float]]] = []

    def at(self, wanted: Sequence[tuple[str, float]]) -> list[Point]:
        self.looked += [one for one in wanted if one[1]]
        self.rounds.append(list(wanted))
        return [self.made(*one) for one in wanted]

    def difference(self, first: Point, second: Point, what: str = "scores", level: float | None = None) -> Interval:
        if self.spread.any() or np.ptp(first.scores - second.scores) > 1e-9:
            return super().difference(first, second, what, level)
        gap = float(getattr(first, what)[0] - getattr(second, what)[0])
        return Interval(gap, gap, gap)

    def made(self, name: str, alpha: float) -> Point:
        value, cost = self.behaviour[name](alpha), self.damage[name](alpha)
        scores = value + self.spread * (1 if alpha else -1)
        costs = np.full(50, cost)
        told, spent = (Interval(x, x, x) for x in (float(scores.mean()), cost))
        return Point(name, alpha, told, spent, cost <= self.task.bound.limit, 50, scores, costs, {})


def searched(points: Known, low: float, high: float, tolerance: float = 0.1, most: int = 60) -> Search:
    search = Search(points, low, high, tolerance, most)
    search.run()
    return search


@given(
    peak=st.floats(0.3, 40), width=st.floats(0.6, 3), edge=st.floats(0.3, 40), tolerance=st.sampled_from([0.05, 0.3])
)
def test_a_peak_within_a_bound_is_found(peak: float, width: float, edge: float, tolerance: float) -> None:
    """Brute force over a fine grid: the search ends within its tolerance of the best feasible strength."""
    low, high = 0.25, 32.0

    def curve(a: float) -> float:
        return 0.9 - abs(math.log(a / peak)) / (20 * width) if a else 0.3

    points = Known({"it": curve}, {"it": lambda a: a / edge}, 1.0)
    search = searched(points, low, high, tolerance)
    fine = np.exp(np.linspace(math.log(low), math.log(min(high, edge)), 4001))
    truth = float(fine[np.argmax([curve(a) for a in fine])])
    found = choose(points, search.steered).point
    assert found.feasible and low <= found.alpha <= min(high, edge)
    # Three digits of rounding beside the tolerance.
    assert abs(math.log(found.alpha / truth)) <= math.log(1 + tolerance) + 0.006
    assert len(points.looked) == len(set(points.looked)) <= 8 + 2 * math.ceil(math.log2(math.log(2) / tolerance) + 2)


def test_the_bound_is_bisected_where_the_best_is_beside_it() -> None:
    points = Known({"it": lambda a: 0.3 + a / 100}, {"it": lambda a: a * a}, 50.0)  # edge at 7.07
    search = searched(points, 1.0, 64.0, 0.05)
    assert [alpha for _, alpha in points.looked[:4]] == [1.0, 2.0, 4.0, 8.0]
    found = choose(points, search.steered)
    assert 7.07 / 1.05 < found.point.alpha <= 7.07
    assert "It is the best of" in found.why and "at most 50" in found.why
    assert search.reached().startswith("The bound: for 'it' it breaks at alpha 7.")


def test_it_does_not_climb_past_a_peak_that_is_told() -> None:
    points = Known({"it": lambda a: 0.5 - abs(math.log2(a / 4)) / 20}, {"it": lambda a: 0.0}, 1.0)
    searched(points, 1.0, 1024.0)
    assert max(alpha for _, alpha in points.looked) == 8.0


def test_on_a_plateau_the_gentlest_is_taken() -> None:
    points = Known({"it": lambda a: 0.9 if a >= 3 else 0.5}, {"it": lambda a: a / 100}, 1.0)
    search = searched(points, 1.0, 16.0, 0.05)
    found = choose(points, search.steered)
    assert 3 <= found.point.alpha <= 3 * 1.05
    assert falling(points, search.steered) == ""


def test_what_is_not_the_best_but_as_good() -> None:
    """The best scores more by a little, but not on enough items to be told; the gentler one is taken."""
    points = Known({"it": lambda a: 0.9}, {"it": lambda a: a / 100}, 1.0)
    one, two = points.made("it", 1.0), points.made("it", 2.0)
    two.scores[:] += np.where(np.arange(50) % 2, 0.5, -0.49)
    better = bootstrap_interval(two.scores, seed=0)
    two = Point("it", 2.0, better, two.damage, True, 50, two.scores, two.costs, {})
    found = choose(points, [one, two])
    assert found.point is one
    assert "of 2 such points the chosen one does the least damage" in found.why
    assert choose(points, [two]).point is two


def test_no_steering_where_nothing_helps() -> None:
    points = Known({"it": lambda a: 0.3}, {"it": lambda a: a}, 4.0, noise=0.2)
    found = choose(points, searched(points, 1.0, 64.0).steered)
    assert found.point.where == UNSTEERED
    assert found.why.startswith("No steering: alpha") and "cannot be told from 0" in found.why


def test_no_steering_where_every_strength_breaks_the_bound() -> None:
    points = Known({"it": lambda a: 0.9}, {"it": lambda a: 10.0}, 1.0)
    search = searched(points, 1.0, 64.0)
    assert points.looked == [("it", 1.0)]
    assert choose(points, search.steered).why == (
        "No steering: no strength keeps the KL to unsteered (nats per token) within 1."
    )


def test_of_several_choices_the_best_two_are_refined() -> None:
    heights = {"low": 0.5, "high": 0.9, "near": 0.9, "broken": 0.9}
    curves = {n: (lambda a, h=h: h - abs(math.log2(a / 3)) / 20) for n, h in heights.items()}
    damage = {n: (lambda a, n=n: 9.0 if n == "broken" else a / 100) for n in heights}
    points = Known(curves, damage, 1.0)
    search = searched(points, 1.0, 16.0, 0.1)
    assert points.rounds[0] == [(name, 1.0) for name in heights]  # one round for all: batches are shared
    assert points.rounds[1] == [("low", 4.0), ("high", 4.0), ("near", 4.0)]
    tried = {name: len(found) for name, found in search.tried.items()}
    assert tried["broken"] == 1 and tried["low"] == 3 and tried["high"] == tried["near"] > 4
    assert abs(math.log(choose(points, search.steered).point.alpha / 3)) < math.log(1.1) + 0.006


def test_it_ends_at_the_number_of_points() -> None:
    points = Known({"it": lambda a: a, "other": lambda a: a}, {"it": lambda a: 0.0, "other": lambda a: 0.0}, 1.0)
    assert len(searched(points, 1e-6, 1e6, 0.01, most=7).steered) == 7


def test_damage_that_falls_is_reported() -> None:
    points = Known({"it": lambda a: a}, {"it": lambda a: 1 / a}, 2.0)
    said = falling(points, searched(points, 1.0, 4.0).steered)
    assert said.startswith("Damage FELL from alpha 1 to") and "not looked at" in said


# -- points of a model -----------------------------------------------------------------------------------------------


@cache
def pocket() -> tuple[Any, list[Any], Any]:
    model, processor = sp.pocket.load()
    vlm = sp.attach(model, processor)
    items = held_out_items(sp.pocket.World(0), 4, "validation")
    return vlm, items, sp.MeanSteering(draw(128, seed=3), "resid_post.1")


def yes(items: Sequence[Any]) -> Callable[[Mapping[str, str]], list[float]]:
    return lambda texts: [float(texts[item.key].lower().startswith("yes")) for item in items]


def words(items: Sequence[Any]) -> Callable[[Mapping[str, str]], list[float]]:
    return lambda texts: [float(len(texts[item.key].split())) for item in items]


def points_of(bound: Any = None, steering: Any = None, **more: Any) -> Points:
    vlm, items, mean = pocket()
    steered = named(mean if steering is None else steering)
    settings = {"groups": [i.group for i in items], "batch_size": 8, "max_new_tokens": 5, "progress": False, **more}
    return Points(Task(vlm, items, yes(items), bound or KLBound(), steered, **settings))


def test_a_point_is_what_plain_calls_say() -> None:
    vlm, items, mean = pocket()
    points = points_of()
    plain, steered = points.at([UNSTEERED, ("steering", 2.0)])
    asked = distinct(items)
    assert len(asked) < len(items)
    for start in range(0, len(asked), 8):
        batch = asked[start : start + 8]
        inputs = vlm.inputs([item.text for item in batch], [item.load_images() for item in batch])
        width = inputs["input_ids"].shape[1]
        own = vlm.generate(**inputs, max_new_tokens=5, do_sample=False)
        other = vlm.generate(**inputs, steering=mean * 2.0, max_new_tokens=5, do_sample=False)
        kl = forced_costs(vlm, inputs, answer_tokens(vlm, inputs, own), mean * 2.0).kl
        for row, item in enumerate(batch):
            assert plain.texts[item.key] == vlm.decode(own[:, width:])[row]
            assert steered.texts[item.key] == vlm.decode(other[:, width:])[row]
            places = [i for i, one in enumerate(items) if one.key == item.key]
            np.testing.assert_allclose(steered.costs[places], kl[row], rtol=1e-3, atol=1e-5)
    assert steered.texts != plain.texts
    groups = [item.group for item in items]
    assert steered.damage == bootstrap_interval(steered.costs, groups, seed=0)
    assert steered.behaviour == bootstrap_interval(yes(items)(steered.texts), groups, seed=0)
    assert plain.damage == Interval(0.0, 0.0, 0.0) and plain.n == steered.n == len(items)
    assert points.reused > 0.5


@pytest.mark.parametrize("where", ["everywhere", "last_prompt|generated"])
def test_the_same_with_and_without_kept_prompts(where: str) -> None:
    mean = sp.MeanSteering(draw(128, seed=3), "resid_post.1", positions=where)
    places = [("steering", 1.0), ("steering", 3.0)]
    kept, scarce = points_of(steering=mean), points_of(steering=mean, keep_bytes=0)
    for one, two in zip(kept.at(places), scarce.at(places), strict=True):
        assert one.texts == two.texts
        np.testing.assert_allclose(one.costs, two.costs, atol=1e-5)
    assert kept.asked == scarce.asked
    if where == "everywhere":
        # The unsteered answers and their logits alone share a prompt.
        assert kept.ran == scarce.ran
        assert kept.reused == pytest.approx(1 / 6, abs=0.02)
        return
    # Both points are asked for at once, batch by batch: that needs no memory; later ones do.
    assert kept.ran == scarce.ran
    kept.at([("steering", 2.0)])
    scarce.at([("steering", 2.0)])
    assert kept.reused > 0.8 > scarce.reused


def test_a_quality_is_a_relative_loss() -> None:
    _, items, _ = pocket()
    points = points_of(QualityBound(words(items), 0.1), max_new_tokens=8)
    plain, steered = points.at([UNSTEERED, ("steering", 40.0)])
    before, after = (np.array(words(items)(one.texts)) for one in (plain, steered))
    assert plain.damage.value == 0.0 and plain.feasible
    assert steered.damage.value == pytest.approx(1 - after.mean() / before.mean()) != 0
    np.testing.assert_array_equal(steered.costs, before - after)
    assert steered.feasible is (steered.damage.value <= 0.1)


def test_items_that_do_not_count() -> None:
    vlm, items, mean = pocket()
    half = lambda texts: [math.nan if i % 2 else v for i, v in enumerate(yes(items)(texts))]  # noqa: E731
    task = Task(vlm, items, half, KLBound(), {"it": mean}, batch_size=8, max_new_tokens=3, progress=False)
    plain = Points(task).unsteered
    assert plain.n == len(items) // 2
    assert plain.behaviour.value == np.nanmean(half(plain.texts))


def test_a_function_steers_by_ids() -> None:
    _, items, mean = pocket()
    asked: list[str] = []

    def maker(ids: Sequence[str], alpha: float) -> sp.Steerable | None:
        asked.extend(ids)
        return None if alpha < 1 else mean * alpha

    points = points_of(steering={"fn": maker, "mean": mean})
    none, some, same = points.at([("fn", 0.5), ("fn", 2.0), ("mean", 2.0)])
    assert none.texts == points.unsteered.texts and none.damage.value == 0.0
    assert some.texts == same.texts != none.texts
    assert set(asked) == {item.id for item in distinct(items)}
    ready = at_strength(maker, 2.0)
    assert not isinstance(ready, sp.Steerable) and ready is not None
    assert isinstance(ready(["a"]), sp.Intervention)


def test_calibrating_a_model(tmp_path: Path) -> None:
    """A direction that says yes: the search raises the share of yes as far as the bound lets it."""
    vlm, items, _ = pocket()
    towards = {"layer 1": toward_yes("resid_post.1"), "layer 2": toward_yes("resid_post.2")}
    found = calibrate(
        vlm, towards, items, yes(items), bound=KLBound(1.0), groups=[i.group for i in items], alphas=(0.5, 16),
        batch_size=8, max_new_tokens=2, tolerance=0.5, out=tmp_path / "points.jsonl", progress=False,
    )  # fmt: skip
    assert found.name in towards and found.alpha > 0
    assert found.point.behaviour.value > found.curve[0].behaviour.value
    assert found.point.damage.value <= 1.0 and found.point.feasible
    assert [p.where for p in found.curve] == sorted({p.where for p in found.curve})
    assert found.reused > 0.7
    assert isinstance(found.steering, sp.MeanSteering) and found.steering.alpha == found.alpha
    inputs = vlm.inputs(items[0].text, items[0].load_images())
    ids = vlm.generate(**inputs, steering=found.steering, max_new_tokens=2, do_sample=False)
    assert vlm.decode(ids[:, inputs["input_ids"].shape[1] :])[0] == found.point.texts[items[0].key]
    assert f"alpha {found.alpha:g} of {found.name!r}" in found.why and "against" in found.why
    shown = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert shown["alpha"] == found.alpha and len(shown["curve"]) == len(found.curve)
    frame = found.to_frame()
    assert list(frame["alpha"]) == [p.alpha for p in found.curve]
    upper, lower = found.plot().axes
    assert "behaviour" in upper.get_ylabel() and "KL" in lower.get_ylabel()


def toward_yes(site: str) -> sp.MeanSteering:
    """Mean difference between questions answered yes and no, read at the last prompt token."""
    vlm, items, _ = pocket()
    asked = distinct(items)
    inputs = vlm.inputs([item.text for item in asked], [item.load_images() for item in asked])
    hidden = vlm.cache(inputs, site, "last_prompt")[sp.Site.parse(site)][:, 0]
    label = [item.label for item in asked]
    return sp.MeanSteering(hidden[label].mean(0) - hidden[[not one for one in label]].mean(0), site)


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_file_is_taken_up_after_any_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places, path = [UNSTEERED, ("steering", 1.0), ("steering", 2.0)], tmp_path / "points.jsonl"
    whole = points_of(out=path).at(places)
    data = path.read_bytes()
    rows = data.count(b"\n") - 1
    for cut in (len(data) - 7, data.index(b"\n") + 30, data.index(b"\n") // 2):
        path.write_bytes(data[:cut])
        again = points_of(out=path)
        for one, two in zip(again.at(places), whole, strict=True):
            assert (one.where, one.texts) == (two.where, two.texts)
            np.testing.assert_allclose(one.costs, two.costs, atol=1e-6)
        assert path.read_bytes().count(b"\n") - 1 == rows
    vlm = pocket()[0]
    monkeypatch.setattr(type(vlm), "prefix", lambda *a, **k: pytest.fail("nothing is left to run"))
    assert [one.texts for one in points_of(out=path).at(places)] == [one.texts for one in whole]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("max_new_tokens", {"max_new_tokens": 4}),
        ("batch_size", {"batch_size": 4}),
        ("damage", {"bound": QualityBound(lambda texts: [1.0])}),
        ("steering", {"steering": sp.MeanSteering(draw(128, seed=4), "resid_post.1")}),
        ("steering", {"steering": sp.MeanSteering(draw(128, seed=3), "resid_post.1", positions="last_prompt")}),
        ("job", {"job": {"vectors": "others"}}),
    ],
)
def test_other_settings_are_another_job(tmp_path: Path, name: str, more: dict[str, Any]) -> None:
    points_of(out=tmp_path / "points.jsonl")
    with pytest.raises(JobError, match=f"holds points of another job: {name}"):
        points_of(out=tmp_path / "points.jsonl", **more)


def test_another_bound_or_search_goes_on_with_the_same_file(tmp_path: Path) -> None:
    """Limits, strengths and seeds choose among points; they do not change them."""
    points_of(KLBound(0.5), out=tmp_path / "points.jsonl").at([("steering", 1.0)])
    lines = (tmp_path / "points.jsonl").read_text().count("\n")
    points_of(KLBound(2.0), out=tmp_path / "points.jsonl", seed=3).at([("steering", 1.0)])
    assert (tmp_path / "points.jsonl").read_text().count("\n") == lines


@pytest.mark.slow
def test_a_killed_process_is_taken_up(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys
        sys.path.insert(0, sys.argv[2])
        from test_calibrate import calibrate, pocket, yes, KLBound
        from pathlib import Path
        vlm, items, mean = pocket()
        found = calibrate(vlm, mean, items, yes(items), bound=KLBound(9.0), alphas=(1.0, 8.0), batch_size=4,
                          max_new_tokens=4, out=Path(sys.argv[1]), progress=False)
        print([p.where for p in found.curve], [p.damage.value for p in found.curve], found.alpha)
    """)
    here, path, whole = Path(__file__).parent, tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    job = tmp_path / "job.py"
    job.write_text(script)
    with _forked.start(job, path, here) as running:
        while running.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 4):
            time.sleep(0.001)
        running.send_signal(signal.SIGKILL)
        running.wait()
    lines = path.read_bytes().count(b"\n")
    resumed, straight = (_forked.start(job, one, here).finish() for one in (path, whole))
    assert resumed == straight
    assert 4 <= lines < path.read_bytes().count(b"\n") == whole.read_bytes().count(b"\n")


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "more"),
    [
        ("alphas=0", {"alphas": (0, 4)}),
        ("alphas=4", {"alphas": (4, 1)}),
        ("tolerance=0", {"tolerance": 0}),
        ("max_points=0", {"max_points": 0}),
        ("batch_size=0", {"batch_size": 0}),
        ("max_new_tokens=0", {"max_new_tokens": 0}),
        ("keep_bytes=-1", {"keep_bytes": -1}),
        ("level=95", {"level": 95}),
        ("got 2 groups for", {"groups": ["a", "b"]}),
        ("behaviour returned values of shape", {"behaviour": lambda texts: [1.0]}),
        ("names no choice", {"steering": {"": sp.add("resid_post.1", draw(128))}}),
        ("got no steering", {"steering": {}}),
        ("'two' is a int; give a steering", {"steering": {"one": sp.add("resid_post.1", draw(128)), "two": 3}}),
        ("at least one item", {"items": []}),
    ],
)
def test_bad_input(message: str, more: dict[str, Any]) -> None:
    vlm, items, mean = pocket()
    given = {"steering": mean, "items": items, "behaviour": yes(items), **more}
    with pytest.raises(InputError, match=message):
        calibrate(
            vlm, given.pop("steering"), given.pop("items"), given.pop("behaviour"), progress=False,
            **{"max_new_tokens": 2, **given},
        )  # fmt: skip


def test_bad_bounds() -> None:
    _, items, _ = pocket()
    for limit in (0, -1, math.inf, math.nan):
        with pytest.raises(InputError, match="limit="):
            KLBound(limit)
    for drop in (0, 1, math.nan):
        with pytest.raises(InputError, match="drop="):
            QualityBound(yes(items), drop)
    with pytest.raises(InputError, match="mean quality of 0"):
        points_of(QualityBound(lambda texts: [0.0] * len(items)), max_new_tokens=2).at([UNSTEERED])


def test_identity_knows_its_tensors() -> None:
    mean = sp.MeanSteering(draw(128, seed=3), "resid_post.1")
    same, other = (sp.MeanSteering(draw(128, seed=s), "resid_post.1", alpha=2.0) for s in (3, 4))
    assert identity(mean) == identity(same) != identity(other)
    assert identity(mean.intervention) != identity(other.intervention)
    assert identity(lambda ids, alpha: None)["function"].endswith("<lambda>")


@pytest.mark.parametrize("module", ["pandas", "matplotlib"])
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    vlm, items, mean = pocket()
    found = calibrate(vlm, mean, items, yes(items), alphas=(1, 1), max_new_tokens=1, progress=False)
    for name in [one for one in sys.modules if one.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(FrameworkError, match=r"steer-plugin\[analysis\]"):
        found.to_frame() if module == "pandas" else found.plot()


def test_the_same_vector_keeps_its_class() -> None:
    vector = sp.NormRandom(draw(128), "resid_post.1", alpha=1.0)
    stronger = vector.with_alpha(3.0)
    assert type(stronger) is sp.NormRandom and (stronger.alpha, vector.alpha) == (3.0, 1.0)
    assert stronger.vector is vector.vector
    with pytest.raises(InputError, match="alpha must be a finite number"):
        vector.with_alpha(math.nan)
