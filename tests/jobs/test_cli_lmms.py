"""The model name for lmms-eval's command line: its base class imitated, as lmms-eval may be missing."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import steer_plugin as sp
from steer_plugin import cli_lmms


@pytest.fixture
def named(monkeypatch):
    """The class as it is built over a base that keeps what it is given."""

    class Base:
        def __init__(self, tasks) -> None:
            self.tasks = tasks

    monkeypatch.setattr(cli_lmms, "lmms_class", lambda: Base)
    cli_lmms.named_class.cache_clear()
    yield cli_lmms.NamedLMM
    cli_lmms.named_class.cache_clear()


def test_the_manifest_names_a_class_that_is_there(monkeypatch, named):
    registry = ModuleType("lmms_eval.models.registry_v2")
    registry.ModelManifest = lambda **given: SimpleNamespace(**given)
    monkeypatch.setitem(sys.modules, "lmms_eval", ModuleType("lmms_eval"))
    monkeypatch.setitem(sys.modules, "lmms_eval.models", ModuleType("lmms_eval.models"))
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    made = cli_lmms.manifest()
    assert made.model_id == "steer_plugin"
    module, _, name = made.simple_class_path.rpartition(".")
    assert module == cli_lmms.__name__
    assert getattr(cli_lmms, name) is named


def test_model_and_steering_come_by_name(tmp_path, named):
    vector = torch.arange(128.0)
    sp.MeanSteering(vector, "resid_post.2", alpha=2.0).save(tmp_path / "mine")
    made = named(pretrained="pocket", steering=str(tmp_path / "mine"), scale=1.5, batch_size="3")
    assert made.tasks.batch_size == 3
    (write,) = made.tasks.steering.intervention.writes
    assert str(write.site) == "resid_post.2"
    assert write.alpha == pytest.approx(3.0)
    assert named(pretrained="pocket").tasks.steering is None


def test_a_scale_without_a_steering_is_refused(named):
    with pytest.raises(sp.InputError, match=r"scale is 2.*without a steering"):
        named(pretrained="pocket", scale=2.0)


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="no attribute 'NamedLLM'"):
        _ = cli_lmms.NamedLLM
