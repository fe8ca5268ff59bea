"""Precision and place: bf16 and fp16, and layers on several devices.

No second device that computes exists here: "meta" stands for it. It has no numbers, but refuses to mix with the CPU
just as a GPU does, so it shows where tensors are put; what they hold there is shown on one device only.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from _naive import hooked
from _steerings import INPUTS, PAIR, attached, drawn_module, drawn_network, said, steerings
from _tiny import (
    ADAPTERS,
    D_MODEL,
    Recorder,
    adding,
    draw,
    forward_logits,
    greedy,
    hand_masks,
    plain_hooks,
    tiny_llava,
    tiny_processor,
    with_position_ids,
)  # fmt: skip
from torch import Tensor
from transformers import DynamicCache

import steer_plugin as sp
from steer_plugin.methods._replicas import Replicas, moved

# -- precision -------------------------------------------------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@cache
def in_dtype(framework: str, dtype: torch.dtype) -> tuple[Any, Any, dict[str, Tensor]]:
    inputs = {**INPUTS, "pixel_values": INPUTS["pixel_values"].to(dtype)}
    return attached(framework, tiny_llava().to(dtype)), tiny_llava().to(dtype), inputs


@pytest.fixture(params=[(framework, dtype) for framework in sorted(ADAPTERS) for dtype in DTYPES], ids="-".join)
def precise(request: pytest.FixtureRequest) -> tuple[Any, Any, dict[str, Tensor]]:
    """An attached model, a plain copy of it, and inputs, all of one precision."""
    return in_dtype(request.param[0], DTYPES[request.param[1]])


def same_scores(precise: Any, steering: Any, act: Any) -> None:
    vlm, plain, inputs = precise
    ours, theirs = Recorder(), Recorder()
    with plain_hooks(plain, ("resid_post", 1, act)):
        expected = greedy(plain, inputs, 5, logits_processor=[theirs])
    got = vlm.generate(
        **inputs, steering=steering, max_new_tokens=5, do_sample=False, logits_processor=[ours]
    )  # fmt: skip
    assert torch.equal(got, expected)
    assert not torch.equal(got, greedy(plain, inputs, 5))
    assert torch.equal(torch.stack(ours.scores), torch.stack(theirs.scores))


@pytest.mark.parametrize("kept", [torch.float32, None], ids=["fp32 vector", "vector in the model's dtype"])
def test_mean_in_half_precision(precise, kept: torch.dtype | None):
    dtype = precise[1].dtype
    vector = draw(D_MODEL, scale=3).to(kept or dtype)
    mask, decoding = hand_masks(precise[2])["last_prompt|generated"]
    steering = sp.MeanSteering(vector, "resid_post.1", alpha=1.5)
    same_scores(precise, steering, adding((1.5 * vector).to(dtype), mask, decoding))


@pytest.mark.parametrize("own", [torch.float32, None], ids=["fp32 network", "network in the model's dtype"])
def test_l2s_in_half_precision(precise, own: torch.dtype | None):
    dtype = precise[1].dtype
    network = copy.deepcopy(drawn_network()).to(own or dtype)
    vector: list[Tensor] = []

    def act(hidden: Tensor) -> Tensor:
        out = hidden.clone()
        if hidden.shape[1] > 1:
            vector[:] = [network(hidden[:, -1])]
        out[:, -1] += vector[0].to(dtype)
        return out

    same_scores(precise, sp.L2S(network, "resid_post.1"), act)


@pytest.mark.parametrize("own", [torch.float32, None], ids=["fp32 module", "module in the model's dtype"])
def test_steervlm_in_half_precision(precise, own: torch.dtype | None):
    vlm, plain, inputs = precise
    module = copy.deepcopy(drawn_module()).to(own or plain.dtype)
    inputs = with_position_ids(inputs)
    layers = plain.model.language_model.layers
    sides: list[dict[int, Tensor]] = []
    for text in PAIR:
        ids, mine = vlm.asides.spelled(text, "chat")
        side: dict[int, Tensor] = {}
        embeds = plain.get_input_embeddings()(torch.tensor([ids]))
        keep = lambda n, h, side=side, mine=mine: side.update({n: h[:, mine].clone()})  # noqa: E731
        hooked(layers, keep, lambda embeds=embeds: plain.model.language_model(inputs_embeds=embeds))
        sides.append(side)
    u: dict[int, Tensor] = {}
    before = hooked(layers, lambda n, h: u.update({n: h.clone()}), lambda: plain(**inputs)).logits

    def steer(n: int, h: Tensor) -> Tensor:
        real = [torch.ones(side[n].shape[:2], dtype=torch.bool) for side in sides]
        change = module(h, u[n], module.remember(sides[0][n], real[0], sides[1][n], real[1]))[2]
        return torch.where(inputs["attention_mask"].bool()[..., None], h + change.to(h.dtype), h)

    expected = hooked(layers, steer, lambda: plain(**inputs)).logits
    steering = sp.SteerVLM(module).pair(*PAIR).with_positions("everywhere")
    with vlm.steering(steering) as steered:
        got = forward_logits(vlm, steered, inputs)
    assert torch.equal(got, expected)
    assert got.dtype == plain.dtype
    assert not torch.equal(got, before)
    assert next(module.parameters()).dtype == (own or plain.dtype)


@pytest.mark.parametrize("name", steerings())
def test_alpha_zero_and_afterwards_in_half_precision(precise, name: str):
    vlm, plain, inputs = precise
    expected = greedy(plain, inputs, 4)
    assert not torch.equal(said(vlm, steerings()[name], **inputs), expected)
    assert torch.equal(said(vlm, steerings()[name] * 0, **inputs), expected)
    assert torch.equal(said(vlm, **inputs), expected)


# -- layers on several devices ---------------------------------------------------------------------------------------

META = torch.device("meta")


def split() -> Any:
    """A tiny LLaVA whose layers 2 and 3, norm and head lie on another device; accelerate's hooks carry the stream."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    hf = tiny_llava()
    decoder = hf.get_submodule("model.language_model")
    for module in (*decoder.get_submodule("layers")[2:], decoder.get_submodule("norm"), hf.lm_head):  # pyright: ignore
        add_hook_to_module(module, AlignDevicesHook("meta", place_submodules=True))
    return hf


FAR = {
    **{name: one for name, one in steerings().items() if name != "late"},
    "image": sp.MeanSteering(draw(3, D_MODEL), "resid_post.3", positions="image"),
    "near": sp.MeanSteering(draw(D_MODEL), "resid_post.0"),
    "patch": sp.patch("resid_post.2", draw(D_MODEL), "last_prompt"),
    "per row": sp.SteerVLM(drawn_module()).pair([*PAIR, "w9"], ["w8", *PAIR]) * torch.tensor([1.0, 0.0, 2.0]),
}


@cache
def far_away(framework: str) -> Any:
    return attached(framework, split())


@pytest.mark.parametrize("framework", sorted(ADAPTERS))
@pytest.mark.parametrize("name", FAR)
def test_everything_goes_to_the_layer_s_device(framework: str, name: str):
    vlm = far_away(framework)
    where = {"everywhere": "everywhere", "image": "image"}.get(name, "last_prompt|generated")
    prompt, decoding = hand_masks(INPUTS)[where]
    with vlm.steering(FAR[name]) as steered:
        assert forward_logits(vlm, steered, INPUTS).device == META
        assert all(counts == prompt.sum(-1).tolist() for counts in vlm.counts)
        cache = DynamicCache(config=vlm.root.config.get_text_config())
        forward_logits(vlm, steered, {**INPUTS, "past_key_values": cache})
        ids, mask = torch.full((3, 1), 9), torch.ones(3, INPUTS["input_ids"].shape[1] + 1, dtype=torch.long)
        out = forward_logits(vlm, steered, {"input_ids": ids, "attention_mask": mask, "past_key_values": cache})
        assert out.device == META
        again = decoding and name != "patch"
        assert all(counts == (prompt.sum(-1) + again).tolist() for counts in vlm.counts)


def test_one_module_serves_two_devices():
    steering = sp.SteerVLM(copy.deepcopy(drawn_module())).pair(*PAIR)
    module, other = steering.module, steering.with_alpha(2.0)
    vlm = sp.attach(split(), tiny_processor())
    weights = [(weight, weight.device) for weight in module.parameters()]

    def run() -> Any:
        with torch.no_grad(), vlm.steering(steering, other * 1.0) as steered:
            steered(**INPUTS)
        return steering._replicas.on(module, META)

    made = run()
    assert len(steering._replicas) == len(other._replicas) == 1
    assert all(weight.device == META for weight in made.parameters())
    assert all(
        weight is one and one.device == at for weight, (one, at) in zip(module.parameters(), weights, strict=True)
    )
    assert run() is made  # copied once, not for every layer and token
    with torch.no_grad():
        next(module.parameters()).add_(1)
    assert run() is not made
    assert len(steering._replicas) == 1
    assert len(copy.deepcopy(steering)._replicas) == 0


def test_l2s_keeps_its_network_where_it_is():
    network = copy.deepcopy(drawn_network())
    vlm = sp.attach(split())
    with torch.no_grad(), vlm.steering(sp.L2S(network, "resid_post.3", "resid_post.1")) as steered:
        steered(**INPUTS)
    assert {weight.device.type for weight in network.parameters()} == {"cpu"}
    assert sp.L2S(network, "resid_post.3").predict(draw(2, D_MODEL).to(META)).device == META


def test_a_copy_computes_the_same_and_trains_the_original():
    module, where = copy.deepcopy(drawn_module()).requires_grad_(True), torch.device("cpu")
    x, real = draw(2, 5, D_MODEL), torch.ones(1, 3, dtype=torch.bool)

    def loss(one: Any) -> Tensor:
        return one(x, x, one.remember(draw(1, 3, D_MODEL), real, draw(1, 3, D_MODEL, seed=1), real))[2].square().sum()

    twin = moved(module, where)
    assert {id(one) for one in twin.parameters()}.isdisjoint(id(one) for one in module.parameters())
    grads = [torch.autograd.grad(loss(one), list(module.parameters())) for one in (module, twin)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    replicas = Replicas()
    assert replicas.on(module, where) is module
    assert replicas.on(module, META) is not replicas.on(module, META)  # in training: part of each graph
    assert len(replicas) == 0


def test_activations_of_layers_on_two_devices():
    vlm = sp.attach(split())
    got = vlm.cache(INPUTS, [sp.resid_post(0), sp.resid_post(3)])
    assert [got[site].device.type for site in got] == ["cpu", "meta"]
    assert got.mask.shape == got["resid_post.3"].shape[:2]
