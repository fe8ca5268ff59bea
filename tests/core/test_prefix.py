"""Prompts kept and gone on from: the same tokens and scores as from the beginning, and the prompt runs once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import _zoo
import pytest
import torch
from _steerings import drawn_module, drawn_network
from _tiny import Recorder, adding, draw, greedy, hand_masks, plain_hooks, tiny_llava
from torch import Tensor

import steer_plugin as sp
from steer_plugin.errors import FrameworkError, InputError
from steer_plugin.evaluation.costs import answer_tokens, forced_logits

NEW = 5
# Not kept: sliding windows, bidirectional prompts, cross-attention.
WHOLE = ("gemma3", "paligemma", "paligemma2", "mllama")
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def served() -> dict[str, Any]:
    return {
        "weak": sp.MeanSteering(draw(32, scale=3), "resid_post.1", alpha=0.3),
        "strong": sp.MeanSteering(draw(32, scale=3), "resid_post.1", alpha=3.0),
        "first layer": sp.MeanSteering(draw(32, scale=3), "resid_pre.0", positions="last_prompt"),
        "rows": sp.MeanSteering(draw(3, 32, scale=3), "attn_out.3", alpha=torch.tensor([1.0, 0.0, 2.0])),
        "generated": sp.MeanSteering(draw(32, scale=3), "resid_post.2", positions="generated"),
        "late": sp.L2S(drawn_network(), "resid_post.1", "resid_post.3", alpha=2.0),
        "late, weaker": sp.L2S(drawn_network(), "resid_post.1", "resid_post.3", alpha=0.5),
        "early read": sp.L2S(drawn_network(), "resid_post.2", "resid_post.0"),
        "sum": sp.MeanSteering(draw(32), "resid_post.0") + sp.L2S(drawn_network(), "resid_post.1", "resid_post.3"),
        "steps": sp.MeanSteering(draw(32, scale=3), "resid_post.1", alpha=lambda step: 1.0 + step),
    }


def refused() -> dict[str, Any]:
    late = sp.L2S(drawn_network(), "resid_post.1", "resid_post.3")
    return {
        "everywhere": sp.MeanSteering(draw(32), "resid_post.1", positions="everywhere"),
        "image": sp.MeanSteering(draw(32), "resid_post.1", positions="image|last_prompt"),
        "context": sp.L2S(drawn_network(), "resid_post.2", "resid_post.0", context="image"),
        "two late reads": late + sp.L2S(drawn_network(), "resid_post.0", "resid_post.3"),
        "late, generated": sp.L2S(drawn_network(), "resid_post.1", "resid_post.3", positions="generated"),
        "projector": sp.MeanSteering(draw(32), "projector", positions="everywhere"),
    }


def scored(call: Any, steering: Any, **inputs: Any) -> tuple[Tensor, list[Tensor]]:
    recorder = Recorder()
    ids = call(steering=steering, **inputs, max_new_tokens=NEW, do_sample=False, logits_processor=[recorder])
    return ids, recorder.scores


def check_same(vlm: Any, prefix: Any, inputs: dict[str, Tensor], steering: Any) -> None:
    expected, their = scored(vlm.generate, steering, **inputs)
    got, ours = scored(prefix.generate, steering)
    assert torch.equal(got, expected)
    for one, other in zip(ours, their, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


@contextmanager
def columns_of(vlm: Any) -> Iterator[list[int]]:
    """Columns of each forward through the text decoder's first layer."""
    seen: list[int] = []
    layer = vlm.root.get_submodule(vlm.parts.family.layers)[0]
    handle = layer.register_forward_hook(lambda m, a, o: seen.append((o[0] if isinstance(o, tuple) else o).shape[1]))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("name", list(_zoo.FAMILIES))
def test_the_same_as_from_the_beginning_in_every_family(name: str) -> None:
    vlm, inputs = sp.attach(_zoo.tiny(name), _zoo.processor_of(name)), _zoo.inputs_of(name, 3)
    assert len(set(inputs["attention_mask"].sum(-1).tolist())) > 1 and not bool(inputs["attention_mask"][:, 0].all())
    prefix = vlm.prefix(inputs, max_new_tokens=NEW, do_sample=False)
    assert prefix.kept is (name not in WHOLE)
    plain = scored(vlm.generate, None, **inputs)[0]
    assert torch.equal(prefix.ids, plain)
    # Another batch in between: families with positions of their own keep those of the last one on the model.
    vlm.generate(**_zoo.inputs_of(name, 2), max_new_tokens=1)
    chosen = served()
    for key in ("strong", "late", "weak") if name in ("llava", "qwen2_vl") else ("strong", "late"):
        assert prefix.serves(chosen[key]) is prefix.kept
        check_same(vlm, prefix, inputs, chosen[key])
        assert not torch.equal(prefix.generate(chosen[key], max_new_tokens=NEW, do_sample=False), plain)


@pytest.mark.parametrize("key", list(served()))
def test_what_is_served(vlm, inputs, key: str) -> None:
    prefix = vlm.prefix(inputs, max_new_tokens=1, do_sample=False)
    assert prefix.serves(served()[key])
    check_same(vlm, prefix, inputs, served()[key])


@pytest.mark.parametrize("key", list(refused()))
def test_what_is_not_served_runs_whole(torch_vlm, inputs, key: str) -> None:
    prefix, width = torch_vlm.prefix(inputs, max_new_tokens=1), inputs["input_ids"].shape[1]
    assert not prefix.serves(refused()[key])
    with columns_of(torch_vlm) as seen:
        check_same(torch_vlm, prefix, inputs, refused()[key])
    assert seen.count(width) >= 2
    assert prefix.ran == prefix.asked == 2 * width


def test_a_stream_of_its_own_runs_whole(torch_vlm, inputs) -> None:
    pair = sp.SteerVLM(drawn_module()).pair("w20 w21", "w30 w31 w32")
    prefix = torch_vlm.prefix(inputs, max_new_tokens=1)
    assert not prefix.serves(pair)
    check_same(torch_vlm, prefix, inputs, pair)


def test_against_plain_hooks(torch_vlm, inputs) -> None:
    """Nothing of the package on the other side: a vector added by torch hooks on another copy of the model."""
    prefix, vector = torch_vlm.prefix(inputs, max_new_tokens=1), draw(32, scale=3)
    for alpha in (2.0, 0.5, 2.0, -1.0):
        mask, decoding = hand_masks(inputs)["last_prompt|generated"]
        other = tiny_llava()
        with plain_hooks(other, ("resid_post", 1, adding(alpha * vector, mask, decoding))):
            expected = greedy(other, inputs, NEW)
        steering = sp.add("resid_post.1", vector, alpha=alpha)
        assert torch.equal(prefix.generate(steering, max_new_tokens=NEW, do_sample=False), expected)


def test_the_prompt_runs_once_and_what_is_kept_stays(torch_vlm, inputs) -> None:
    width = inputs["input_ids"].shape[1]
    pictures: list[int] = []
    tower = torch_vlm.root.get_submodule("model.vision_tower")
    handle = tower.register_forward_hook(lambda m, a, o: pictures.append(1))
    with columns_of(torch_vlm) as seen:
        prefix = torch_vlm.prefix(inputs, max_new_tokens=3, do_sample=False)
        kept = copy.deepcopy(prefix._held.cache)
        for key in ("weak", "strong", "first layer", "weak"):
            prefix.generate(served()[key], max_new_tokens=3, do_sample=False)
        assert seen == [width, 1, 1] + [1, 1, 1] * 4
        seen.clear()
        prefix.generate(served()["late"], max_new_tokens=3, do_sample=False)
        assert seen == [1, 1, 1, 1]  # the last prompt column is read unsteered, then runs again
    handle.remove()
    assert len(pictures) == 1
    assert (prefix.asked, prefix.ran) == (6 * width, width + 5)
    for layer, before in zip(prefix._held.cache.layers, kept.layers, strict=True):
        assert layer.keys.shape[-2] == width - 1
        assert torch.equal(layer.keys, before.keys) and torch.equal(layer.values, before.values)
    assert prefix.nbytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl", "qwen3_vl", "internvl"])
@pytest.mark.parametrize("key", ["strong", "late", "generated"])
def test_given_answers_have_the_logits_of_whole_forwards(name: str, key: str) -> None:
    vlm, inputs = sp.attach(_zoo.tiny(name), _zoo.processor_of(name)), _zoo.inputs_of(name, 3)
    prefix = vlm.prefix(inputs, max_new_tokens=NEW, do_sample=False)
    answers = answer_tokens(vlm, inputs, prefix.ids)
    answers[1] = answers[1][:2]
    with columns_of(vlm) as seen:
        logits, mask = prefix.forced(answers, served()[key])
    assert seen[0] == 1 and seen[-1] == NEW - 1 and sum(seen) < 2 * NEW
    assert mask.tolist() == [[True] * NEW, [True] * 2 + [False] * 3, [True] * NEW]
    whole = forced_logits(vlm, inputs, answers, served()[key])
    torch.testing.assert_close(logits[mask], whole.logits[whole.mask], **TOLERANCE)
    plain = prefix.forced(answers)[0]
    torch.testing.assert_close(plain[mask], forced_logits(vlm, inputs, answers).logits[whole.mask], **TOLERANCE)
    assert not torch.allclose(plain[mask], logits[mask], atol=1e-2)


def test_given_answers_of_one_token(torch_vlm, inputs) -> None:
    prefix = torch_vlm.prefix(inputs, max_new_tokens=1)
    logits, mask = prefix.forced([[11], [12], [13]], served()["strong"])
    whole = forced_logits(torch_vlm, inputs, [[11], [12], [13]], served()["strong"])
    assert mask.all()
    torch.testing.assert_close(logits, whole.logits, **TOLERANCE)


def test_sampling_is_that_of_the_seed(torch_vlm, inputs) -> None:
    prefix = torch_vlm.prefix(inputs, max_new_tokens=1)
    how = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.7}
    torch.manual_seed(3)
    expected = torch_vlm.generate(**inputs, steering=served()["strong"], **how)
    torch.manual_seed(3)
    assert torch.equal(prefix.generate(served()["strong"], **how), expected)


def test_beams_run_whole(torch_vlm, inputs) -> None:
    prefix, how = torch_vlm.prefix(inputs, max_new_tokens=1), {"max_new_tokens": NEW, "num_beams": 3}
    expected = torch_vlm.generate(**inputs, steering=served()["strong"], **how)
    assert torch.equal(prefix.generate(served()["strong"], **how), expected)
    assert prefix.ran == prefix.asked
    assert not torch_vlm.prefix(inputs, num_beams=3, max_new_tokens=2).kept


def test_inside_another_steering_nothing_is_kept(torch_vlm, inputs) -> None:
    outer, inner = served()["weak"], served()["strong"]
    before = torch_vlm.prefix(inputs, max_new_tokens=1)
    with torch_vlm.steering(outer):
        made = torch_vlm.prefix(inputs, max_new_tokens=NEW, do_sample=False)
        assert not made.kept and not before.serves(inner)
        check_same(torch_vlm, before, inputs, inner)
        steered = torch_vlm.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(made.ids, steered)


def test_unusable_requests(torch_vlm, inputs) -> None:
    prefix = torch_vlm.prefix(inputs, max_new_tokens=1)
    with pytest.raises(InputError, match="give one with a token for each prompt"):
        prefix.forced([[11], [12]])
    with pytest.raises(InputError, match=r"answers of \[1, 0, 1\] tokens"):
        prefix.forced([[11], [], [13]])
    with pytest.raises(InputError, match="changes from step to step"):
        prefix.forced([[11], [12], [13]], served()["steps"])
    with pytest.raises(InputError, match="cannot go on from what is kept"):
        prefix.forced([[11], [12], [13]], refused()["everywhere"])
    with pytest.raises(InputError, match="2 steering vectors do not fit a batch of 3 rows"):
        prefix.generate(sp.MeanSteering(draw(2, 32), "resid_post.1"), max_new_tokens=1)
    with pytest.raises(sp.SiteError):
        prefix.generate(sp.MeanSteering(draw(32), "resid_post.9"), max_new_tokens=1)


def test_a_cache_from_elsewhere_is_still_refused(torch_vlm, inputs) -> None:
    prefix, ids = torch_vlm.prefix(inputs, max_new_tokens=1), inputs["input_ids"]
    with torch_vlm.steering(served()["strong"]) as steered, pytest.raises(FrameworkError, match="filled outside"):
        steered.generate(
            input_ids=ids, attention_mask=inputs["attention_mask"], past_key_values=prefix._held.again(),
            max_new_tokens=1,
        )  # fmt: skip
