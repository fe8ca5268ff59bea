"""Run by test_nnsight_remote.py: writes each steered trace as nnsight would send it, and what it gives here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _tiny import D_MODEL, LAYERS, draw, tiny_inputs, tiny_llava, tiny_processor
from cloudpickle.cloudpickle import _PICKLE_BY_VALUE_MODULES
from nnsight import NNsight, TransformersModel
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend

import steer_plugin as sp
from steer_plugin.methods import SteeringNetwork

INPUTS = tiny_inputs(3)


class Ship(Backend):
    """Write the request to a file, as the remote backend builds it, and run nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, tracer: Any) -> None:
        self.path.write_bytes(RequestModel.serialize(tracer))


def in_a_trace(model: Any, vlm: Any, steering: sp.Steerable, backend: Backend) -> Any:
    kept = None
    with model.trace(**INPUTS, backend=backend):
        steering.apply(vlm)
        kept = model.lm_head.output.save()
    return kept


def in_a_generation(model: Any, vlm: Any, steering: sp.Steerable, backend: Backend) -> Any:
    kept = None
    with model.generate(max_new_tokens=4, do_sample=False, backend=backend) as tracer:
        with tracer.invoke(**INPUTS):
            pass
        with tracer.invoke():
            steering.apply(vlm, tracer)
        with tracer.invoke():
            kept = tracer.result.save()
    return kept


def around_a_trace(model: Any, vlm: Any, steering: sp.Steerable, backend: Backend) -> Any:
    kept = None
    with vlm.steering(steering) as steered, steered.trace(**INPUTS, backend=backend):
        kept = model.lm_head.output.save()
    return kept


def around_a_generation(model: Any, vlm: Any, steering: sp.Steerable, backend: Backend) -> Any:
    kept = None
    options = {"max_new_tokens": 4, "do_sample": False, "backend": backend}
    with vlm.steering(steering) as steered, steered.generate(**INPUTS, **options) as tracer:
        kept = tracer.result.save()
    return kept


def unsteered(model: Any, vlm: Any, steering: sp.Steerable, backend: Backend) -> Any:
    kept = None
    with model.trace(**INPUTS, backend=backend):
        kept = model.lm_head.output.save()
    return kept


WAYS = {"plain": (in_a_trace, around_a_trace), "whole": (in_a_generation, around_a_generation)}


def steerings(vlm: sp.AttachedModel) -> dict[str, sp.Steerable]:
    """Every kind: a vector, a sum with a strength of the step, L2S early, late and prepared, SteerVLM with its pair."""
    mean = sp.MeanSteering(draw(D_MODEL, scale=2), "resid_post.1", "everywhere")
    network = SteeringNetwork(D_MODEL, 16, D_MODEL).requires_grad_(False)
    module = sp.SteerVLM.new(sp.SteerVLMConfig(D_MODEL, LAYERS, reduction=2, heads=4))
    for i, weight in enumerate(module.module.parameters()):
        weight.add_(draw(*weight.shape, seed=i, scale=0.3))
    late = sp.L2S(network, "resid_post.1", "resid_post.3")
    return {
        "mean": mean,
        "sum": mean * 0.5 + sp.add("attn_out.2", draw(D_MODEL, seed=2), alpha=lambda step: 1.0 + step),
        "l2s": sp.L2S(network, "resid_post.1", positions="everywhere"),
        "late": late,
        "prepared": late.prepare(vlm, INPUTS),
        "steervlm": module.pair("w8 w9", "w10 w11 w12"),
    }


def cases() -> Iterator[tuple[str, Callable[..., Any], Any, Any, sp.Steerable]]:
    """Name, way in, model, its attachment and steering of every case; the name's first word says which model."""
    plain = NNsight(tiny_llava())
    whole = TransformersModel(tiny_llava(), task="image-text-to-text", processor=tiny_processor())
    for first, model, processor in (("plain", plain, tiny_processor()), ("whole", whole, None)):
        vlm = sp.attach(model, processor)
        every = steerings(vlm)
        yield f"{first} unsteered", unsteered, model, vlm, every["mean"]
        inside, around = WAYS[first]
        for name, steering in every.items():
            if name != "late":  # a block has one pass
                yield f"{first} {inside.__name__} {name}", inside, model, vlm, steering
            yield f"{first} {around.__name__} {name}", around, model, vlm, steering


def main(folder: Path) -> None:
    """Write NAME.request for every case, and here.pt with what each gives in this process."""
    torch.manual_seed(0)
    here: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, way, model, vlm, steering in cases():
            here[name] = way(model, vlm, steering, Backend())
            way(model, vlm, steering, Ship(folder / f"{name}.request"))
        _PICKLE_BY_VALUE_MODULES.discard("steer_plugin")  # what the adapter's register() adds
        way(model, vlm, steering, Ship(folder / f"{name} unregistered.request"))
    torch.save(here, folder / "here.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
