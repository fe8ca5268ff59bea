"""Weights of 8 and 4 bits: what is steered is the stream between them, in the dtype that it has.

torch's own dynamic int8 is tested everywhere; bitsandbytes, torchao and optimum-quanto where they are installed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from _steerings import INPUTS, attached, said, steerings
from _tiny import ADAPTERS, draw, tiny_llava
from torch import nn
from transformers import LlavaForConditionalGeneration

import steer_plugin as sp

pytestmark = pytest.mark.slow

WIDE = 64  # bitsandbytes wants weights of whole blocks: rows by 32, columns by 64


@cache
def wide_llava() -> Any:
    """A tiny LLaVA with a decoder of such widths."""
    config = copy.deepcopy(tiny_llava().config)
    text = config.text_config
    text.hidden_size = text.intermediate_size = WIDE
    text.num_key_value_heads, text.head_dim = text.num_attention_heads, WIDE // text.num_attention_heads
    torch.manual_seed(0)
    hf = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.mul_(3.0)
    hf.generation_config = copy.deepcopy(tiny_llava().generation_config)
    return hf


def dynamic_int8(folder: Path) -> Any:
    """torch's own; deprecated, but in every torch."""
    hf = copy.deepcopy(wide_llava())
    with pytest.warns(Warning):
        torch.ao.quantization.quantize_dynamic(hf.model.language_model, {nn.Linear}, torch.qint8, inplace=True)
    return hf


def loaded(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    """Save a tiny model and load it quantised, as users do."""
    wide_llava().save_pretrained(folder)
    hf = LlavaForConditionalGeneration.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map="cpu"
    ).eval()  # fmt: skip
    hf.generation_config = copy.deepcopy(wide_llava().generation_config)
    return hf


KEPT = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


def bitsandbytes_int8(folder: Path) -> Any:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return loaded(folder, BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEPT), torch.bfloat16)


def bitsandbytes_nf4(folder: Path) -> Any:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=KEPT
    )
    return loaded(folder, config, torch.bfloat16)


def torchao_int8(folder: Path) -> Any:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return loaded(folder, TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=KEPT), torch.float32)


def quanto(folder: Path, weights: str) -> Any:
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    return loaded(folder, QuantoConfig(weights=weights, modules_to_not_convert=KEPT), torch.float32)


QUANTISED: dict[str, Callable[[Path], Any]] = {
    "torch-int8": dynamic_int8,
    "bitsandbytes-int8": bitsandbytes_int8,
    "bitsandbytes-nf4": bitsandbytes_nf4,
    "torchao-int8": torchao_int8,
    "quanto-int8": lambda folder: quanto(folder, "int8"),
    "quanto-int4": lambda folder: quanto(folder, "int4"),
}


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("framework", sorted(ADAPTERS))
def test_quantised_weights(framework: str, kind: str, tmp_path: Path):
    hf = QUANTISED[kind](tmp_path)
    linear = hf.get_submodule("model.language_model.layers.0.self_attn.q_proj")
    assert type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter
    inputs = {**INPUTS, "pixel_values": INPUTS["pixel_values"].to(hf.dtype)}
    vlm = attached(framework, hf)
    unsteered, dtype = said(vlm, **inputs), hf.dtype
    vector = draw(WIDE, scale=3)
    steering = sp.MeanSteering(vector, "resid_post.1", positions="last_prompt")
    for kind_of_site in ("resid_pre", "attn_out", "mlp_out", "resid_post"):
        site = sp.Site(kind_of_site, 1)
        plain = vlm.cache(inputs, site)[site]
        with vlm.steering(sp.add(site, vector, "last_prompt")):
            written = vlm.cache(inputs, site)[site]
        assert vlm.cache(inputs, site)[site].dtype == dtype
        rows = torch.arange(3)
        last = inputs["attention_mask"].sum(-1) - 1  # cached rows are left-aligned
        assert torch.equal(written[rows, last], plain[rows, last] + vector.to(dtype)), site
        written[rows, last] = plain[rows, last]
        assert torch.equal(written, plain)
    assert not torch.equal(said(vlm, steering, **inputs), unsteered)
    assert vlm.counts == [[1, 1, 1]]
    for name, one in steerings(WIDE).items():
        assert said(vlm, one, **inputs).shape == unsteered.shape, name
        assert torch.equal(said(vlm, one * 0, **inputs), unsteered), name
    assert torch.equal(said(vlm, **inputs), unsteered)
    version = vlm.parts.version()
    assert (vlm.parts.fingerprint(), vlm.parts.version()) == (vlm.parts.fingerprint(), version)
