"""What is fitted on one framework is the same on the others, bit by bit, with eager attention; and steers there."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from _tiny import ADAPTERS, Recorder, forward_logits, tiny_inputs, with_position_ids
from PIL import Image

import steer_plugin as sp
from steer_plugin import artefact
from steer_plugin.contrast import ContrastivePair
from steer_plugin.training.config import preset

FRAMEWORKS = sorted(ADAPTERS)
# Written after the residual stream and inside a layer, read before and behind the write.
SITES = (("resid_post.1", "resid_post.1"), ("attn_out.2", "resid_post.3"), ("mlp_out.1", "resid_pre.0"))


def pairs(count: int = 12) -> list[ContrastivePair]:
    """Pictures, questions of several lengths, and openings of other lengths: every batch is padded."""
    draw = torch.Generator().manual_seed(4)
    pictures = torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=draw).numpy()
    words = [" ".join(f"w{10 + (3 * i + k) % 30}" for k in range(1 + i % 4)) for i in range(count)]
    return [
        ContrastivePair(
            f"p{i}", (Image.fromarray(pictures[i]),), words[i], f"w{40 + i}", f"w{41 + i} w{42 + i}", "",
            "yes" if i % 2 else "no",
        )
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module", params=SITES, ids=lambda sites: sites[0])
def shifts(request: pytest.FixtureRequest, attached_models: dict[str, Any]) -> dict[str, sp.Shifts]:
    """The same extraction on every framework."""
    write, read = request.param
    return {
        name: attached_models[name].extract(pairs(), write, read, batch_size=5, progress=False) for name in FRAMEWORKS
    }


def fitted(shifts: sp.Shifts) -> dict[str, Any]:
    config = preset("pope", epochs=3, hidden=8, learning_rate=1e-2)
    return {
        "mean": sp.MeanSteering.fit(shifts, "yes", positions="everywhere", alpha=2.0),
        "l2s": sp.L2S.fit(shifts, config, seed=1, positions="last_prompt|generated", alpha=5.0),
    }


def test_shifts_and_what_is_fitted_are_the_same_bits(shifts, tmp_path):
    first = FRAMEWORKS[0]
    for name in FRAMEWORKS:
        assert torch.equal(shifts[name].vectors, shifts[first].vectors)
        assert torch.equal(shifts[name].contexts, shifts[first].contexts)
        for kind, steering in fitted(shifts[name]).items():
            steering.save(tmp_path / kind / name)
            one, other = (artefact.read(tmp_path / kind / framework) for framework in (name, first))
            assert one.meta == other.meta
            assert one.tensors.keys() == other.tensors.keys()
            assert all(torch.equal(one.tensors[key], other.tensors[key]) for key in one.tensors)
            files = [(tmp_path / kind / framework / "tensors.safetensors").read_bytes() for framework in (name, first)]
            assert files[0] == files[1]
    assert shifts[first].vectors.abs().max() > 0.1


def steered(vlm: Any, steering: sp.Steerable) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, the scores that chose them, and the logits of the prompt."""
    seen, inputs = Recorder(), tiny_inputs(3)
    tokens = vlm.generate(**inputs, steering=steering, max_new_tokens=6, do_sample=False, logits_processor=[seen])
    with vlm.steering(steering) as model:
        logits = forward_logits(vlm, model, with_position_ids(inputs))
    return tokens, torch.stack(seen.scores), logits


@pytest.mark.parametrize("kind", ["mean", "l2s"])
def test_saved_on_one_steers_alike_on_the_others(shifts, attached_models, tmp_path: Path, kind: str):
    loader = {"mean": sp.MeanSteering, "l2s": sp.L2S}[kind]
    for name in FRAMEWORKS:
        fitted(shifts[name])[kind].save(tmp_path / name)
    wanted = steered(attached_models["torch"], fitted(shifts["torch"])[kind])
    for made, used in product(FRAMEWORKS, FRAMEWORKS):
        found = steered(attached_models[used], loader.load(tmp_path / made))
        for mine, its in zip(found, wanted, strict=True):
            assert torch.equal(mine, its), f"made on {made}, used on {used}"
    plain = steered(attached_models["torch"], sp.add("resid_post.1", torch.ones(32), alpha=0.0))
    assert not torch.equal(plain[2], wanted[2])


def test_an_extraction_is_resumed_on_another_framework(attached_models, tmp_path: Path):
    few = pairs(6)
    first = attached_models["torch"].extract(few[:3], "resid_post.1", progress=False)
    for name in FRAMEWORKS:
        again = attached_models[name].extract(few, "resid_post.1", out=tmp_path, batch_size=3, progress=False)
        assert again.job["model"] == first.job["model"]
        assert len(again.with_neutral(first)) == 9
