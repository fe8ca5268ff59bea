"""One tiny random model of every family that the package knows, with the processor that belongs to it.

Qwen towers and others have more vision than language layers: a library that takes the longest list of layers for the
decoder picks the wrong tower there. Nothing here uses the package.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import _zoo_processors as processors
import numpy as np
import torch
import transformers as hf
from PIL import Image
from torch import Tensor, nn

D, LAYERS, VOCAB = 32, 4, 128
TEXT: dict[str, Any] = {
    "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB, "max_position_embeddings": 512, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


@dataclass(frozen=True)
class Kind:
    """How to build a family: its model and its processor."""

    config: Callable[[Any], Any]
    model: str
    processor: Callable[[], Any]


def _clip(**more: Any) -> Any:
    return hf.CLIPVisionConfig(**VISION, projection_dim=16, **more)


def _siglip(**more: Any) -> Any:
    return hf.SiglipVisionConfig(**VISION, vision_use_head=False, **more)


def llava(ids: Callable[[str], int]) -> Any:
    return hf.LlavaConfig(
        vision_config=_clip(), text_config=hf.LlamaConfig(**TEXT), image_token_index=ids("<image>"), image_seq_length=4,
        vision_feature_layer=-1,
    )  # fmt: skip


def llava_next(ids: Callable[[str], int]) -> Any:
    return hf.LlavaNextConfig(
        vision_config=_clip(), text_config=hf.MistralConfig(**TEXT, sliding_window=None),
        image_token_index=ids("<image>"), image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        vision_feature_layer=-2, image_seq_length=4,
    )  # fmt: skip


def llava_onevision(ids: Callable[[str], int]) -> Any:
    return hf.LlavaOnevisionConfig(
        vision_config=_siglip(), text_config=hf.Qwen2Config(**TEXT), image_token_index=ids("<image>"),
        video_token_index=ids("<video>"), image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]], vision_feature_layer=-1,
    )  # fmt: skip


def _qwen_tokens(ids: Callable[[str], int]) -> dict[str, int]:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {name: ids(token) for name, token in names.items()}


def qwen2_vl(ids: Callable[[str], int]) -> Any:
    vision = {
        "depth": 6, "embed_dim": 16, "hidden_size": D, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "mlp_ratio": 2,
    }  # fmt: skip
    text = {**TEXT, "model_type": "qwen2_vl_text", "rope_parameters": MROPE}
    return hf.Qwen2VLConfig(text_config=text, vision_config=vision, **_qwen_tokens(ids))


def qwen2_5_vl(ids: Callable[[str], int]) -> Any:
    vision = {
        "depth": 6, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": D, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [2, 5],
    }  # fmt: skip
    text = {**TEXT, "model_type": "qwen2_5_vl_text", "rope_parameters": MROPE}
    return hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_qwen_tokens(ids))


def qwen3_vl(ids: Callable[[str], int]) -> Any:
    vision = {
        "depth": 6, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": D, "num_heads": 2, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [1, 3],
    }  # fmt: skip
    text = {**TEXT, "model_type": "qwen3_vl_text", "rope_parameters": {**MROPE, "mrope_interleaved": True}}
    return hf.Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_tokens(ids))


def gemma3(ids: Callable[[str], int]) -> Any:
    types = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    text = hf.Gemma3TextConfig(**TEXT, sliding_window=8, layer_types=types, query_pre_attn_scalar=8)
    return hf.Gemma3Config(
        text_config=text, vision_config=_siglip(), mm_tokens_per_image=4, image_token_index=ids("<image_soft_token>"),
        boi_token_index=ids("<start_of_image>"), eoi_token_index=ids("<end_of_image>"),
    )  # fmt: skip


def paligemma(ids: Callable[[str], int]) -> Any:
    text = {**TEXT, "model_type": "gemma"}
    return hf.PaliGemmaConfig(
        text_config=text, vision_config=_siglip(projection_dim=D), projection_dim=D, image_token_index=ids("<image>")
    )


def paligemma2(ids: Callable[[str], int]) -> Any:
    text = {**TEXT, "model_type": "gemma2", "sliding_window": 8, "query_pre_attn_scalar": 8}
    return hf.PaliGemmaConfig(
        text_config=text, vision_config=_siglip(projection_dim=D), projection_dim=D, image_token_index=ids("<image>")
    )


def idefics3(config: str, ids: Callable[[str], int]) -> Any:
    vision = {**VISION, "patch_size": 4}
    return getattr(hf, config)(
        vision_config=vision, text_config={"model_type": "llama", **TEXT}, image_token_id=ids("<image>"), scale_factor=2
    )


def internvl(ids: Callable[[str], int]) -> Any:
    vision = {**VISION, "image_size": [16, 16], "patch_size": [4, 4]}
    return hf.InternVLConfig(
        vision_config=vision, text_config={"model_type": "qwen2", **TEXT}, image_token_id=ids("<IMG_CONTEXT>"),
        image_seq_length=4, downsample_ratio=0.5,
    )  # fmt: skip


def mllama(ids: Callable[[str], int]) -> Any:
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_global_layers": 2,
        "attention_heads": 2, "image_size": 16, "patch_size": 8, "max_num_tiles": 4,
        "intermediate_layers_indices": [1, 3], "vision_output_dim": 48,
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    }  # fmt: skip
    text = {
        **TEXT,
        "cross_attention_layers": [1],
        "vocab_size": VOCAB,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    text.pop("head_dim")
    return hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=ids("<|image|>"))


def mistral3(ids: Callable[[str], int]) -> Any:
    vision = {**VISION, "model_type": "pixtral", "patch_size": 4, "image_size": 32, "head_dim": 8}
    return hf.Mistral3Config(
        vision_config=vision, text_config={"model_type": "mistral", **TEXT, "sliding_window": None},
        image_token_index=ids("[IMG]"), spatial_merge_size=2, vision_feature_layer=-1,
    )  # fmt: skip


FAMILIES: dict[str, Kind] = {
    "llava": Kind(llava, "LlavaForConditionalGeneration", processors.llava),
    "llava_next": Kind(llava_next, "LlavaNextForConditionalGeneration", processors.llava_next),
    "llava_onevision": Kind(llava_onevision, "LlavaOnevisionForConditionalGeneration", processors.llava_onevision),
    "qwen2_vl": Kind(qwen2_vl, "Qwen2VLForConditionalGeneration", partial(processors.qwen, "Qwen2VLProcessor")),
    "qwen2_5_vl": Kind(
        qwen2_5_vl, "Qwen2_5_VLForConditionalGeneration", partial(processors.qwen, "Qwen2_5_VLProcessor")
    ),
    "qwen3_vl": Kind(qwen3_vl, "Qwen3VLForConditionalGeneration", partial(processors.qwen, "Qwen3VLProcessor")),
    "gemma3": Kind(gemma3, "Gemma3ForConditionalGeneration", processors.gemma3),
    "paligemma": Kind(paligemma, "PaliGemmaForConditionalGeneration", processors.paligemma),
    "paligemma2": Kind(paligemma2, "PaliGemmaForConditionalGeneration", processors.paligemma),
    "idefics3": Kind(
        partial(idefics3, "Idefics3Config"),
        "Idefics3ForConditionalGeneration",
        partial(processors.idefics3, "Idefics3"),
    ),
    "smolvlm": Kind(
        partial(idefics3, "SmolVLMConfig"), "SmolVLMForConditionalGeneration", partial(processors.idefics3, "SmolVLM")
    ),
    "internvl": Kind(internvl, "InternVLForConditionalGeneration", processors.internvl),
    "mllama": Kind(mllama, "MllamaForConditionalGeneration", processors.mllama),
    "mistral3": Kind(mistral3, "Mistral3ForConditionalGeneration", processors.mistral3),
}


@cache
def processor_of(name: str) -> Any:
    return FAMILIES[name].processor()


@cache
def _built(name: str, attn: str) -> nn.Module:
    kind, tokenizer = FAMILIES[name], processor_of(name).tokenizer
    config = kind.config(tokenizer.convert_tokens_to_ids)
    config._attn_implementation = attn
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(hf, kind.model)(config).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if not parameter.any():  # Gemma 3's projector starts at nothing
                    parameter.normal_(0, 0.3)
                elif parameter.ndim == 1:  # norms, biases, scales
                    parameter.add_(torch.randn_like(parameter) * 0.3)
                else:
                    parameter.mul_(4.0 if "vision" in parameter_name or "visual" in parameter_name else 3.0)
    model.generation_config.eos_token_id = None
    # A picture token that is generated would ask for a picture.
    model.generation_config.suppress_tokens = list(range(tokenizer.convert_tokens_to_ids("w0")))
    with torch.no_grad():  # transformers puts hooks of its own on some layers at the first forward
        model(**inputs_of(name, 1))
    return model


def tiny(name: str, attn: str = "eager") -> Any:
    """A fresh copy of the tiny model."""
    return copy.deepcopy(_built(name, attn))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of coloured noise."""
    draw = np.random.default_rng(seed * 1000 + width * 31 + height)
    return Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8))


PROMPTS = ("w1 w2 w3", "w4", "w5 w6 w7 w8 w9")
SIZES = ((32, 16), (20, 40), (16, 16))


def texts_and_pictures(rows: int = 3) -> tuple[list[str], list[list[Image.Image]]]:
    """Prompts of different lengths, each with one picture of another size."""
    return list(PROMPTS[:rows]), [[picture(*size)] for size in SIZES[:rows]]


def inputs_of(name: str, rows: int = 3) -> dict[str, Tensor]:
    """A left-padded batch straight from the processor, as a user of transformers alone would build it."""
    processor, (prompts, pictures) = processor_of(name), texts_and_pictures(rows)
    texts = [chat(processor, prompt) for prompt in prompts]
    bos = processor.tokenizer.bos_token
    more = {"add_special_tokens": False} if texts[0].startswith(bos) else {}
    out = processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt", **more)
    return {key: value for key, value in out.items() if key != "labels"}


def chat(processor: Any, prompt: str, pictures: int = 1) -> str:
    """One user turn as the family's template writes it; PaliGemma has none."""
    if processor.chat_template is None:
        return "<image>" * pictures + prompt
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": prompt}]
    message = [{"role": "user", "content": content}]
    return processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
