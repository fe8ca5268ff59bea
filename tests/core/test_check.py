"""`vlm.check()` and `steer-plugin check`: passes on what is right, and names the mend for what is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import _zoo
import pytest
import torch
from test_families import FAMILIES, attached
from torch import nn
from typer.testing import CliRunner

import steer_plugin as sp
from steer_plugin import families
from steer_plugin.adapters import FRAMEWORKS
from steer_plugin.cli import app


@pytest.fixture
def registered() -> Iterator[None]:
    before = dict(families._registry.by_type)
    yield
    families._registry.by_type = before


def failures(report: sp.CheckReport) -> dict[str, str]:
    return {check.name: check.mend for check in report.checks if check.state == "failed"}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_passes(name: str):
    report = attached(name, "torch").check(_zoo.inputs_of(name, 1), progress=False)
    assert failures(report) == {}
    assert report.ok
    assert str(report).endswith("all checks passed")
    names = [check.name for check in report.checks]
    for asked in ("sites fire", "added to the stream", "alpha 0", "one token", "cached = uncached", "late reads"):
        assert asked in names


@pytest.mark.parametrize("framework", ["nnsight", "transformer_lens"])
def test_other_frameworks_pass(framework: str):
    report = sp.attach(_zoo.tiny("qwen2_vl"), _zoo.processor_of("qwen2_vl"), framework=framework).check(progress=False)
    assert failures(report) == {}
    assert f"{framework} = a plain hook" in [check.name for check in report.checks]


def test_a_norm_that_the_record_forgot(registered: None):
    """Gemma 3 with the raw attention as attn_out: what is added is something else."""
    record = next(one for one in families.known_families() if one.name == "gemma3")
    sp.register_family(dataclasses.replace(record, attn_added="self_attn"))
    found = failures(attached("gemma3", "torch").check(_zoo.inputs_of("gemma3", 1), progress=False))
    assert list(found) == ["added to the stream"]
    assert "attn_added=" in found["added to the stream"]


def test_positions_that_are_wrong_for_the_family(registered: None):
    record = next(one for one in families.known_families() if one.name == "qwen2_vl")
    sp.register_family(dataclasses.replace(record, positions="mask"))
    found = failures(attached("qwen2_vl", "torch").check(_zoo.inputs_of("qwen2_vl", 1), progress=False))
    assert list(found) == ["a batch = its rows"]
    assert "positions=" in found["a batch = its rows"]


def test_layers_of_the_vision_tower_taken_for_the_decoder(registered: None):
    """What a library does that takes the longest list of layers."""
    wrong = sp.Family("wrong", ("qwen2_vl",), "model.language_model", "model.visual.blocks", attention="attn")
    sp.register_family(wrong)
    report = attached("qwen2_vl", "torch").check(_zoo.inputs_of("qwen2_vl", 1), progress=False)
    assert not report.ok
    assert "some checks failed" in str(report)
    assert all(failures(report).values())


def test_a_model_that_draws_random_numbers():
    model = _zoo.tiny("llava")
    model.model.language_model.norm = nn.Sequential(model.model.language_model.norm, nn.Dropout(0.5)).train()
    found = failures(sp.attach(model, _zoo.processor_of("llava")).check(_zoo.inputs_of("llava", 1), progress=False))
    assert "model.eval()" in found["alpha 0"]


def test_inputs_of_ones_own_without_a_processor():
    vlm = sp.attach(_zoo.tiny("llava"))
    with pytest.raises(sp.InputError, match=r"vlm\.check\(inputs\)"):
        vlm.check(progress=False)
    assert vlm.check(_zoo.inputs_of("llava", 2), progress=False).ok


def test_nothing_is_left_behind():
    vlm, inputs = attached("llava", "torch"), _zoo.inputs_of("llava")
    with torch.no_grad():
        before = vlm.root(**inputs).logits
    vlm.check(inputs, progress=False)
    with torch.no_grad():
        assert torch.equal(vlm.root(**inputs).logits, before)


def test_the_command_checks_each_framework():
    done = CliRunner().invoke(app, ["check", "pocket"])
    assert done.exit_code == 0, done.output
    for name in FRAMEWORKS:
        assert f"attached through {name}" in done.output
    assert "failed" not in done.output


def test_the_command_says_what_failed(monkeypatch: pytest.MonkeyPatch, registered: None):
    record = next(one for one in families.known_families() if one.name == "llava")
    sp.register_family(dataclasses.replace(record, attn_added="input_layernorm"))
    done = CliRunner().invoke(app, ["check", "pocket", "--framework", "torch"], env={"COLUMNS": "200"})
    assert done.exit_code == 1
    assert "attn_added=" in done.output


def test_an_unknown_model_or_framework():
    done = CliRunner().invoke(app, ["check", "pocket", "--framework", "tensorflow"])
    assert isinstance(done.exception, sp.InputError)
    assert "unknown framework 'tensorflow'" in str(done.exception)
    with pytest.raises(sp.InputError, match=r"takes a plain Hugging Face model, got NNsight"):
        sp.attach(attached("llava", "nnsight").model, framework="transformer_lens")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_attaching_through_a_framework_twice_is_one_object(framework: str):
    model, processor = _zoo.tiny("llava"), _zoo.processor_of("llava")
    vlm = sp.attach(model, processor, framework=framework)
    assert vlm.framework == framework
    assert sp.attach(model, processor, framework=framework) is vlm
    assert sp.attach(vlm.model, processor) is vlm
