"""Bulk activations: equal to Hugging Face's own hidden states, one prompt at a time, whatever shared a forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _tiny import PATCHES, tiny_llava, tiny_processor
from test_extraction_tree import picture

import steer_plugin as sp
from steer_plugin.processes import Processes

TEXTS = ("w10 w11 w12", "w10 w11", "w13", "w10 w14 w15 w16", "w17")


def prompts() -> list[sp.Prompt]:
    one, other = picture(0), picture(1)
    return [sp.Prompt(f"p{i}", (other if i == 2 else one,), text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def vlm() -> sp.AttachedModel:
    return sp.attach(tiny_llava(), tiny_processor())


def states(prompt: sp.Prompt, layer: int) -> torch.Tensor:
    """resid_post of a layer by Hugging Face alone."""
    text = f"USER: <image>\n{prompt.prompt} ASSISTANT:"
    encoded = tiny_processor()(images=[prompt.images[0]], text=[text], return_tensors="pt")
    keep = ("input_ids", "attention_mask", "pixel_values")
    with torch.no_grad():
        out = tiny_llava().model(**{key: encoded[key] for key in keep}, output_hidden_states=True)
    return out.hidden_states[layer + 1][0]


@pytest.mark.parametrize("size", [1, 2, "auto"])
def test_means_and_tokens_equal_hidden_states(vlm, tmp_path: Path, size: Any):
    sites = [sp.resid_post(0), "resid_post.2"]
    mean = vlm.collect(prompts(), sites, "text", out=tmp_path / "mean", batch_size=size, progress=False)
    each = vlm.collect(
        prompts(), sites, "last_prompt|image", out=tmp_path / "each", reduce="none", batch_size=size, progress=False
    )
    assert mean.ids == each.ids == [f"p{i}" for i in range(5)]
    assert mean.names == each.names == ("resid_post.0", "resid_post.2")
    for layer in (0, 2):
        got = mean.tensor(f"resid_post.{layer}")
        tokens = each.ragged(f"resid_post.{layer}")
        for row, prompt in enumerate(prompts()):
            hidden = states(prompt, layer)
            text = torch.cat([hidden[:2], hidden[2 + PATCHES :]])  # <s> USER:, and what is behind the picture
            torch.testing.assert_close(got[row], text.mean(0), rtol=1e-4, atol=1e-5)
            chosen = torch.cat([hidden[2 : 2 + PATCHES], hidden[-1:]])
            torch.testing.assert_close(tokens[row], chosen, rtol=1e-4, atol=1e-5)
    assert [row["tokens"] for row in each.rows] == [PATCHES + 1] * 5


def test_half_precision_is_kept_as_asked(vlm, tmp_path: Path):
    store = vlm.collect(prompts(), "resid_post.1", out=tmp_path, dtype=torch.bfloat16, progress=False)
    assert store.tensor("resid_post.1").dtype == torch.bfloat16


def test_several_processes_make_the_same_store(vlm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One after the other here, so that the first one finds the store unfinished where it would wait."""
    how = {"sites": "resid_post.1", "batch_size": 2, "progress": False}
    whole = vlm.collect(prompts(), out=tmp_path / "one", **how)
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    monkeypatch.setattr(Processes, "current", lambda: Processes(0, 2))
    with pytest.raises(sp.JobError, match="not finished"):
        vlm.collect(prompts(), out=tmp_path / "two", **how)
    monkeypatch.setattr(Processes, "current", lambda: Processes(1, 2))
    found = vlm.collect(prompts(), out=tmp_path / "two", **how)
    assert found.ids == whole.ids
    assert len(found.shards) == 2
    assert torch.equal(found.tensor("resid_post.1"), whole.tensor("resid_post.1"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompts": []}, sp.InputError, "collection needs at least one prompt"),
        ({"sites": []}, sp.InputError, "at least one site"),
        ({"sites": "vision_resid_post.0"}, sp.SiteError, "vlm.cache reads it"),
        ({"sites": "resid_post.9"}, sp.SiteError, "out of range"),
        ({"positions": "completion"}, sp.PositionError, "finds no token in row 0"),
        ({"reduce": "max"}, sp.InputError, "unknown reduction 'max'"),
        ({"dtype": torch.int8}, sp.InputError, "floating-point"),
    ],
)
def test_bad_requests_are_refused(vlm, tmp_path: Path, change, error, message):
    request = {"prompts": prompts(), "sites": "resid_post.1", "out": tmp_path, "progress": False} | change
    with pytest.raises(error, match=message):
        vlm.collect(**request)
    if "prompts" in change:
        with pytest.raises(sp.InputError, match="text that is not empty"):
            sp.Prompt("p", (), " ")
