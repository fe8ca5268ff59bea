"""What the overhead benchmark runs: one vector through every framework, beside each framework's own empty run.

    unsteered       model(...), model.generate(...)
    torch_hook      the same with a hook written by hand, which adds the vector to the newest token in place
    torch_ours      MeanSteering through this package, the same vector on the same tokens
    l2s_late_read   L2S with L' behind L*: the prompt is read first, its last token steered afterwards
    nnsight_empty   an nnsight trace with nothing in it              nnsight_ours   MeanSteering through nnsight
    lens_empty      a TransformerBridge without hooks of ours        lens_ours      MeanSteering through the bridge

Each framework has a model of its own with the same weights: nnsight wraps every module, a bridge replaces them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from _gpu_arms import hooked, traced
from _steervlm_arms import load
from torch import Tensor, nn

import steer_plugin as sp
from steer_plugin.methods.network import SteeringNetwork

Inputs = dict[str, Tensor]
FRAMEWORKS = ("torch", "nnsight", "transformer_lens")
RATIOS = (
    ("torch_hook", "unsteered"), ("torch_ours", "unsteered"), ("torch_ours", "torch_hook"),
    ("l2s_late_read", "unsteered"), ("nnsight_empty", "unsteered"), ("nnsight_ours", "nnsight_empty"),
    ("lens_empty", "unsteered"), ("lens_ours", "lens_empty"),
)  # fmt: skip
# Arms that add one vector on one set of tokens, to models of the same numbers, and so must say the same.
SAME_TOKENS = ("torch_hook", "torch_ours", "nnsight_ours")
ZEROS = {
    "torch_ours": "unsteered", "l2s_late_read": "unsteered", "nnsight_ours": "nnsight_empty", "lens_ours": "lens_empty",
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One way to run a model: a plain forward, and `generate(max_new_tokens=..., logits_processor=...)`."""

    forward: Callable[[], object]
    generate: Callable[..., Tensor]


@dataclass(frozen=True)
class Block:
    """One model and one batch under every arm.

    Attributes:
        arms: what is timed; `zeros` the arms of ours with a strength of 0, which must say what their baseline says.
    """

    model: str
    batch: int
    d_model: int
    layers: int
    prompt_tokens: int
    attention: dict[str, str]
    arms: dict[str, Arm]
    zeros: dict[str, Arm]


def steerings(vlm: Any, seed: int) -> dict[str, Any]:
    """Draw a vector for the layer in the middle, and a late read: L' two thirds up the network, L* one third."""
    layers, width = vlm.n_layers, vlm.d_model
    draw = torch.Generator().manual_seed(seed)
    network = SteeringNetwork(width, 100, width).requires_grad_(False)
    for weight in network.parameters():
        weight.copy_(torch.randn(weight.shape, generator=draw) * (weight.shape[-1] ** -0.5) * 4)
    return {
        "mean": sp.MeanSteering(vector_of(width, seed), sp.resid_post(layers // 2)),
        "late": sp.L2S(network, sp.resid_post(layers // 3), sp.resid_post(2 * layers // 3)),
    }


def vector_of(width: int, seed: int) -> Tensor:
    """Draw the vector that the hook by hand and ours add."""
    return 4 * torch.randn(width, generator=torch.Generator().manual_seed(seed))


def block(name: str, batch: int, frameworks: tuple[str, ...], seed: int) -> Block:
    """Load or draw the model once for each framework that is asked for and installed, and bind every arm."""
    model, processor, inputs = load(name, batch)
    vlm = sp.attach(model, processor)
    made = steerings(vlm, seed)
    layer, vector = vlm.n_layers // 2, vector_of(vlm.d_model, seed)
    plain = partial(model, **inputs, logits_to_keep=1)
    arms = {
        "unsteered": Arm(plain, partial(model.generate, **inputs, do_sample=False)),
        "torch_hook": Arm(
            partial(by_hand, model, layer, vector, plain),
            partial(hooked, model, layer, vector, **inputs, do_sample=False),
        ),
        "torch_ours": ours(vlm, made["mean"], inputs),
        "l2s_late_read": ours(vlm, made["late"], inputs),
    }
    zeros = {
        name: ours(vlm, made[key] * 0, inputs) for name, key in (("torch_ours", "mean"), ("l2s_late_read", "late"))
    }
    attention = {"torch": kernel(model)}
    if "nnsight" in frameworks and find_spec("nnsight") is not None:
        other, _, _ = load(name, batch)
        wrapped = sp.attach(other, processor, framework="nnsight")
        arms |= {"nnsight_empty": empty_trace(wrapped, inputs), "nnsight_ours": ours(wrapped, made["mean"], inputs)}
        zeros["nnsight_ours"] = ours(wrapped, made["mean"] * 0, inputs)
        attention["nnsight"] = kernel(other)
    if "transformer_lens" in frameworks and find_spec("transformer_lens") is not None:
        other, _, _ = load(name, batch)
        bridged = sp.attach(other, processor, framework="transformer_lens")
        empty = Arm(partial(other, **inputs, logits_to_keep=1), partial(other.generate, **inputs, do_sample=False))
        arms |= {"lens_empty": empty, "lens_ours": ours(bridged, made["mean"], inputs)}
        zeros["lens_ours"] = ours(bridged, made["mean"] * 0, inputs)
        attention["transformer_lens"] = kernel(other)
    width = inputs["input_ids"].shape[1]
    return Block(name, batch, vlm.d_model, vlm.n_layers, width, attention, arms, zeros)


def kernel(model: Any) -> str:
    """Name the attention kernel of the text decoder."""
    return str(model.config.get_text_config()._attn_implementation)


def ours(vlm: Any, steering: Any, inputs: Inputs) -> Arm:
    """Steer through the package: a block around one forward, `vlm.generate` for a generation."""

    def forward() -> object:
        with vlm.steering(steering) as steered:
            call = vlm.root if vlm.framework == "transformer_lens" else steered
            return call(**inputs, logits_to_keep=1)

    return Arm(forward, partial(vlm.generate, steering=steering, **inputs, do_sample=False))


def empty_trace(vlm: Any, inputs: Inputs) -> Arm:
    """Trace with nothing to do."""

    def forward() -> object:
        kept: list[Any] = []
        with vlm.model.trace(**inputs, logits_to_keep=1) as tracer:
            kept.append(tracer.result)
        return kept[0]

    return Arm(forward, partial(traced, vlm.model, vlm.root.generate, **inputs, do_sample=False))


def by_hand(model: Any, layer: int, vector: Tensor, forward: Callable[[], object]) -> object:
    """Run a forward with a hook that adds a vector to the newest token, in place."""

    def add(module: nn.Module, args: Any, output: Tensor) -> None:
        output[:, -1] += vector

    handle = model.get_submodule(f"model.language_model.layers.{layer}").register_forward_hook(add)
    try:
        return forward()
    finally:
        handle.remove()
