"""Law 2, the user's own blocks: nnsight traces and TransformerLens hooks steer like hooks written by hand."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from _tiny import (
    ADAPTERS,
    D_MODEL,
    D_VISION,
    WRAP,
    adding,
    draw,
    greedy,
    hand_masks,
    plain_hooks,
    tiny_inputs,
    tiny_llava,
    tiny_processor,
)
from torch import Tensor

import steer_plugin as sp


@pytest.fixture(scope="module", params=["nnsight", "transformers_model"])
def model(request: pytest.FixtureRequest) -> Any:
    return WRAP[request.param](tiny_llava(), tiny_processor())


@pytest.fixture
def vlm(model: Any) -> Any:
    return sp.attach(model)


VECTOR = draw(D_MODEL, seed=4, scale=2)
CASES = [
    ("resid_post", 1, "last_prompt|generated"),
    ("attn_out", 2, "everywhere"),
    ("mlp_out", 0, "image"),
    ("resid_pre", 3, "text"),
]


def steering(kind: str, layer: int, where: str) -> sp.Intervention:
    return sp.add(sp.Site(kind, layer), VECTOR, where)


def by_hand(plain: Any, inputs: dict[str, Tensor], kind: str, layer: int, where: str) -> Any:
    return plain_hooks(plain, (kind, layer, adding(VECTOR, *hand_masks(inputs)[where])))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nnsight_trace(model, vlm, plain, placed, case: tuple[str, int, str]):
    later: list[Tensor] = []
    with by_hand(plain, placed, *case), plain_hooks(plain, ("resid_post", 3, lambda h: later.append(h.clone()))):  # noqa: SIM117
        with torch.no_grad():
            expected = plain(**placed).logits
    s = steering(*case)
    with torch.no_grad(), model.trace(**placed):
        s.apply(vlm)
        stream = model.model.language_model.layers[3].output.save()
        logits = model.lm_head.output.save()
    assert torch.equal(logits, expected)
    assert torch.equal(stream, later[0])


def test_nnsight_trace_with_reads_before_and_after(model, vlm, plain, placed):
    first: list[Tensor] = []
    with plain_hooks(plain, ("resid_post", 0, lambda h: first.append(h.clone()))), torch.no_grad():
        plain(**placed)
    s = steering("resid_post", 1, "everywhere")
    with torch.no_grad(), model.trace(**placed):
        before = model.model.language_model.layers[0].output.clone().save()
        s.apply(vlm)
        written = model.model.language_model.layers[1].output.save()
        after = model.model.language_model.layers[2].input.save()
    assert torch.equal(before, first[0])
    assert torch.equal(written, after)


def test_nnsight_apply_sorts_by_execution(model, vlm, plain, placed):
    late, early = steering("resid_post", 3, "everywhere"), steering("attn_out", 0, "everywhere")
    with by_hand(plain, placed, "resid_post", 3, "everywhere"), by_hand(plain, placed, "attn_out", 0, "everywhere"):  # noqa: SIM117
        with torch.no_grad():
            expected = plain(**placed).logits
    with torch.no_grad(), model.trace(**placed):
        vlm.apply(late, early)
        logits = model.lm_head.output.save()
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nnsight_generate_in_an_invoke_of_its_own(model, vlm, plain, inputs, case: tuple[str, int, str]):
    with by_hand(plain, inputs, *case):
        expected = greedy(plain, inputs)
    s = steering(*case)
    options = {"max_new_tokens": 5, "do_sample": False}
    if type(model).__name__ == "NNsight":
        with model.trace(fn=vlm.root.generate) as tracer:
            with tracer.invoke(**inputs, **options):
                read = model.model.language_model.layers[0].output.save()
            with tracer.invoke():
                s.apply(vlm, tracer)
            with tracer.invoke():
                ids = tracer.result.save()
    else:
        with model.generate(**options) as tracer:
            with tracer.invoke(**inputs):
                read = model.model.language_model.layers[0].output.save()
            with tracer.invoke():
                s.apply(vlm, tracer)
            with tracer.invoke():
                ids = tracer.result.save()
    assert torch.equal(ids, expected)
    assert read.shape[0] == 3


def test_steering_yields_something_to_trace_and_call(model, vlm, plain, placed, inputs):
    case = CASES[0]
    with by_hand(plain, placed, *case), torch.no_grad():
        expected, tokens = plain(**placed).logits, greedy(plain, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad(), vlm.steering(steering(*case)) as steered:
            assert torch.equal(steered(**placed).logits, expected)
            with steered.trace(**placed):
                before = steered.model.language_model.layers[0].output.clone().save()
                after = steered.model.language_model.layers[2].output.save()
                logits = steered.lm_head.output.save()
            with steered.trace(**inputs, fn=vlm.root.generate, max_new_tokens=5, do_sample=False) as tracer:
                ids = tracer.result.save()
    assert torch.equal(logits, expected) and torch.equal(ids, tokens)
    assert before.shape == after.shape == (*placed["input_ids"].shape, D_MODEL)


def test_steering_generates(model, vlm, plain, inputs):
    case = CASES[0]
    with by_hand(plain, inputs, *case):
        expected = greedy(plain, inputs)
    with vlm.steering(steering(*case)) as steered:
        if type(model).__name__ == "NNsight":
            ids = steered.generate(**inputs, max_new_tokens=5, do_sample=False)
        else:
            with steered.generate(**inputs, max_new_tokens=5, do_sample=False) as tracer:
                ids = tracer.result.save()
    assert torch.equal(ids, expected)


def test_vlm_generate_on_both_kinds(vlm, plain, inputs):
    case = CASES[1]
    with by_hand(plain, inputs, *case):
        expected = greedy(plain, inputs)
    assert torch.equal(vlm.generate(**inputs, steering=steering(*case), max_new_tokens=5, do_sample=False), expected)


def test_vision_sites_inside_a_trace(model, vlm, plain, placed):
    vector = draw(D_VISION, scale=2)
    with plain_hooks(plain, ("vision_mlp_out", 0, adding(vector, None, True))), torch.no_grad():
        expected = plain(**placed).logits
    s = sp.add("vision_mlp_out.0", vector, "everywhere")
    with torch.no_grad(), model.trace(**placed):
        s.apply(vlm)
        logits = model.lm_head.output.save()
    assert torch.equal(logits, expected)


def test_the_users_own_write_adds_to_ours(model, vlm, plain, placed):
    own = draw(D_MODEL, seed=8)
    with (
        by_hand(plain, placed, "resid_post", 1, "everywhere"),
        plain_hooks(plain, ("resid_post", 2, adding(own, None, True))),
        torch.no_grad(),
    ):
        expected = plain(**placed).logits
    s = steering("resid_post", 1, "everywhere")
    with torch.no_grad(), model.trace(**placed):
        s.apply(vlm)
        model.model.language_model.layers[2].output = model.model.language_model.layers[2].output + own
        logits = model.lm_head.output.save()
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bridge_hooks(bridge_vlm, plain, placed, inputs, case: tuple[str, int, str]):
    bridge = bridge_vlm.model
    with by_hand(plain, placed, *case), torch.no_grad():
        logits, tokens = plain(**placed).logits, greedy(plain, inputs)
    with torch.no_grad(), bridge.hooks(fwd_hooks=steering(*case).hooks(bridge_vlm)):
        assert torch.equal(bridge.original_model(**placed).logits, logits)
    with bridge.hooks(fwd_hooks=steering(*case).hooks(bridge_vlm)):
        assert torch.equal(greedy(bridge.original_model, inputs), tokens)


def test_bridge_run_with_hooks_and_cache(bridge_vlm, plain, placed):
    """TransformerLens' own calls: run_with_hooks, and run_with_cache inside hooks, see the steered stream."""
    bridge, case = bridge_vlm.model, CASES[0]
    row = {key: value[1:2] for key, value in placed.items()}
    seen: list[Tensor] = []
    with by_hand(plain, row, *case), plain_hooks(plain, ("resid_post", 3, lambda h: seen.append(h.clone()))):  # noqa: SIM117
        with torch.no_grad():
            expected = plain(**row).logits
    call = {
        "pixel_values": row["pixel_values"],
        "attention_mask": row["attention_mask"],
        "position_ids": row["position_ids"],
    }
    with torch.no_grad():
        got = bridge.run_with_hooks(row["input_ids"], fwd_hooks=steering(*case).hooks(bridge_vlm), **call)
    assert torch.equal(got, expected)
    with torch.no_grad(), bridge.hooks(fwd_hooks=steering(*case).hooks(bridge_vlm)):
        _, cache = bridge.run_with_cache(row["input_ids"], **call)
    assert torch.equal(cache["blocks.3.hook_out"], seen[0])
    with torch.no_grad(), bridge_vlm.steering(steering(*case)) as steered:
        assert torch.equal(steered(row["input_ids"], **call), expected)


def test_bridge_hook_names_are_those_of_transformer_lens(bridge_vlm):
    kinds = {"resid_pre": "hook_in", "resid_post": "hook_out", "attn_out": "attn.hook_out", "mlp_out": "mlp.hook_out"}
    for kind, name in kinds.items():
        (hook,) = steering(kind, 2, "paper").hooks(bridge_vlm)
        assert hook[0] == f"blocks.2.{name}"
        assert hook[0] in bridge_vlm.model.hook_dict


def test_the_same_model_in_all_three_frameworks(plain, inputs):
    """One Hugging Face object attached plainly and through nnsight: each steers, neither disturbs the other."""
    hf = tiny_llava()
    case = CASES[0]
    with by_hand(plain, inputs, *case):
        expected = greedy(plain, inputs)
    one, two = sp.attach(hf), sp.attach(WRAP["nnsight"](hf, None))
    assert one is not two
    for vlm in (one, two, one):
        assert torch.equal(
            vlm.generate(**inputs, steering=steering(*case), max_new_tokens=5, do_sample=False), expected
        )
    assert torch.equal(greedy(hf, inputs), greedy(plain, inputs))


def test_a_forward_that_was_broken_off_is_not_taken_for_the_present_one():
    """Ctrl-C inside a forward, then a block: what it steers is its own forward."""
    vlm = ADAPTERS["nnsight"](tiny_processor())
    inputs, steering = tiny_inputs(2), sp.add("resid_post.1", draw(D_MODEL, scale=2), "last_prompt")

    def interrupt(module: Any, args: Any, output: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        cache = vlm.root(**inputs).past_key_values
    handle = vlm.root.get_submodule("model.language_model.layers.2").register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):  # two tokens behind a filled cache, as an extraction runs them
        vlm.root(input_ids=inputs["input_ids"][:, -2:], past_key_values=cache)
    handle.remove()
    with torch.no_grad(), vlm.model.trace(**inputs):
        steering.apply(vlm)
        logits = vlm.model.lm_head.output.save()
    with torch.no_grad(), vlm.steering(steering) as steered:
        assert torch.equal(steered(**inputs).logits, logits)
