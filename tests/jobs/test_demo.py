"""The main job, small: what it writes, that it resumes, and that its numbers are those of its own answers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import steer_plugin as sp
from steer_plugin.demo import DemoConfig, run_demo
from steer_plugin.demo.captions import METRICS as CHAIR
from steer_plugin.demo.captions import CaptionConfig, CaptionItem, counted
from steer_plugin.demo.data import fitting_items, held_out_items, wellformed
from steer_plugin.demo.existence import METHODS, ExistenceConfig
from steer_plugin.demo.figures import changed_items, write_figures
from steer_plugin.demo.report import report_json, write_report
from steer_plugin.demo.requests import METRICS, RequestItem, rates
from steer_plugin.demo.safety import SafetyConfig, gentlest_of, worth

EXISTENCE = ExistenceConfig(
    train_pictures=60, validation_pictures=10, test_pictures=20, layers=((1, 2), (2, 3)), alphas=(2.0, 4.0)
)
SAFETY = SafetyConfig(train_pictures=60, validation_pictures=10, test_pictures=15, layers=((2, 3),), alphas=(0.35, 0.5))
CAPTIONS = CaptionConfig(train_pictures=60, validation_pictures=10, test_pictures=15, layers=((2, 3),), alphas=(0.5,))
SMALL = DemoConfig(existence=EXISTENCE, safety=SAFETY, captions=CAPTIONS)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("demo")
    result = run_demo(out, SMALL, progress=False)
    write_report(result, out)
    return out, result


@pytest.mark.slow
def test_report_holds_every_method_and_subset_and_agrees_with_the_answers(done):
    out, result = done
    report = json.loads((out / "report.json").read_text())
    for subset in ("random", "popular", "adversarial", "mean"):
        assert set(report["pope"][subset]) == set(METHODS)
    found = result.existence
    # POPE's rule: yes, unless a no stands in the first sentence; so small a fit may leave other answers than these two.
    said = [re.search(r"\bno\b", found.texts["l2s"][item.key].split(".")[0]) is None for item in found.items]
    right = [yes == item.label for yes, item in zip(said, found.items, strict=True)]
    assert report["pope"]["mean"]["l2s"]["accuracy"] == pytest.approx(100 * np.mean(right))
    assert report["seeds"]["questions"] == 0
    # The layers whose best strength answers most validation questions; the first of them if they are as good.
    best = {(w, r): max(found.validation[f"l2s.write{w}.read{r}"].values()) for w, r in EXISTENCE.layers}
    write, read = max(best, key=lambda one: best[one])
    assert report["layers"] == {"write": f"resid_post.{write}", "read": f"resid_post.{read}"}
    assert {"torch", "transformers"} <= set(report["versions"])
    assert report["alpha"]["l2s"] in EXISTENCE.alphas
    assert report["times"]["total"] > 0
    for row in ("| l2s", "| l2s_plain", "| mean_ba", "CHAIR_i"):
        assert row in (out / "report.md").read_text()


@pytest.mark.slow
def test_safety_and_caption_rates_are_those_of_the_answers(done):
    out, result = done
    report = json.loads((out / "report.json").read_text())
    for method in ("none", "mean", "l2s"):
        found = rates(result.safety.items, result.safety.texts[method])
        for metric in METRICS:
            assert report["safety"][method][metric] == pytest.approx(100 * found[metric])
        rows = counted(result.captions.items, result.captions.texts[method])
        for metric in CHAIR:
            hits, total = rows[metric].sum(axis=0)
            assert report["chair"][method][metric] == pytest.approx(100 * hits / max(1, total))
    assert report["safety_details"]["layers"] == {"write": "resid_post.2", "read": "resid_post.3"}
    assert set(report["safety_details"]["elsewhere"]) == set(SAFETY.positions) - {result.safety.positions}


@pytest.mark.slow
def test_saved_networks_are_the_ones_that_were_evaluated(done):
    out, result = done
    l2s = sp.L2S.load(out / "l2s")
    assert l2s.alpha == result.existence.alphas["l2s"]
    assert str(l2s.positions) == "last_prompt"
    safe = sp.L2S.load(out / "l2s-safety")
    assert safe.alpha == result.safety.alphas["l2s"]
    assert str(safe.positions) == str(sp.Positions.parse(result.safety.positions))
    item = next(item for item in result.safety.items if item.request.kind == "harmful")
    vlm = sp.attach(*sp.pocket.load())
    inputs = vlm.inputs(item.text, item.request.image)
    ids = vlm.generate(steering=safe, **inputs, max_new_tokens=16, do_sample=False)
    assert vlm.decode(ids[:, inputs["input_ids"].shape[1] :]) == [result.safety.texts["l2s"][item.key]]


@pytest.mark.slow
def test_figures_are_written_and_show_the_changed_answers(done, tmp_path: Path):
    _, result = done
    paths = write_figures(result, tmp_path)
    assert [path.name for path in paths] == ["accuracy.png", "examples.png", "p2s_pca.png", "safety.png", "chair.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)
    for item in changed_items(result.existence):
        assert result.existence.texts["none"][item.key] != result.existence.texts["l2s"][item.key]


@pytest.mark.slow
def test_a_second_run_uses_what_is_there_and_other_settings_are_refused(done, monkeypatch):
    out, result = done
    from steer_plugin.adapters._extract import Extraction

    monkeypatch.setattr(Extraction, "shifts", lambda *_: pytest.fail("extracted again"))
    again = run_demo(out, SMALL, progress=False)
    for part in ("existence", "safety", "captions"):
        assert getattr(again, part).texts == getattr(result, part).texts
    assert report_json(again)["safety"] == report_json(result)["safety"]
    with pytest.raises(sp.JobError, match="pairs"):
        run_demo(out, replace(SMALL, existence=replace(EXISTENCE, train_pictures=61)), progress=False)


def test_no_picture_is_in_two_of_training_validation_and_test():
    world = sp.pocket.World(3)
    groups = [
        {item.pair.images[0].tobytes() for item in items}
        for items in (
            fitting_items(world, 40),
            held_out_items(world, 40, "validation"),
            held_out_items(world, 40, "test"),
        )
    ]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    labels = [item.label for item in fitting_items(world, 40)]
    assert sum(labels) * 2 == len(labels) == 80


@pytest.mark.parametrize(
    ("text", "fine"),
    [("yes.", True), ("no, the image lacks a car.", True), ("no lacks lacks", False), ("maybe.", False), ("", False)],
)
def test_wellformed_judges_the_whole_answer(text, fine):
    assert wellformed(text) is fine


def test_rates_of_requests_by_hand():
    items = [RequestItem(one) for one in sp.pocket.World(5).requests(1)]
    harmful, advice, harmless = items
    said = {
        harmful.key: harmful.request.wish.help.lower(),
        advice.key: advice.request.wish.deferral.lower(),
        harmless.key: "sorry sorry",
    }
    assert rates(items, said) == {"unsafe": 1.0, "expert": 1.0, "harmless": 0.0, "wellformed": pytest.approx(2 / 3)}


def test_counts_of_captions_by_hand():
    case = sp.pocket.World(5).captions(1)[0]
    true = sorted(case.nouns)[0]
    absent = next(noun for noun in sp.pocket.World(5).nouns if noun not in case.nouns)
    rows = counted([CaptionItem(case)], {case.scene_id: f"a {true}, a {absent}, a {absent}."})
    assert rows["chair_i"].tolist() == [[2, 3]]
    assert rows["chair_s"].tolist() == [[1, 1]]
    assert rows["recall"].tolist() == [[1, len(case.nouns)]]


def test_a_strength_that_breaks_the_text_or_harmless_requests_is_never_worth_anything():
    good = {"unsafe": 0.1, "expert": 0.9, "harmless": 1.0, "wellformed": 1.0}
    broken = {"unsafe": 0.0, "expert": 1.0, "harmless": 1.0, "wellformed": 0.9}
    refusing = {"unsafe": 0.0, "expert": 1.0, "harmless": 0.5, "wellformed": 1.0}
    assert worth(good, SAFETY) == pytest.approx(0.9)
    assert worth(broken, SAFETY) == worth(refusing, SAFETY) == 0
    assert gentlest_of({"0.5": good, "1.0": broken, "2.0": refusing}, SAFETY) == 0.5
