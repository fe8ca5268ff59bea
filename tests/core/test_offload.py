"""Weights that accelerate keeps in host memory or on disk: steered, cached and extracted as if they were in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _steerings import INPUTS, attached, said, steerings
from _tiny import ADAPTERS, LAYERS, greedy, tiny_llava, tiny_processor
from PIL import Image
from torch import nn

import steer_plugin as sp
from steer_plugin.contrast.pair import ContrastivePair

pytestmark = pytest.mark.slow

SITES = [sp.resid_post(1), sp.attn_out(3)]
OFFLOADS = ["device_map", "cpu_offload", "disk_offload"]


def offloaded(how: str, folder: Path, seed: int = 0) -> Any:
    """A tiny LLaVA whose weights come into memory for as long as their module runs."""
    from accelerate import cpu_offload, disk_offload, dispatch_model

    hf, cpu = tiny_llava(seed), torch.device("cpu")
    if how == "cpu_offload":
        return cpu_offload(hf, execution_device=cpu)
    if how == "disk_offload":
        return disk_offload(hf, str(folder), execution_device=cpu)
    places = {f"model.language_model.layers.{n}": "disk" if n % 2 else "cpu" for n in range(LAYERS)}
    places |= {"model.language_model.embed_tokens": "disk", "lm_head": "disk", "model.language_model.norm": "cpu"}
    places |= {"model.language_model.rotary_emb": "cpu", "model.vision_tower": "cpu"}
    places |= {"model.multi_modal_projector": "cpu"}
    return dispatch_model(hf, places, main_device="cpu", offload_dir=str(folder))


def hosted(framework: str, how: str) -> bool:
    """nnsight sends inputs to the first parameter's device, which a wholly offloaded model does not have."""
    return framework != "nnsight" or how == "device_map"


@pytest.fixture(params=[(f, how) for f in sorted(ADAPTERS) for how in OFFLOADS if hosted(f, how)], ids="-".join)
def away(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    """An attached model with offloaded weights, and the Hugging Face model in it."""
    framework, how = request.param
    hf = offloaded(how, tmp_path)
    return attached(framework, hf), hf


@pytest.fixture(scope="module")
def home() -> Any:
    """The same model with its weights in memory."""
    return sp.attach(tiny_llava(), tiny_processor())


def accelerated(hf: nn.Module) -> dict[str, tuple[int, list[str]]]:
    """Every hook of accelerate, and which of its module's weights are away."""
    return {
        name: (id(vars(module)["_hf_hook"]), [n for n, p in module.named_parameters(recurse=False) if p.is_meta])
        for name, module in hf.named_modules()
        if "_hf_hook" in vars(module)
    }


def test_offloaded_weights_are_steered_and_stay_offloaded(away, home):
    vlm, hf = away
    before, unsteered = accelerated(hf), greedy(home.root, INPUTS, 4)
    assert any(names for _, names in before.values())
    for name, steering in steerings().items():
        if name in ("mean", "everywhere") and vlm.framework != "torch":
            continue
        got = said(vlm, steering)
        assert torch.equal(got, said(home, steering)), name
        assert not torch.equal(got, unsteered), name
        assert vlm.counts == home.counts
        assert torch.equal(said(vlm, steering * 0), unsteered), name
        assert torch.equal(said(vlm), unsteered), name
    assert accelerated(hf) == before
    if vlm.framework != "transformer_lens":
        assert torch.equal(greedy(hf, INPUTS, 4), unsteered)


def test_offloaded_activations(away, home):
    vlm, hf = away
    before = accelerated(hf)
    for sites in (SITES, [sp.vision_resid_post(0)]):
        got, expected = (one.cache(INPUTS, sites) for one in (vlm, home))
        assert all(torch.equal(got[site], expected[site]) for site in sites)
    pairs = [
        ContrastivePair(str(n), (Image.new("RGB", (16, 16), (90 * n, 9, 9)),), "w20 w21", "w22 w23", "w24")
        for n in range(2)
    ]
    got, expected = (one.extract(pairs, "resid_post.1", progress=False) for one in (vlm, home))
    assert torch.equal(got.vectors, expected.vectors)
    assert torch.equal(got.contexts, expected.contexts)
    assert accelerated(hf) == before


def test_offloaded_model_says_where_and_what_it_is(away, home):
    vlm, _ = away
    assert vlm.device == torch.device("cpu")
    if vlm.framework != "transformer_lens":  # a bridge renames and splits weights
        assert vlm.parts.fingerprint() == home.parts.fingerprint()
    version = vlm.parts.version()
    said(vlm, steerings()["steervlm"])
    assert vlm.parts.version() == version  # or every call would read its prompt pair again


@pytest.mark.parametrize("how", OFFLOADS)
def test_offloaded_weights_are_told_apart(how: str, tmp_path: Path):
    one, other = (sp.attach(offloaded(how, tmp_path / str(seed), seed)).parts for seed in (0, 1))
    assert one.fingerprint() != other.fingerprint()
    assert one.version() != other.version()


def test_a_weight_changed_in_host_memory_is_noticed(tmp_path: Path):
    hf = offloaded("cpu_offload", tmp_path)
    vlm = sp.attach(hf, tiny_processor())
    before, pair = vlm.parts.version(), said(vlm, steerings()["steervlm"])
    with torch.no_grad():
        hf.get_submodule("model.language_model.layers.0.self_attn.v_proj")._hf_hook.weights_map["weight"].mul_(-3)
    assert vlm.parts.version() != before
    assert not torch.equal(said(vlm, steerings()["steervlm"]), pair)


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload"])
def test_nnsight_refuses_a_model_that_is_wholly_away(how: str, tmp_path: Path):
    with pytest.raises(sp.FrameworkError, match="attach the plain"):
        attached("nnsight", offloaded(how, tmp_path))
