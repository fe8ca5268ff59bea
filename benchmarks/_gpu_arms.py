"""What the GPU benchmark runs: LLaVA-1.5-7B's geometry with random weights, and every way to steer it.

Models are drawn on the device itself, in the asked precision: nothing is downloaded, nothing passes through the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from _steervlm_arms import drawn_steering, word_processor
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

import steer_plugin as sp
from steer_plugin.methods.network import SteeringNetwork

IMAGE, PAD, BOS, WORDS = 32000, 0, 1, 40
Arm = Callable[..., Tensor]  # generate(max_new_tokens=..., logits_processor=...), inputs bound
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Geometry:
    """Sizes of a LLaVA, and the layers at which it is steered.

    Attributes:
        text, vision: what the two configs are given.
        layer: where vectors are added, and where L2S with L' = L* reads and writes.
        late: L' and L* of L2S that reads behind its write.
    """

    text: dict[str, int]
    vision: dict[str, int]
    layer: int
    late: tuple[int, int]

    @property
    def image_tokens(self) -> int:
        """Tokens of one picture."""
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2


def _text(width: int, layers: int, heads: int, inner: int) -> dict[str, int]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**sizes, "intermediate_size": inner, "vocab_size": 32064, "max_position_embeddings": 4096}


def _vision(width: int, layers: int, heads: int, inner: int, picture: int) -> dict[str, int]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**sizes, "intermediate_size": inner, "image_size": picture, "patch_size": 14, "projection_dim": width}


GEOMETRIES = {
    "llava-1.5-7b": Geometry(_text(4096, 32, 32, 11008), _vision(1024, 24, 16, 4096, 336), layer=14, late=(30, 15)),
    "tiny": Geometry(_text(64, 4, 4, 128), _vision(32, 3, 2, 64, 28), layer=1, late=(3, 1)),
}


def build(geometry: Geometry, device: torch.device, dtype: torch.dtype, attention: str, seed: int) -> Any:
    """Draw a model that never stops by itself; the same seed gives the same weights on the same device."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**geometry.vision),
        text_config=LlamaConfig(**geometry.text, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=2),
        image_token_index=IMAGE, image_seq_length=geometry.image_tokens, vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # So that tokens attend to others, and logits differ, at any width.
            parameter.mul_(64 / geometry.text["hidden_size"] ** 0.5 if parameter.ndim == 2 else 1.0)
        model.get_input_embeddings().weight.mul_(30.0)  # what was said last decides what is said next
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [PAD, IMAGE]
    return model.requires_grad_(False)


def batch_of(geometry: Geometry, rows: int, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    """Draw prompts of one length, each a picture between words, (row, pos) ids and (row, 3, y, x) pixels."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(100, IMAGE, (rows, WORDS), generator=draw)
    words[:, 0] = BOS
    picture = torch.full((rows, geometry.image_tokens), IMAGE)
    ids = torch.cat([words[:, : WORDS // 2], picture, words[:, WORDS // 2 :]], 1)
    size = geometry.vision["image_size"]
    pixels = torch.randn(rows, 3, size, size, generator=draw)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(dtype)}
    return {name: value.to(device) for name, value in found.items()}


def vector_of(geometry: Geometry, seed: int) -> Tensor:
    """Draw the vector that the hook and ours add."""
    return 4 * torch.randn(geometry.text["hidden_size"], generator=torch.Generator().manual_seed(seed))


def mean_of(geometry: Geometry, seed: int) -> sp.MeanSteering:
    """Return the same vector as a steering, on the last prompt token and those fed back."""
    return sp.MeanSteering(vector_of(geometry, seed), sp.resid_post(geometry.layer))


def l2s_of(geometry: Geometry, read: int, write: int, device: torch.device, seed: int) -> sp.L2S:
    """Draw L2S with the paper's 100 hidden units, in float32 as it is saved."""
    width = geometry.text["hidden_size"]
    network = SteeringNetwork(width, 100, width).requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for weight in network.parameters():
        weight.copy_(torch.randn(weight.shape, generator=draw) * (weight.shape[-1] ** -0.5) * 4)
    return sp.L2S(network.to(device), sp.resid_post(write), sp.resid_post(read))


def hooked(model: Any, layer: int, vector: Tensor, **inputs: Any) -> Tensor:
    """Generate with what one writes by hand: a forward hook that adds a vector to the newest token, in place."""

    def add(module: nn.Module, args: Any, output: Tensor) -> None:
        output[:, -1] += vector

    handle = model.get_submodule(f"model.language_model.layers.{layer}").register_forward_hook(add)
    try:
        return model.generate(**inputs)
    finally:
        handle.remove()


def traced(wrapped: Any, generate: Callable[..., Tensor], **inputs: Any) -> Tensor:
    """Generate in an nnsight trace that does nothing."""
    kept: list[Any] = []
    with wrapped.trace(fn=generate, **inputs) as tracer:
        kept.append(tracer.result)
    return kept[0]


@dataclass(frozen=True)
class Stage:
    """Arms that share one state of the model and are timed in turn.

    Attributes:
        attention: the text decoder's kernel, as the model itself says.
        arms: for one batch, generate by each arm.
        zeros: the same with a strength of 0: must say what the stage's first arm says.
        ratios: (arm, its baseline).
    """

    name: str
    attention: str
    arms: Callable[[Inputs], dict[str, Arm]]
    zeros: Callable[[Inputs], dict[str, Arm]]
    ratios: tuple[tuple[str, str], ...]


def stages(geometry: Geometry, device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[Stage]:
    """Yield the stages one by one, each on a model of its own with the same weights, and drop it afterwards.

    A bridge changes its model in place and sets it to eager attention; it comes last, after the same model with eager
    attention and no bridge.
    """
    yield torch_stage(geometry, build(geometry, device, dtype, "sdpa", seed), seed)
    if find_spec("nnsight") is not None:
        yield nnsight_stage(geometry, build(geometry, device, dtype, "sdpa", seed), seed)
    if find_spec("transformer_lens") is not None:
        yield from bridge_stages(geometry, build(geometry, device, dtype, "eager", seed), seed)


def _kernel(model: Any) -> str:
    return str(model.config.get_text_config()._attn_implementation)


def torch_stage(geometry: Geometry, model: Any, seed: int) -> Stage:
    """Plain Hugging Face, a hook by hand, and every method of ours on torch hooks."""
    vlm = sp.attach(model, word_processor())
    steervlm = drawn_steering("random", vlm)
    steervlm.module.to(model.dtype)
    vector = vector_of(geometry, seed).to(device=model.device, dtype=model.dtype)
    steerings: dict[str, Any] = {
        "torch_ours": mean_of(geometry, seed),
        "l2s_same_layer": l2s_of(geometry, geometry.layer, geometry.layer, model.device, seed),
        "l2s_late_read": l2s_of(geometry, *geometry.late, model.device, seed),
        "steervlm": steervlm,
    }

    def arms(inputs: Inputs) -> dict[str, Arm]:
        found: dict[str, Arm] = {"unsteered": partial(model.generate, **inputs, do_sample=False)}
        found["torch_hook"] = partial(hooked, model, geometry.layer, vector, **inputs, do_sample=False)
        return found | _ours(vlm, steerings, inputs)

    ratios = tuple((name, "unsteered") for name in ("torch_hook", *steerings))
    return Stage("torch", _kernel(model), arms, _zeros(vlm, steerings), (*ratios, ("torch_ours", "torch_hook")))


def nnsight_stage(geometry: Geometry, model: Any, seed: int) -> Stage:
    """A model that nnsight wraps: called plainly, traced with nothing to do, and steered by ours."""
    from nnsight import NNsight

    wrapped = NNsight(model)
    vlm = sp.attach(wrapped, word_processor())
    steerings = {"nnsight_ours": mean_of(geometry, seed)}

    def arms(inputs: Inputs) -> dict[str, Arm]:
        found: dict[str, Arm] = {"unsteered_wrapped": partial(model.generate, **inputs, do_sample=False)}
        found["nnsight_empty"] = partial(traced, wrapped, model.generate, **inputs, do_sample=False)
        return found | _ours(vlm, steerings, inputs)

    ratios = (
        ("nnsight_empty", "unsteered_wrapped"), ("nnsight_ours", "unsteered_wrapped"),
        ("nnsight_ours", "nnsight_empty"),
    )  # fmt: skip
    return Stage("nnsight", _kernel(model), arms, _zeros(vlm, steerings), ratios)


def bridge_stages(geometry: Geometry, model: Any, seed: int) -> Iterator[Stage]:
    """Eager attention without a bridge, then the same model as a bridge: with no hook of ours, and steered."""

    def plain(inputs: Inputs) -> dict[str, Arm]:
        return {"unsteered_eager": partial(model.generate, **inputs, do_sample=False)}

    yield Stage("eager", _kernel(model), plain, lambda inputs: {}, ())
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    kind = type(model).__name__
    bridge: Any = build_bridge_from_module(model, kind, hf_config=model.config, tokenizer=None)
    vlm = sp.attach(bridge, word_processor())
    steerings = {"transformer_lens_ours": mean_of(geometry, seed)}

    def arms(inputs: Inputs) -> dict[str, Arm]:
        empty: Arm = partial(bridge.original_model.generate, **inputs, do_sample=False)
        return {"transformer_lens_empty": empty, **_ours(vlm, steerings, inputs)}

    ratios = (("transformer_lens_ours", "transformer_lens_empty"),)
    yield Stage("transformer_lens", _kernel(model), arms, _zeros(vlm, steerings), ratios)


def _ours(vlm: Any, steerings: dict[str, Any], inputs: Inputs) -> dict[str, Arm]:
    """Generate with each steering through the package."""
    return {
        name: partial(vlm.generate, steering=one, **inputs, do_sample=False) for name, one in steerings.items()
    }  # fmt: skip


def _zeros(vlm: Any, steerings: dict[str, Any]) -> Callable[[Inputs], dict[str, Arm]]:
    silent = {name: one * 0 for name, one in steerings.items()}
    return partial(_ours, vlm, silent)
