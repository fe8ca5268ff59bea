"""Lens, patches and gradients on every family: what the model itself says is the measure."""

from __future__ import annotations

from functools import cache
from typing import Any

import _zoo
import numpy as np
import pytest
import torch
from torch import Tensor

import steer_plugin as sp
from steer_plugin.analysis import activation_patching, attribution_patching, direction_lens, logit_lens

FAMILIES = tuple(_zoo.FAMILIES)


@cache
def attached(name: str) -> Any:
    return sp.attach(_zoo.tiny(name), _zoo.processor_of(name))


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 30] - logits[:, -1, 40]


def other_pictures(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    noise = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(3))
    return {**inputs, "pixel_values": noise.to(inputs["pixel_values"])}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_lens_of_the_last_layer_is_the_model(name: str):
    vlm, inputs = attached(name), _zoo.inputs_of(name, 2)
    found = logit_lens(vlm, inputs, [30], [sp.resid_post(1), sp.resid_post(-1)])
    with torch.no_grad():
        said = vlm.root(**inputs).logits.float().softmax(-1)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found.of("30")[-1][real], said[..., 30][real], rtol=1e-3, atol=1e-5)
    if name != "mllama":  # its one token stands for the whole picture
        _, pictures = _zoo.texts_and_pictures(2)
        figure = found.plot_image(pictures, "30", found.sites[0], row=1)
        drawn = [one for axes in figure.axes for one in axes.collections if one.get_label() == "values"]
        assert sum(len(one.get_array()) for one in drawn) > 0
    vector = torch.randn(vlm.d_model, generator=torch.Generator().manual_seed(1))
    # A direction and its opposite raise and lower the same words, whatever the norm's gain and offset are.
    both = direction_lens(vlm, {"v": vector, "-v": -vector}).logits
    torch.testing.assert_close(both[0], -both[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_layer_carries_the_picture(name: str):
    vlm, inputs = attached(name), _zoo.inputs_of(name, 2)
    corrupt = other_pictures(inputs)
    site = sp.resid_post(vlm.n_layers - 1)
    found = activation_patching(vlm, inputs, corrupt, metric, [site], ["everywhere", "last_prompt"], progress=False)
    np.testing.assert_allclose(found.effect, [[1, 1]], atol=1e-2)
    # Behind the last layer only norm and head are left, and its own slope is that of the metric by hand.
    guess = attribution_patching(vlm, inputs, corrupt, metric, [site], ["last_prompt"])
    with torch.no_grad():
        stream, source = (vlm.observe(one, site)[site][:, -1] for one in (corrupt, inputs))
    leaf = stream.clone().requires_grad_()
    head = vlm.root.get_output_embeddings()
    logits = head(vlm.parts.decoder.norm(leaf))[:, None]
    cap = getattr(vlm.root.config.get_text_config(), "final_logit_softcapping", None)
    metric(cap * torch.tanh(logits / cap) if cap else logits).sum().backward()
    moved = ((source - stream) * leaf.grad).sum(-1)
    torch.testing.assert_close(guess.patched[0, 0] - guess.base, moved, rtol=1e-2, atol=1e-4)
