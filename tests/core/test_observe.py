"""`vlm.observe` shows what plain torch hooks on another copy see: logits, streams, and gradients on request."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _tiny import D_MODEL, IMAGE, adding, draw, hand_masks, plain_hooks, tiny_llava
from torch import Tensor

import steer_plugin as sp
from steer_plugin.methods.network import SteeringNetwork

V = draw(D_MODEL, seed=2)


def plainly(model: Any, inputs: dict[str, Tensor], *sites: tuple[str, int], steer: bool) -> tuple[Tensor, list[Tensor]]:
    """Logits and streams of a plain copy, V added behind layer 1 on the picture if asked."""
    seen: dict[tuple[str, int], Tensor] = {}
    acts = [("resid_post", 1, adding(V, *hand_masks(inputs)["image"]))] if steer else []
    # Read behind the write: of two hooks in front of each other, the one that was put there last runs first.
    reads = [(kind, layer, lambda h, key=(kind, layer): seen.__setitem__(key, h.clone())) for kind, layer in sites]
    with torch.no_grad(), plain_hooks(model, *reads, *acts):
        logits = model(**inputs).logits
    return logits, [seen[site] for site in sites]


@pytest.mark.parametrize("steer", [False, True])
def test_it_sees_what_hooks_see(vlm, plain, placed, steer: bool):
    sites = [("resid_post", 1), ("attn_out", 2), ("mlp_out", 3)]
    logits, streams = plainly(plain, placed, *sites, steer=steer)
    steering = sp.add("resid_post.1", V, "image") if steer else None
    seen = vlm.observe(placed, [sp.Site(*site) for site in sites], steering)
    torch.testing.assert_close(seen.logits, logits, rtol=0, atol=1e-5)
    real = placed["attention_mask"].bool()
    for site, stream in zip(sites, streams, strict=True):
        torch.testing.assert_close(seen[sp.Site(*site)][real], stream[real], rtol=0, atol=1e-5)
    assert not seen.logits.requires_grad


def test_it_adds_to_what_is_in_force(torch_vlm, placed):
    half = sp.add("resid_post.1", V / 2, "image")
    with torch_vlm.steering(half):
        both = torch_vlm.observe(placed, (), half).logits
    torch.testing.assert_close(both, torch_vlm.observe(placed, (), sp.add("resid_post.1", V, "image")).logits)


def test_gradients_reach_the_stream(torch_vlm, placed):
    seen = torch_vlm.observe(placed, "resid_post.1", grad=True)
    (slope,) = torch.autograd.grad(seen.logits[:, -1, 7].sum(), [seen["resid_post.1"]])
    model = tiny_llava()
    kept: list[Tensor] = []
    with plain_hooks(model, ("resid_post", 1, lambda h: kept.append(h))):
        model(**placed).logits[:, -1, 7].sum().backward(inputs=kept)
    torch.testing.assert_close(slope, kept[0].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("positions", ["image", "last_prompt"])
def test_whole_streams_beside_a_late_read(vlm, plain, placed, positions: str):
    """The context pass of a read behind the write must not eat the tokens that are looked at."""
    network = SteeringNetwork(D_MODEL, 8, D_MODEL)
    l2s = sp.L2S(network, "resid_post.1", "resid_post.3", positions="last_prompt")
    _, (context,) = plainly(plain, placed, ("resid_post", 3), steer=False)
    with torch.no_grad():
        vectors = network(context[:, -1])
    seen: list[Tensor] = []
    last = torch.zeros_like(placed["input_ids"], dtype=torch.bool)
    last[:, -1] = True
    acts = ("resid_post", 1, adding(vectors, last, True)), ("resid_post", 2, lambda h: seen.append(h.clone()))
    with torch.no_grad(), plain_hooks(plain, *acts):
        logits = plain(**placed).logits
    found = vlm.observe(placed, "resid_post.2", l2s)
    real = placed["attention_mask"].bool()
    torch.testing.assert_close(found["resid_post.2"][real], seen[0][real], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.logits[:, -1], logits[:, -1], rtol=0, atol=1e-5)
    mask = hand_masks(placed)[positions][0]
    kept = vlm.cache(placed, ["resid_post.2"], positions, l2s)
    torch.testing.assert_close(kept["resid_post.2"][kept.mask], seen[0][mask], rtol=0, atol=1e-5)


def test_layout_needs_no_run(torch_vlm, inputs):
    layout = torch_vlm.layout(inputs)
    assert torch.equal(layout.named("image"), inputs["input_ids"] == IMAGE)
    with pytest.raises(sp.InputError, match="input_ids are missing"):
        torch_vlm.layout({"pixel_values": inputs["pixel_values"]})


def test_a_steering_that_matches_nothing_is_refused(torch_vlm, inputs):
    with pytest.raises(sp.PositionError, match="matched no token"):
        torch_vlm.observe(inputs, (), sp.add("resid_post.1", V, "generated"))


def test_what_was_not_observed_is_named(torch_vlm, inputs):
    seen = torch_vlm.observe(inputs, "resid_post.1")
    with pytest.raises(sp.SiteError, match=r"resid_post\.2 was not observed; observed: resid_post\.1"):
        seen["resid_post.2"]
    with pytest.raises(sp.SiteError, match="layer 9"):
        torch_vlm.observe(inputs, "resid_post.9")
