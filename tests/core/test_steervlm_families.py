"""SteerVLM on families that a user registers: tiles (LLaVA-NeXT), another module tree (Idefics3), mRoPE (Qwen2-VL).

Greedy tokens of left-padded batches equal those of the naive two passes, row by row, on a second copy with plain hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _naive import naive_tokens
from _tiny import tiny_processor
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import steer_plugin as sp
from steer_plugin import families

D, LAYERS, VOCAB, IMAGE = 32, 3, 64, 4
TEXT = {
    "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
PAIRS = [("w20 w21 w22", "w30 w31"), ("w40", "w41 w42 w43 w44")]
Made = tuple[nn.Module, sp.Family, int, Callable[[int], dict[str, Tensor]]]


def llava_next() -> Made:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=16,
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=IMAGE, image_grid_pinpoints=[[16, 16]],
        vision_feature_layer=-1, image_seq_length=4,
    )  # fmt: skip
    family = sp.Family("tiny next", ("llava_next",), "model.language_model", "model.language_model.layers")

    def pictures(rows: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(1)
        return {
            "pixel_values": torch.randn(rows, 2, 3, 16, 16, generator=draw),
            "image_sizes": torch.tensor([[16, 16]] * rows),
        }

    # 4 tokens of the whole picture, 4 of its one tile and a newline for each of the tile's two rows
    return LlavaNextForConditionalGeneration(config), family, 10, pictures


def idefics3() -> Made:
    config = Idefics3Config(
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 4,
        },
        text_config={"model_type": "llama", **TEXT}, image_token_id=IMAGE, scale_factor=2,
    )  # fmt: skip
    family = sp.Family("tiny idefics", ("idefics3",), "model.text_model", "model.text_model.layers")

    def pictures(rows: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(rows, 1, 3, 16, 16, generator=torch.Generator().manual_seed(1))}

    return Idefics3ForConditionalGeneration(config), family, 4, pictures


def qwen2_vl() -> Made:
    config = Qwen2VLConfig(
        text_config={
            **TEXT, "model_type": "qwen2_vl_text",
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2, "embed_dim": 16, "hidden_size": D, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "mlp_ratio": 2,
        },
        image_token_id=IMAGE, video_token_id=60, vision_start_token_id=61, vision_end_token_id=62,
    )  # fmt: skip
    family = sp.Family("tiny qwen", ("qwen2_vl",), "model.language_model", "model.language_model.layers")

    def pictures(rows: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(1)
        return {
            "pixel_values": torch.randn(rows * 16, 3 * 2 * 4 * 4, generator=draw),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
        }

    return Qwen2VLForConditionalGeneration(config), family, 4, pictures


FAMILIES: dict[str, Callable[[], Made]] = {"llava_next": llava_next, "idefics3": idefics3, "qwen2_vl": qwen2_vl}


@pytest.fixture(params=sorted(FAMILIES))
def case(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any, dict[str, Tensor], sp.Family]]:
    """A model, a second copy of it, a left-padded batch of two, and the family as a user would register it."""
    torch.manual_seed(0)
    model, family, tokens, pictures = FAMILIES[request.param]()
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [0, IMAGE, 60]
    texts = [[1, 5, *[IMAGE] * tokens, *range(20, 20 + n), 6] for n in (3, 6)]
    width = max(map(len, texts))
    inputs = {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in texts]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in texts]),
        **pictures(2),
    }
    if request.param == "qwen2_vl":
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    before = dict(families._registry.by_type)
    sp.register_family(family)
    yield model, copy.deepcopy(model), inputs, family
    families._registry.by_type = before


def naive(
    plain: Any, family: sp.Family, made: sp.SteerVLM, inputs: dict[str, Tensor], row: int, where: str
) -> list[int]:
    tokenizer = tiny_processor().tokenizer
    spelled = [(tokenizer(f"USER: {text} ASSISTANT:")["input_ids"], slice(2, -1)) for text in PAIRS[row]]
    one = row_of(inputs, row)
    return naive_tokens(plain, family.decoder, family.layers, made.module, spelled, one, where, 5, (0, IMAGE, 60))


def row_of(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    real = inputs["attention_mask"][row].bool()
    out = {}
    for name, value in inputs.items():
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            out[name] = value[row][real][None]
        else:
            out[name] = value.chunk(2)[row]
    return out


@pytest.mark.parametrize("where", ["last_prompt|generated", "everywhere"])
def test_equals_the_naive_two_passes(case, where: str):
    model, plain, inputs, family = case
    made = sp.SteerVLM.new(sp.SteerVLMConfig(D, LAYERS, reduction=2, heads=4), 3)
    with torch.no_grad():
        made.module.steerer.up.weight.mul_(25)
    vlm = sp.attach(model, tiny_processor())
    steering = made.pair(*zip(*PAIRS, strict=True)).with_positions(where)
    got = vlm.generate(**inputs, steering=steering, max_new_tokens=5, do_sample=False)
    assert got[:, -5:].tolist() == [naive(plain, family, made, inputs, row, where) for row in range(2)]
    unsteered = vlm.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert not torch.equal(got, unsteered)


def test_a_family_without_the_site(case):
    """Layers without a self-attention of that name (as Mllama's cross-attention layers) are refused before any work."""
    import dataclasses

    model, _, inputs, family = case
    sp.register_family(dataclasses.replace(family, attention="cross_attn"))
    vlm = sp.attach(model, tiny_processor())
    steering = sp.SteerVLM.new(sp.SteerVLMConfig(D, LAYERS, reduction=2, heads=4)).pair("w20", "w21")
    with pytest.raises(sp.SiteError, match=r"has no 'attn_out\.0' in this model.*cross_attn"):
        vlm.generate(**inputs, steering=steering, max_new_tokens=2)
