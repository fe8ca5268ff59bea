"""One steering of each kind for tiny models, drawn from seeds: what tests of precision, devices and weights share."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from _tiny import D_MODEL, LAYERS, WRAP, draw, tiny_inputs, tiny_processor
from torch import Tensor, nn

import steer_plugin as sp
from steer_plugin.methods.network import SteeringNetwork

PAIR = ("w20 w21", "w30 w31 w32")
INPUTS = tiny_inputs(3)


@cache
def drawn_module(width: int = D_MODEL) -> Any:
    made = sp.SteerVLM.new(sp.SteerVLMConfig(width, LAYERS, heads=2))
    with torch.no_grad():
        for number, weight in enumerate(made.module.parameters()):
            weight.copy_(draw(*weight.shape, seed=number, scale=0.5))
    return made.module


@cache
def drawn_network(width: int = D_MODEL) -> SteeringNetwork:
    network = SteeringNetwork(width, 8, width)
    with torch.no_grad():
        for number, weight in enumerate(network.parameters()):
            weight.copy_(draw(*weight.shape, seed=number))
    return network.requires_grad_(False).eval()


def steerings(width: int = D_MODEL) -> dict[str, Any]:
    return {
        "mean": sp.MeanSteering(draw(width, scale=3), "resid_post.1"),
        "rows": sp.MeanSteering(draw(3, width, scale=3), "attn_out.3", alpha=torch.tensor([1.0, 0.0, 2.0])),
        "everywhere": sp.MeanSteering(draw(width), "mlp_out.2", positions="everywhere"),
        "l2s": sp.L2S(drawn_network(width), "resid_post.3", "resid_post.1"),
        "late": sp.L2S(drawn_network(width), "resid_post.1", "resid_post.3"),
        "steervlm": sp.SteerVLM(drawn_module(width)).pair(*PAIR),
    }


def attached(framework: str, hf: nn.Module) -> Any:
    return sp.attach(WRAP[framework](hf, tiny_processor()), tiny_processor())


def said(vlm: Any, steering: Any = None, **inputs: Tensor) -> Tensor:
    return vlm.generate(**(inputs or INPUTS), steering=steering, max_new_tokens=4, do_sample=False)
