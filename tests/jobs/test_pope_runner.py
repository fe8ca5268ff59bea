"""Asking, and POPE by the runner: questions asked once, resumed after a kill, scored by hand-computed rules."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _tiny import tiny_llava, tiny_processor
from PIL import Image
from typer.testing import CliRunner

import steer_plugin as sp
from steer_plugin.contrast import ContrastivePair, pocket_pairs
from steer_plugin.evaluation.answers import Answer, AnswerLog
from steer_plugin.evaluation.asking import AUTHORS_TOKENS, Method, Sampling, answers, distinct
from steer_plugin.evaluation.benchmarks import PopeBenchmark
from steer_plugin.evaluation.evaluate import evaluate
from steer_plugin.evaluation.lineup import Lineup
from steer_plugin.evaluation.pope import PopeItem, difference, margins, predictions, scores
from steer_plugin.evaluation.result import Evaluation


def item(number: int, subset: str, label: bool, prompt: str) -> PopeItem:
    image = Image.new("RGB", (16, 16), (number * 20 % 255, 90, 30))
    pair = ContrastivePair(f"{subset}-{number}-{prompt}", (image,), prompt, "w30", "w31", label=label)
    return PopeItem(pair, subset, f"picture{number}")


@pytest.fixture(scope="module")
def items() -> list[PopeItem]:
    subsets = ("random", "popular")
    return [
        made
        for n in range(4)
        for subset in subsets
        for made in (item(n, subset, True, "w10"), item(n, subset, False, f"w1{subsets.index(subset) + 1}"))
    ]


@pytest.fixture(scope="module")
def vlm() -> sp.AttachedModel:
    return sp.attach(tiny_llava(), tiny_processor())


def test_shared_yes_questions_are_asked_once_and_answers_are_greedy_generations(vlm, items):
    assert len(items) == 16
    assert len(distinct(items)) == 12
    found = answers(vlm, items, Method("none"), max_new_tokens=4, batch_size=5, progress=False)
    assert set(found) == {one.key for one in items}
    for one in distinct(items)[:3]:
        inputs = vlm.inputs(one.pair.prompt, one.pair.images[0])
        with torch.no_grad():
            ids = tiny_llava().generate(**inputs, max_new_tokens=4, do_sample=False)
        assert found[one.key] == vlm.decode(ids[:, inputs["input_ids"].shape[1] :])[0]


def test_steering_and_prefix_reach_the_model(vlm, items):
    strong = sp.add("resid_post.2", 30 * torch.randn(32), "everywhere")
    plain = answers(vlm, items, Method("none"), progress=False)
    assert answers(vlm, items, Method("s", lambda ids: strong), progress=False) != plain
    assert answers(vlm, items, Method("p", prefix="w50 w51 w52"), progress=False) != plain


def test_margins_are_the_logit_difference_of_the_first_answer_token():
    model, processor = sp.pocket.load()
    question = sp.pocket.World(0).questions(1, "test")[0]
    asked = PopeItem(pocket_pairs([question])[0], question.subset, str(question.scene_id))
    vlm = sp.attach(model, processor)
    with torch.no_grad():
        logits = model(**vlm.inputs(question.text, question.image)).logits[0, -1]
    yes, no = processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
    assert margins(vlm, [asked])[0] == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)


def test_scores_by_hand(items):
    said = np.array([True, True] * 8)  # always yes: half right
    found = scores(items, said, ["Yes."] * 16, seed=0)
    assert found["random"].accuracy.value == 0.5
    assert found["mean"].f1.value == pytest.approx(2 / 3)
    assert found["mean"].yes_ratio == 1.0
    assert found["mean"].wellformed == 1.0
    strict = scores(items, said, ["Yes yes yes"] * 16, seed=0, wellformed=lambda text: text == "Yes.")
    assert strict["mean"].wellformed == 0.0
    right = np.array([one.label for one in items])
    assert difference(items, right, said, seed=0).value == 0.5


def test_answers_are_resumed_from_disk_and_half_a_line_is_asked_again(vlm, items, tmp_path):
    log = tmp_path / "none.jsonl"
    whole = answers(vlm, items, Method("none"), log=log, batch_size=4, progress=False)
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:6]) + lines[6][:10])
    again = answers(vlm, items, Method("none"), log=log, batch_size=4, progress=False)
    assert again == whole
    keys = [json.loads(line)["id"] for line in log.read_text().splitlines()[1:]]
    assert sorted(keys) == sorted(set(keys)) == sorted(whole)


def test_answers_on_disk_are_not_asked_again(vlm, items, tmp_path, monkeypatch):
    log = tmp_path / "none.jsonl"
    whole = answers(vlm, items, Method("none"), log=log, progress=False)
    monkeypatch.setattr(vlm, "generate", lambda **_: pytest.fail("asked again"))
    assert answers(vlm, items, Method("none"), log=log, progress=False) == whole


def test_a_log_of_another_job_is_refused(vlm, items, tmp_path):
    log = tmp_path / "a.jsonl"
    answers(vlm, items, Method("none"), log=log, progress=False)
    with pytest.raises(sp.JobError, match="another job"):
        answers(vlm, items, Method("none", prefix="w9"), log=log, progress=False)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    log = AnswerLog(tmp_path / "a.jsonl", {"job": 1})
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(sp.JobError, match=r"a\.jsonl.*No space left"):
        log.add(["x"], [Answer("yes", (3,))])


def run(vlm: sp.AttachedModel, items: list[PopeItem], lineup: Lineup, out: Path, **options: Any) -> Evaluation:
    return evaluate(vlm, PopeBenchmark(items), lineup, out, costed=0, progress=False, **options)


def test_a_whole_run_writes_answers_metrics_and_a_table(vlm, items, tmp_path):
    steering = sp.MeanSteering(torch.randn(32), "resid_post.1")
    lineup = Lineup(("none", "prompt"), {"mine": steering}, prompt="w40", controls=False)
    table = run(vlm, items, lineup, tmp_path).table()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["none", "prompt", "mine"]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    texts = answers(vlm, items, Method("none"), progress=False)
    right = predictions(items, texts) == np.array([one.label for one in items])
    assert metrics["scores"]["none"]["mean accuracy"]["value"] == pytest.approx(right.mean())
    by_hand = scores(items, predictions(items, texts), [texts[one.key] for one in items], seed=0)
    for subset in ("random", "popular"):
        found = metrics["scores"]["none"][f"{subset} accuracy"]
        assert found["value"] == pytest.approx(by_hand[subset].accuracy.value)
        assert (found["low"], found["high"]) == (by_hand[subset].accuracy.low, by_hand[subset].accuracy.high)
        assert metrics["scores"]["none"][f"{subset} F1"]["value"] == pytest.approx(by_hand[subset].f1.value)
    assert metrics["provenance"]["model"]["d_model"] == 32
    assert table in (tmp_path / "table.md").read_text()
    # Questions that two subsets share are asked once.
    assert len((tmp_path / "answers" / "none.jsonl").read_text().splitlines()) == 1 + len(distinct(items))


def test_a_steering_refitted_under_the_same_name_is_not_answered_from_disk(vlm, items, tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        lineup = Lineup(("none",), {"mine": sp.MeanSteering(torch.randn(32), "resid_post.1")}, controls=False)
        if seed == 0:
            run(vlm, items, lineup, tmp_path)
            continue
        with pytest.raises(sp.JobError, match="another job"):
            run(vlm, items, lineup, tmp_path)


def test_sampled_answers_are_those_of_a_seeded_do_sample(vlm, items):
    """The authors' call, `generate(do_sample=True)`, repeated from the seed that one batch of one question gets."""
    one = [item(0, "random", True, "w10")]
    found = answers(vlm, one, Method("none"), max_new_tokens=8, sampling=Sampling(seed=3), progress=False)
    inputs = vlm.inputs(one[0].text, one[0].pair.images[0])
    draw = hashlib.sha256(f"3:{one[0].key}".encode()).digest()
    torch.manual_seed(int.from_bytes(draw[:7], "big"))
    with torch.no_grad():
        ids = tiny_llava().generate(**inputs, max_new_tokens=8, do_sample=True)
    assert found[one[0].key] == vlm.decode(ids[:, inputs["input_ids"].shape[1] :])[0]


def test_a_seed_draws_the_same_answers_again_and_leaves_the_random_state_alone(vlm, items):
    def sampled(seed: int, **changes: float) -> dict[str, str]:
        sampling = Sampling(seed, **changes)
        return answers(vlm, items, Method("none"), batch_size=5, sampling=sampling, progress=False)

    before = torch.get_rng_state()
    first = sampled(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert sampled(0) == first
    assert sampled(1) != first
    greedy = answers(vlm, items, Method("none"), batch_size=5, progress=False)
    assert first != greedy
    assert sampled(0, top_k=1) == greedy


def test_sampled_answers_resume_as_if_never_interrupted(vlm, items, tmp_path):
    log = tmp_path / "none.jsonl"
    how = {"log": log, "sampling": Sampling(seed=5), "progress": False}
    whole = answers(vlm, items, Method("none"), batch_size=4, **how)
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:6]))
    assert answers(vlm, items, Method("none"), batch_size=4, **how) == whole
    for other in ({"batch_size": 3}, {"batch_size": 4, "sampling": Sampling(seed=6)}, {"sampling": None}):
        with pytest.raises(sp.JobError, match="another job"):
            answers(vlm, items, Method("none"), **{**how, **other})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": 0.0}, r"temperature=0\.0.*above 0"),
        ({"temperature": float("nan")}, r"temperature=nan.*finite"),
        ({"top_k": -1}, r"top_k=-1.*from 0"),
        ({"top_p": 1.5}, r"top_p=1\.5.*up to 1"),
    ],
)
def test_impossible_sampling_is_refused(wrong, message):
    with pytest.raises(sp.InputError, match=message):
        Sampling(**wrong)


def test_sampling_as_the_authors_do_is_the_models_own(vlm):
    assert Sampling.as_authors(vlm, 7) == Sampling(7, temperature=1.0, top_k=50, top_p=1.0)
    other = sp.attach(tiny_llava())
    other.parts.root.generation_config.update(temperature=0.01, top_k=1, top_p=0.001)  # a model with a taste of its own
    assert Sampling.as_authors(other) == Sampling(0, 0.01, 1, 0.001)


def test_a_sampled_run_records_seed_and_settings(vlm, items, tmp_path):
    sampling = Sampling.as_authors(vlm, 4)
    only = Lineup(("none",))
    run(vlm, items, only, tmp_path / "s", sampling=sampling, batch_size=6, max_new_tokens=AUTHORS_TOKENS)
    written = json.loads((tmp_path / "s" / "metrics.json").read_text())["provenance"]["decoding"]
    assert written == {
        "do_sample": True, "max_new_tokens": 128, "seed": 4, "temperature": 1.0, "top_k": 50, "top_p": 1.0,
        "batch_size": 6,
    }  # fmt: skip
    run(vlm, items, only, tmp_path / "g")
    written = json.loads((tmp_path / "g" / "metrics.json").read_text())["provenance"]["decoding"]
    assert written == {"do_sample": False, "max_new_tokens": 12}
    with pytest.raises(sp.InputError, match="max_new_tokens=0"):
        run(vlm, items, only, tmp_path / "x", max_new_tokens=0)


@pytest.mark.parametrize(("words", "tokens"), [(("--max-new-tokens", "9"), 9), ((), 128)])
def test_the_command_line_samples_on_request(tmp_path: Path, words: tuple[str, ...], tokens: int):
    from steer_plugin.cli import app

    few = ["--pictures", "3", "--methods", "none", "--costs", "0", "--no-figures", "--sample", "--seed", "2"]
    called = ["eval", "pope", *few, *words, "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, called, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())["provenance"]["decoding"]
    assert (written["do_sample"], written["seed"], written["max_new_tokens"]) == (True, 2, tokens)
