"""Patches do what plain hooks that overwrite the stream do; gradients estimate them; TransformerLens agrees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from _tiny import D_MODEL, IMAGE, LAYERS, draw, plain_hooks, single_row, tiny_inputs, tiny_llava
from test_steervlm_streams import bound
from torch import Tensor

import steer_plugin as sp
from steer_plugin.analysis import (
    activation_patching,
    attributed_steering,
    attribution_patching,
    interactive,
    localise,
    patch_streams,
    steering_patching,
)
from steer_plugin.methods.network import SteeringNetwork

V = draw(D_MODEL, seed=4, scale=2.0)
STEERING = sp.add("resid_post.1", V, "image")


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 7] - logits[:, -1, 9]


@pytest.fixture
def corrupt(placed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same prompts with other pictures."""
    return {**placed, "pixel_values": draw(*placed["pixel_values"].shape, seed=8)}


def streams_of(model: Any, inputs: dict[str, Tensor], kind: str) -> tuple[Tensor, list[Tensor]]:
    seen: list[Tensor] = []
    with (
        torch.no_grad(),
        plain_hooks(model, *[(kind, layer, lambda h: seen.append(h.clone())) for layer in range(LAYERS)]),
    ):
        logits = model(**inputs).logits
    return metric(logits), seen


def overwritten(model: Any, inputs: dict[str, Tensor], kind: str, layer: int, mask: Tensor, value: Tensor) -> Tensor:
    with torch.no_grad(), plain_hooks(model, (kind, layer, lambda h: torch.where(mask[..., None], value, h))):
        return metric(model(**inputs).logits)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_patches_are_overwritten_streams(vlm, plain, placed, corrupt, direction: str):
    found = activation_patching(vlm, placed, corrupt, metric, direction=direction, progress=False)
    base, source = (corrupt, placed) if direction == "denoise" else (placed, corrupt)
    low, _ = streams_of(plain, base, "resid_post")
    high, streams = streams_of(plain, source, "resid_post")
    image = placed["input_ids"] == IMAGE
    last = torch.zeros_like(image)
    last[:, -1] = True
    parts = [image, placed["attention_mask"].bool() & ~image & ~last, last]
    by_hand = torch.stack(
        [
            torch.stack([overwritten(plain, base, "resid_post", layer, part, streams[layer]) for part in parts])
            for layer in range(LAYERS)
        ]
    )
    torch.testing.assert_close(found.patched, by_hand, rtol=0, atol=2e-5)
    effect = (by_hand - low).mean(-1) / (high - low).mean()
    np.testing.assert_allclose(found.effect, effect.numpy(), atol=1e-4)
    assert found.to_frame().columns.tolist() == ["kind", "layer", "part", "effect", "low", "high", "metric"]


def test_a_whole_layer_makes_the_base_the_source(torch_vlm, placed, corrupt):
    found = activation_patching(torch_vlm, placed, corrupt, metric, ["resid_post.2"], ["everywhere"], progress=False)
    torch.testing.assert_close(found.patched[0, 0], found.source, rtol=0, atol=1e-5)
    assert found.effect[0, 0] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("nested", [False, True])
def test_a_steering_of_both_runs_is_not_added_twice(torch_vlm, placed, corrupt, nested: bool):
    """A patch where the steering writes brings what arrives there; the base run's own steering comes on top."""
    sites, given = ["resid_post.1", "resid_post.3"], {"parts": ["everywhere"], "progress": False}
    if nested:
        with torch_vlm.steering(STEERING):
            found = activation_patching(torch_vlm, placed, corrupt, metric, sites, **given)
    else:
        found = activation_patching(torch_vlm, placed, corrupt, metric, sites, steering=STEERING, **given)
    np.testing.assert_allclose(found.effect, [[1], [1]], atol=1e-4)


def test_estimates_follow_a_late_read(torch_vlm, placed):
    """The prompt runs twice then, and what arrives before the write acts in both passes."""
    network = SteeringNetwork(D_MODEL, 8, D_MODEL)
    late = sp.L2S(network, "resid_post.1", "resid_post.3", positions="last_prompt")
    near = {**placed, "pixel_values": placed["pixel_values"] + 1e-2 * draw(*placed["pixel_values"].shape, seed=8)}
    given = {"sites": ["resid_pre.1"], "parts": ["everywhere"], "steering": late}
    exact = activation_patching(torch_vlm, placed, near, metric, **given, progress=False)
    guess = attribution_patching(torch_vlm, placed, near, metric, **given)
    assert exact.effect[0, 0] == pytest.approx(1, abs=0.02)
    assert guess.effect[0, 0] == pytest.approx(1, abs=0.2)


def test_two_patches_of_one_site_are_both_there(torch_vlm, placed, corrupt):
    image = placed["input_ids"] == IMAGE
    last = torch.zeros_like(image)
    last[:, -1] = True
    stream = torch_vlm.observe(placed, "resid_post.1")["resid_post.1"]
    apart = patch_streams("resid_post.1", stream, image) + patch_streams("resid_post.1", stream, last)
    whole = patch_streams("resid_post.1", stream, image | last)
    torch.testing.assert_close(*(torch_vlm.observe(corrupt, (), one).logits for one in (apart, whole)), rtol=0, atol=0)


def test_patched_prompts_decode_on(torch_vlm, placed):
    """What is fed back while decoding is nobody's stream: a patch of a run into itself changes no token."""
    inputs = {key: value for key, value in placed.items() if key != "position_ids"}
    stream = torch_vlm.observe(inputs, "resid_post.1")["resid_post.1"]
    patch = patch_streams("resid_post.1", stream, inputs["attention_mask"].bool())
    for options in ({}, {"num_beams": 2}):
        given = {**inputs, "max_new_tokens": 4, "do_sample": False, **options}
        assert torch.equal(torch_vlm.generate(**given, steering=patch), torch_vlm.generate(**given))


def test_masks_of_ones_own(torch_vlm, plain, placed, corrupt):
    one = torch.zeros_like(placed["attention_mask"], dtype=torch.bool)
    one[:, -3] = True
    found = activation_patching(torch_vlm, placed, corrupt, metric, ["attn_out.2"], {"third last": one}, progress=False)
    _, streams = streams_of(plain, placed, "attn_out")
    torch.testing.assert_close(
        found.patched[0, 0], overwritten(plain, corrupt, "attn_out", 2, one, streams[2]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("way", ["insert", "remove"])
def test_steering_is_patched_both_ways(torch_vlm, plain, placed, way: str):
    found = steering_patching(torch_vlm, placed, STEERING, metric, ["mlp_out.2"], ["image"], way=way, progress=False)
    image = placed["input_ids"] == IMAGE
    steer = ("resid_post", 1, lambda h: torch.where(image[..., None], h + V, h))
    seen: list[Tensor] = []
    keep = ("mlp_out", 2, lambda h: seen.append(h.clone()))
    with torch.no_grad():
        with plain_hooks(plain, *([steer] if way == "insert" else []), keep):
            high = metric(plain(**placed).logits)
        patch = ("mlp_out", 2, lambda h: torch.where(image[..., None], seen[0], h))
        with plain_hooks(plain, *([] if way == "insert" else [steer]), patch):
            patched = metric(plain(**placed).logits)
    torch.testing.assert_close(found.source, high, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.patched[0, 0], patched, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["late", "twins"])
def test_steerings_of_several_passes_are_patched(torch_vlm, placed, name: str):
    """All of the last layer is all of the effect, also where the prompt's end runs again or twins ride along."""
    network = SteeringNetwork(D_MODEL, 8, D_MODEL)
    late = sp.L2S(network, "resid_post.1", "resid_post.3", positions="last_prompt", alpha=4.0)
    steering = late if name == "late" else bound("everywhere")
    for way in ("insert", "remove"):
        swept = steering_patching(
            torch_vlm,
            placed,
            steering,
            metric,
            ["resid_pre.1", "resid_post.3"],
            ["everywhere"],
            way=way,
            progress=False,
        )
        assert swept.effect[1, 0] == pytest.approx(1, abs=1e-3)
        guess = attributed_steering(torch_vlm, placed, steering, metric, ["resid_pre.1"], ["last_prompt"], way=way)
        assert np.isfinite(guess.effect).all()
    if name == "late":
        assert swept.effect[0, 0] == pytest.approx(0, abs=1e-3)  # nothing is steered before the write


def test_localise_looks_behind_the_write(torch_vlm, placed):
    found = localise(torch_vlm, placed, sp.add("attn_out.2", V, "last_prompt"), metric, progress=False)
    assert [str(site) for site in found.sites] == ["mlp_out.2", "attn_out.3", "mlp_out.3"]
    with pytest.raises(sp.InputError, match="no attention or MLP lies behind"):
        localise(torch_vlm, placed, sp.add("resid_post.3", V, "last_prompt"), metric)


def test_estimates_are_gradients(torch_vlm, placed, corrupt):
    found = attribution_patching(torch_vlm, placed, corrupt, metric, ["resid_post.2"], ["image"])
    model, image = tiny_llava(), placed["input_ids"] == IMAGE
    _, clean = streams_of(model, placed, "resid_post")
    kept: list[Tensor] = []
    with plain_hooks(model, ("resid_post", 2, lambda h: kept.append(h))):
        metric(model(**corrupt).logits).sum().backward(inputs=kept)
    assert kept[0].grad is not None
    moved = ((clean[2] - kept[0].detach()) * kept[0].grad).sum(-1)
    torch.testing.assert_close(found.patched[0, 0] - found.base, (moved * image).sum(-1), rtol=1e-3, atol=1e-4)
    assert found.estimated


def test_estimates_of_small_changes_are_right(torch_vlm, placed):
    small = STEERING * 1e-2
    sites, parts = ["resid_post.1", "resid_post.2", "attn_out.3"], ["image", "last_prompt"]
    for way in ("insert", "remove"):
        exact = steering_patching(torch_vlm, placed, small, metric, sites, parts, way=way, progress=False)
        guess = attributed_steering(torch_vlm, placed, small, metric, sites, parts, way=way)
        np.testing.assert_allclose(guess.effect, exact.effect, atol=0.05)
    assert exact.compared(guess).shape == (6, 5)


def test_frozen_weights_do_not_matter(placed, corrupt):
    model = tiny_llava().requires_grad_(False)
    frozen = attribution_patching(sp.attach(model), placed, corrupt, metric)
    free = attribution_patching(sp.attach(tiny_llava()), placed, corrupt, metric)
    torch.testing.assert_close(frozen.patched, free.patched)


def test_transformer_lens_sweeps_with_pictures(bridge_vlm, plain):
    from transformer_lens import patching

    clean = single_row(tiny_inputs(3), 0)
    corrupt = {**clean, "pixel_values": draw(*clean["pixel_values"].shape, seed=8)}
    _, cache = bridge_vlm.bound(clean).run_with_cache()
    bound = bridge_vlm.bound(corrupt)
    theirs = patching.get_act_patch_resid_pre(bound, bound.tokens, cache, lambda logits: metric(logits).mean())
    columns = {str(c): torch.arange(bound.tokens.shape[1])[None] == c for c in range(bound.tokens.shape[1])}
    ours = activation_patching(
        bridge_vlm, clean, corrupt, metric, [sp.resid_pre(layer) for layer in range(LAYERS)], columns, progress=False
    )
    torch.testing.assert_close(ours.patched[..., 0], theirs.cpu(), rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(bound.forward(), bound.run_with_hooks(fwd_hooks=[]))
    with pytest.raises(sp.FrameworkError, match=r"use vlm\.generate"):
        bound.generate(bound.tokens)
    with pytest.raises(sp.InputError, match="do not fit the pictures"):
        bound.run_with_hooks(bound.tokens[:, 1:])


def test_what_cannot_be_patched_is_refused(torch_vlm, placed, corrupt):
    short, right = tiny_inputs(2), tiny_inputs(3, side="right")
    for call, message in [
        (lambda: activation_patching(torch_vlm, placed, short, metric), r"clean inputs have \(3, \d+\)"),
        (lambda: activation_patching(torch_vlm, placed, placed, metric), "same mean 'metric'"),
        (lambda: steering_patching(torch_vlm, right, STEERING, metric), "row 0 is padded on the right"),
        (
            lambda: activation_patching(torch_vlm, placed, corrupt, metric, direction="both"),
            "direction must be 'denoise'",
        ),
        (lambda: steering_patching(torch_vlm, placed, STEERING, metric, way="both"), "way must be 'insert'"),
        (lambda: activation_patching(torch_vlm, placed, corrupt, metric, ["projector"]), "lies in the vision tower"),
        (
            lambda: activation_patching(torch_vlm, placed, corrupt, lambda x: x.mean()),
            r"gave \(\); expected a tensor of 3",
        ),
        (lambda: activation_patching(torch_vlm, placed, corrupt, metric, parts=["generated"]), "has no token"),
    ]:
        with pytest.raises(sp.SteeringError, match=message):
            call()


def test_figures_show_the_effects(torch_vlm, placed, corrupt):
    found = activation_patching(torch_vlm, placed, corrupt, metric, progress=False)
    axes = found.plot().axes[0]
    np.testing.assert_allclose(np.asarray(axes.images[0].get_array()), found.effect)
    assert [label.get_text() for label in axes.get_xticklabels()] == list(found.parts)
    np.testing.assert_allclose(interactive(found).data[0].z, found.effect)
    lines = localise(torch_vlm, placed, STEERING, metric, progress=False)
    drawn = {one.get_label(): one.lines[0].get_ydata() for one in lines.plot().axes[0].containers}
    assert set(drawn) == {"attn_out", "mlp_out"}
    np.testing.assert_allclose(
        drawn["mlp_out"], [e for s, e in zip(lines.sites, lines.effect[:, 0], strict=True) if s.kind == "mlp_out"]
    )
