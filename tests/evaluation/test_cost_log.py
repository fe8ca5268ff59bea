"""Costs item by item: against the model's own logits, resumed after a kill, and never those of other answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _colours import Ask, Colours, colour, prompt_of, second
from _tiny import D_MODEL, draw, plain_hooks, tiny_llava, tiny_processor
from torch import Tensor

import steer_plugin as sp
from steer_plugin.errors import InputError, JobError
from steer_plugin.evaluation.answers import Answer
from steer_plugin.evaluation.asking import Method, answered
from steer_plugin.evaluation.cost_log import ItemCost, item_costs, method_costs

ASKS = Colours().asks[:5]
VECTOR = draw(D_MODEL, scale=2)
STEERED = Method("m", lambda ids: sp.MeanSteering(VECTOR, "resid_post.1", "last_prompt|generated"))


@pytest.fixture(scope="module")
def vlm() -> sp.AttachedModel:
    return sp.attach(tiny_llava(), tiny_processor())


@pytest.fixture(scope="module")
def said(vlm: sp.AttachedModel) -> dict[str, Answer]:
    return answered(vlm, ASKS, STEERED, max_new_tokens=4, progress=False)


def by_hand(ask: Ask, answer: Answer) -> tuple[float, float]:
    """(KL, nll) per token of an answer: two forwards of a second model over prompt and answer, one row."""
    inputs = prompt_of(ask.text, colour(ask.number))
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer.tokens])], 1)
    width = len(answer.tokens)

    def add(hidden: Tensor) -> Tensor:
        out = hidden.clone()
        out[:, -width - 1 :] += VECTOR
        return out

    def log_p(*hooks: Any) -> Tensor:
        with torch.no_grad(), plain_hooks(second(), *hooks):
            logits = second()(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"]
            ).logits
        return logits[0, -width - 1 : -1].double().log_softmax(-1)

    steered, plain = log_p(("resid_post", 1, add)), log_p()
    kl = (steered.exp() * (steered - plain)).sum(-1).mean()
    nll = -plain.gather(1, torch.tensor(answer.tokens)[:, None]).mean()
    return float(kl), float(nll)


def test_costs_are_those_of_the_models_own_logits(vlm: sp.AttachedModel, said: dict[str, Answer]):
    found = item_costs(vlm, ASKS, STEERED, said, batch_size=2, progress=False)
    assert list(found) == [ask.key for ask in ASKS]
    for ask in ASKS:
        kl, nll = by_hand(ask, said[ask.key])
        assert kl > 0.01
        assert found[ask.key] == (pytest.approx(kl, rel=1e-3), pytest.approx(nll, rel=1e-4), 4)


@pytest.mark.parametrize(
    ("method", "kl"),
    [
        (Method("none"), 0.0),
        (Method("zero", lambda ids: sp.MeanSteering(VECTOR, "resid_post.1", alpha=0.0)), 0.0),
        (Method("prompt", prefix="w9"), None),
        (Method("worded", worded={"0-20": "w9"}), None),
    ],
)
def test_kl_is_zero_without_steering_and_none_for_other_words(
    vlm: sp.AttachedModel, said: dict[str, Answer], method: Method, kl: float | None
):
    found = item_costs(vlm, ASKS, method, said, progress=False)
    assert {one.kl for one in found.values()} == {kl}
    for ask in ASKS:  # the words that were really asked count for nothing: the answer is read behind the question
        assert found[ask.key].nll == pytest.approx(by_hand(ask, said[ask.key])[1], rel=1e-4)


def test_a_killed_run_reads_only_what_is_missing(
    vlm: sp.AttachedModel, said: dict[str, Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    log = tmp_path / "costs" / "m.jsonl"
    whole = item_costs(vlm, ASKS, STEERED, said, batch_size=2, log=log, progress=False)
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:4]) + lines[4][:9])
    opened: list[str] = []
    monkeypatch.setattr(Ask, "load_images", lambda ask: opened.append(ask.id) or [colour(ask.number)])
    again = item_costs(vlm, ASKS, STEERED, said, batch_size=2, log=log, progress=False)
    assert opened == [ask.id for ask in ASKS[3:]]
    assert [json.loads(line)["id"] for line in log.read_text().splitlines()[1:]] == [ask.key for ask in ASKS]
    for key, one in whole.items():
        assert again[key] == (pytest.approx(one.kl, rel=1e-4), pytest.approx(one.nll, rel=1e-4), one.tokens)


@pytest.mark.parametrize("other", ["answers", "note", "job"])
def test_costs_of_another_job_are_refused(vlm: sp.AttachedModel, said: dict[str, Answer], tmp_path: Path, other: str):
    log = tmp_path / "m.jsonl"
    item_costs(vlm, ASKS, STEERED, said, log=log, progress=False)
    changed = {**said, ASKS[0].key: Answer("w9", (9,))} if other == "answers" else said
    method = Method("m", STEERED.steering, note={"alpha": 2.0}) if other == "note" else STEERED
    with pytest.raises(JobError, match="costs of another job"):
        item_costs(vlm, ASKS, method, changed, log=log, job={"a": 1} if other == "job" else None, progress=False)


def test_a_log_with_other_rows_is_refused(vlm: sp.AttachedModel, said: dict[str, Answer], tmp_path: Path):
    log = tmp_path / "m.jsonl"
    item_costs(vlm, ASKS, STEERED, said, log=log, progress=False)
    log.write_text(log.read_text() + '{"id": "x"}\n')
    with pytest.raises(JobError, match=r"m\.jsonl is no log of costs"):
        item_costs(vlm, ASKS, STEERED, said, log=log, progress=False)


def test_a_strength_that_changes_from_step_to_step_is_refused(vlm: sp.AttachedModel, said: dict[str, Answer]):
    method = Method("m", lambda ids: sp.MeanSteering(VECTOR, "resid_post.1", alpha=lambda step: 1.0 / (1 + step)))
    with pytest.raises(InputError, match="changes from step to step"):
        item_costs(vlm, ASKS, method, said, progress=False)


def test_costs_are_summed_up_by_hand(vlm: sp.AttachedModel):
    answers = {"a": Answer("x y", (1, 2)), "b": Answer("", (3,)), "c": Answer("x", (1,))}
    costs = {"a": ItemCost(0.3, 1.0, 2), "b": ItemCost(0.0, 4.0, 1), "c": ItemCost(0.6, 1.0, 1)}
    groups = {"a": "p", "b": "p", "c": "q"}
    found = method_costs(vlm, answers, costs, groups, seed=0)
    assert found.kl is not None and found.kl.value == pytest.approx(0.3)
    # Two pictures: a resample holds p twice (mean 0.15), q twice (0.6), or both (0.3).
    assert (found.kl.low, found.kl.high) == (pytest.approx(0.15), pytest.approx(0.6))
    assert found.perplexity == pytest.approx(math.exp((2 * 1.0 + 4.0 + 1.0) / 4))
    assert (found.text.empty, found.text.words, found.n) == (pytest.approx(1 / 3), 1.0, 3)
    assert found.as_json()["kl"] == [found.kl.value, found.kl.low, found.kl.high]
    told = method_costs(vlm, answers, {k: v._replace(kl=None) for k, v in costs.items()}, groups, seed=0)
    assert told.kl is None and told.as_json()["kl"] is None
    assert np.isfinite(told.perplexity)
