"""P2S vectors on every family: equal to two whole forwards of the plain model per pair, batched or not."""

from __future__ import annotations

from typing import Any

import _zoo
import pytest
import torch
from test_families import FAMILIES, plain
from torch import Tensor

import steer_plugin as sp
from steer_plugin.contrast import ContrastivePair

ANSWERS = (("w20 w21 w22", "w23"), ("w24", "w25 w26"), ("w27 w28", "w29 w30 w31 w32"))


def by_hand(name: str, prompt: str, picture: Any, answer: str) -> tuple[Tensor, Tensor]:
    """Mean of resid_post.1 over the answer's tokens, and resid_post.2 at the last prompt token."""
    processor, model = _zoo.processor_of(name), _zoo.tiny(name)
    text = _zoo.chat(processor, prompt)
    gap = "" if text.endswith("\n") else " "
    more = {"add_special_tokens": False} if text.startswith(processor.tokenizer.bos_token) else {}
    suffix = {}
    if name.startswith("paligemma"):  # the processor itself knows prompt and answer there
        suffix = {"suffix": None}
    seen: dict[int, Tensor] = {}
    bare = processor(images=[[picture]], text=[text], return_tensors="pt", **more)
    bare.pop("labels", None)
    with (
        plain(model, name, "resid_post", lambda h: seen.update({2: h.clone()}), 2),
        torch.no_grad(),
    ):
        model(**bare)
    context = seen[2][0, -1]
    inputs = dict(bare)
    new = torch.tensor([processor.tokenizer(f"{gap}{answer}", add_special_tokens=False)["input_ids"]])
    width = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
    for key, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", int(bool(suffix)))):
        if key in inputs:
            inputs[key] = torch.cat([inputs[key], torch.full_like(new, value)], 1)
    if "cross_attention_mask" in inputs:
        mask = inputs["cross_attention_mask"]
        inputs["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, new.shape[1], -1, -1)], 1)
    with plain(model, name, "resid_post", lambda h: seen.update({1: h.clone()}), 1), torch.no_grad():
        model(**inputs)
    return seen[1][0, width:].mean(0), context


@pytest.mark.parametrize("name", FAMILIES)
def test_shifts_equal_two_whole_forwards(name: str):
    vlm = sp.attach(_zoo.tiny(name), _zoo.processor_of(name))
    prompts, pictures = _zoo.texts_and_pictures()
    pairs = [
        ContrastivePair(f"p{i}", (picture[0],), prompt, plus, minus)
        for i, (prompt, picture, (plus, minus)) in enumerate(zip(prompts, pictures, ANSWERS, strict=True))
    ]
    shifts = vlm.extract(pairs, write="resid_post.1", read="resid_post.2", progress=False, batch_size=3)
    for row, pair in enumerate(pairs):
        (plus, context), (minus, _) = (
            by_hand(name, pair.prompt, pictures[row][0], answer) for answer in (pair.positive, pair.negative)
        )
        torch.testing.assert_close(shifts.vectors[row], plus - minus, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(shifts.contexts[row], context, rtol=1e-4, atol=1e-4)
    sampled = vlm.extract(pairs, write="resid_post.1", target="average_sampled", sampled_tokens=3, progress=False)
    assert torch.isfinite(sampled.vectors).all()
    assert not torch.allclose(sampled.vectors, shifts.vectors)
