"""Law 7: bad input gets one clear error of its class that names the value and the mend, before any work is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _tiny import (
    D_MODEL,
    D_VISION,
    IMAGE,
    PATCHES,
    draw,
    greedy,
    plain_hooks,
    single_row,
    tiny_inputs,
    with_position_ids,
)
from PIL import Image
from torch import Tensor

import steer_plugin as sp

VECTOR = draw(D_MODEL)
STEERING = sp.add("resid_post.1", VECTOR)


def untouched(vlm: Any, act: Callable[[], Any], error: type[Exception], match: str) -> None:
    """The error comes before the vision tower or the decoder has run."""
    ran: list[int] = []
    hooks = [(kind, layer, lambda h: ran.append(1)) for kind, layer in (("vision_resid_pre", 0), ("resid_pre", 0))]
    with plain_hooks(vlm.root, *hooks) if vlm.framework == "torch" else pytest.MonkeyPatch.context():  # noqa: SIM117
        with pytest.raises(error, match=match):
            act()
    assert not ran


def without(inputs: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {k: v for k, v in inputs.items() if k != key}


def test_no_image_for_an_image_prompt(vlm, inputs):
    words = without(inputs, "pixel_values")
    match = rf"{3 * PATCHES} image tokens.*pixel_values"
    untouched(vlm, lambda: vlm.generate(**words, steering=STEERING, max_new_tokens=1), sp.InputError, match)
    untouched(vlm, lambda: vlm.generate(**words, max_new_tokens=1), sp.InputError, match)
    untouched(vlm, lambda: vlm.cache(words, ["resid_post.1"]), sp.InputError, match)
    untouched(vlm, lambda: STEERING.prepare(vlm, words), sp.InputError, match)


def test_no_image_inside_steering(vlm, placed):
    with pytest.raises(Exception, match="pixel_values") as caught, torch.no_grad(), vlm.steering(STEERING) as steered:
        (vlm.root if vlm.framework == "transformer_lens" else steered)(**without(placed, "pixel_values"))
    assert isinstance(caught.value, sp.InputError)


@pytest.mark.parametrize("pictures", [2, 4])
def test_another_number_of_pictures(vlm, inputs, pictures: int):
    wrong = {**inputs, "pixel_values": draw(pictures, 3, 16, 16)}
    match = rf"the pictures need {pictures * PATCHES} image tokens.*has {3 * PATCHES}"
    untouched(vlm, lambda: vlm.generate(**wrong, steering=STEERING, max_new_tokens=1), sp.InputError, match)
    untouched(vlm, lambda: vlm.cache(wrong, ["resid_post.1"]), sp.InputError, match)


@pytest.mark.parametrize("width", [D_MODEL - 1, D_VISION, 1, 0])
def test_vector_of_another_width(vlm, inputs, width: int):
    match = rf"width {width} .*{D_MODEL} there"
    steering = sp.add("resid_post.1", draw(width))
    untouched(vlm, lambda: vlm.generate(**inputs, steering=steering, max_new_tokens=1), sp.InputError, match)
    with pytest.raises(sp.InputError, match=match), vlm.steering(steering):
        pass


def test_vision_sites_have_their_own_width(vlm, inputs):
    with pytest.raises(sp.InputError, match=rf"width {D_MODEL} .*{D_VISION} there"):
        vlm.generate(**inputs, steering=sp.add("vision_mlp_out.0", VECTOR, "everywhere"), max_new_tokens=1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("make", [sp.add, sp.patch], ids=["add", "patch"])
def test_vectors_that_are_not_finite(make: Callable[..., sp.Intervention], value: float):
    bad = VECTOR.clone()
    bad[3] = value
    with pytest.raises(sp.InputError, match=r"1 NaN or infinite"):
        make("resid_post.1", bad, "image")
    with pytest.raises(sp.InputError, match=r"1 NaN or infinite"):
        make("resid_post.1", bad[None].expand(1, -1), "image")


@pytest.mark.parametrize("shape", [(), (2, 3, D_MODEL)])
def test_vectors_of_other_dimensions(shape: tuple[int, ...]):
    with pytest.raises(sp.InputError, match=r"\(d_model,\) or \(row, d_model\), got \("):
        sp.add("resid_post.1", torch.zeros(shape))


BAD = [math.nan, math.inf, -math.inf, torch.tensor([1.0, math.nan, 1.0])]


@pytest.mark.parametrize("alpha", BAD, ids=str)
def test_strength_that_is_not_finite(alpha: Any):
    with pytest.raises(sp.InputError, match=r"alpha must be a finite number, got .*(nan|inf)"):
        sp.add("resid_post.1", VECTOR, alpha=alpha)
    with pytest.raises(sp.InputError, match=r"alpha must be a finite number"):
        STEERING * alpha


def test_strength_that_is_not_finite_at_some_step(vlm, inputs):
    steering = sp.add("resid_post.1", VECTOR, alpha=lambda step: math.nan if step == 2 else 1.0)
    with pytest.raises(Exception, match="alpha must be a finite number") as caught:
        vlm.generate(**inputs, steering=steering, max_new_tokens=4)
    assert isinstance(caught.value, sp.InputError)


@pytest.mark.parametrize("what", ["vectors", "strengths"])
def test_per_row_values_that_do_not_fit_the_batch(vlm, inputs, what: str):
    steering = {
        "vectors": lambda: sp.add("resid_post.1", draw(2, D_MODEL)),
        "strengths": lambda: sp.add("resid_post.1", VECTOR, alpha=torch.ones(2)),
    }[what]()
    with pytest.raises(Exception, match=r"2 (steering vectors|strengths) do not fit a batch of 3 rows") as caught:
        vlm.generate(**inputs, steering=steering, max_new_tokens=1)
    assert isinstance(caught.value, sp.InputError)


def test_two_vectors_for_four_prompts(torch_vlm):
    """Without beams or returned sequences, two vectors fit two rows only."""
    with pytest.raises(sp.InputError, match="do not fit"):
        torch_vlm.generate(**tiny_inputs(4), steering=sp.add("resid_post.1", draw(2, D_MODEL)), max_new_tokens=1)


@pytest.mark.parametrize("where", ["completion", "image & text", "image & ~prompt", "~(everywhere)"])
def test_positions_that_match_nothing(vlm, inputs, where: str):
    with pytest.raises(Exception, match=r"resid_post\.1.*matches no token.*show_positions") as caught:
        vlm.generate(**inputs, steering=sp.add("resid_post.1", VECTOR, where), max_new_tokens=3)
    assert isinstance(caught.value, sp.PositionError)


def test_generated_without_a_token_fed_back(vlm, inputs, placed):
    steering = sp.add("resid_post.1", VECTOR, "generated")
    with pytest.raises(sp.PositionError, match=r"'generated'.*matched no token in 1 forward.*last_prompt"):
        vlm.generate(**inputs, steering=steering, max_new_tokens=1)
    with pytest.raises(sp.PositionError, match="matched no token"), torch.no_grad(), vlm.steering(steering) as steered:
        (vlm.root if vlm.framework == "transformer_lens" else steered)(**placed)


def test_image_positions_without_an_image(vlm):
    words = {"input_ids": torch.tensor([[1, 9, 10, 6]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with pytest.raises(Exception, match="'image' matches no token") as caught:
        vlm.generate(**words, steering=sp.add("resid_post.1", VECTOR, "image"), max_new_tokens=1)
    assert isinstance(caught.value, sp.PositionError)


def test_a_cache_reused_over_turns(torch_vlm, inputs):
    row = single_row(inputs, 0)
    with torch.no_grad():
        cache = torch_vlm.root(**row).past_key_values
    longer = torch.cat([row["input_ids"], torch.tensor([[20]])], 1)
    turn = {"input_ids": longer, "attention_mask": torch.ones_like(longer), "past_key_values": cache}
    with (
        pytest.raises(sp.FrameworkError, match=r"cache with \d+ tokens.*turns"),
        torch_vlm.steering(STEERING) as steered,
    ):
        steered.generate(**turn, max_new_tokens=2)


def test_several_tokens_behind_a_filled_cache(vlm, inputs):
    row = with_position_ids(single_row(inputs, 0))
    more = {
        "input_ids": torch.tensor([[20, 21, 22]]),
        "attention_mask": torch.ones(1, row["input_ids"].shape[1] + 3).long(),
    }
    with (
        pytest.raises(Exception, match=r"3 tokens at once") as caught,
        torch.no_grad(),
        vlm.steering(STEERING) as steered,
    ):
        call = vlm.root if vlm.framework == "transformer_lens" else steered
        cache = call(**row).past_key_values
        call(**more, past_key_values=cache)
    assert isinstance(caught.value, sp.FrameworkError)


def test_feeding_a_cache_by_hand_is_decoding(vlm, plain, inputs):
    """A forward, then its cache with one more token: what generate does, by hand."""
    row = with_position_ids(single_row(inputs, 0))
    width = row["input_ids"].shape[1]
    more = {"input_ids": torch.tensor([[20]]), "attention_mask": torch.ones(1, width + 1).long()}
    with (
        plain_hooks(plain, ("resid_post", 1, lambda h: torch.cat([h[:, :-1], h[:, -1:] + VECTOR], 1))),
        torch.no_grad(),
    ):
        wanted = plain(**more, past_key_values=plain(**row).past_key_values).logits
    with torch.no_grad(), vlm.steering(STEERING) as steered:
        call = vlm.root if vlm.framework == "transformer_lens" else steered
        got = call(**more, past_key_values=call(**row).past_key_values).logits
    assert torch.equal(got, wanted)


def test_rows_with_other_keys(torch_vlm, inputs):
    first = single_row(inputs, 0)
    with pytest.raises(sp.InputError, match=r"row 1.*pixel_values"):
        torch_vlm.batch([first, without(single_row(inputs, 1), "pixel_values")])
    with pytest.raises(sp.InputError, match="at least one row"):
        torch_vlm.batch([])


def test_a_batch_is_its_rows_padded_on_the_left(torch_vlm, inputs):
    made = torch_vlm.batch([single_row(inputs, row) for row in range(3)])
    assert set(made) == set(inputs)
    assert all(torch.equal(made[key], inputs[key]) for key in inputs)


def test_inputs_of_prompts_and_pictures(torch_vlm, plain, tmp_path):
    picture = Image.new("RGB", (20, 24), "red")
    picture.save(tmp_path / "red.png")
    made = torch_vlm.inputs(["w10 w11", "w12"], [picture, tmp_path / "red.png"])
    assert (made["input_ids"] == IMAGE).sum(-1).tolist() == [PATCHES] * 2
    assert torch.equal(made["pixel_values"][0], made["pixel_values"][1])
    assert made["attention_mask"].tolist()[1][0] == 0
    assert torch.equal(torch_vlm.generate(**made, max_new_tokens=2, do_sample=False), greedy(plain, made, 2))
    for images in ([picture], [picture] * 3):
        with pytest.raises(sp.InputError, match=rf"2 prompts and images for {len(images)}"):
            torch_vlm.inputs(["w10", "w11"], images)
    with pytest.raises(sp.InputError, match=r"missing\.png"):
        torch_vlm.inputs("w10", tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(sp.InputError, match=r"text\.png"):
        torch_vlm.inputs("w10", str(tmp_path / "text.png"))
    with pytest.raises(sp.InputError):
        torch_vlm.inputs([])
    with pytest.raises(sp.InputError, match="processor"):
        sp.attach(plain).inputs("w10")


@pytest.mark.parametrize("mask", [torch.ones(3, 4), torch.ones(3)])
def test_attention_masks_of_other_shapes(torch_vlm, placed, mask: Tensor):
    with (
        pytest.raises(sp.InputError, match=r"attention_mask must have shape \(3, 15\)"),
        torch_vlm.steering(STEERING) as steered,
    ):
        steered(**{**placed, "attention_mask": mask})
