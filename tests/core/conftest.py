"""Models for the tests of the core: built once, and checked after every test to be as they were."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _tiny import ADAPTERS, hook_count, tiny_inputs, tiny_llava, tiny_processor, with_position_ids
from torch import Tensor

# Families that stand for the others while one works: plain, mRoPE, post norms with sliding windows, cross-attention.
QUICK = ("llava", "qwen2_vl", "gemma3", "mllama")
BY_FAMILY = ("test_famil", "test_bridge", "test_check", "test_pictures")
BY_FRAMEWORK = ("test_steervlm_streams", "test_record", "test_devices")


@pytest.hookimpl(tryfirst=True)  # before the slow tests are put last
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of every family are many: those of the others, and through other frameworks, run with the slow ones."""
    for item in items:
        spec = getattr(item, "callspec", None)
        if spec is None or not item.path.name.startswith((*BY_FAMILY, *BY_FRAMEWORK)):
            continue
        frameworks = {spec.params.get(key, "torch") for key in ("framework", "vlm", "adapter")}
        name = spec.params.get("name") if item.path.name.startswith(BY_FAMILY) else None
        if frameworks != {"torch"} or (name is not None and name not in QUICK):
            item.add_marker(pytest.mark.slow)


def modules_of(vlm: Any) -> list[torch.nn.Module]:
    """Every module tree that could keep a hook: the Hugging Face model, and the bridge around it."""
    return [vlm.root, *([vlm.model] if isinstance(vlm.model, torch.nn.Module) else [])]


def watched(vlm: Any) -> Iterator[Any]:
    before = hook_count(*modules_of(vlm))
    yield vlm
    if hook_count(*modules_of(vlm)) != before:
        gc.collect()  # hooks() and apply() end when what they returned is forgotten
    assert hook_count(*modules_of(vlm)) == before, "the test left torch hooks on the model"


@pytest.fixture(scope="session")
def attached_models() -> dict[str, Any]:
    models = {name: attach(tiny_processor()) for name, attach in ADAPTERS.items()}
    for model in models.values():
        model.root(**tiny_inputs(1))  # transformers and TransformerLens install hooks of their own at the first forward
    return models


@pytest.fixture(params=sorted(ADAPTERS))
def vlm(request: pytest.FixtureRequest, attached_models: dict[str, Any]) -> Iterator[Any]:
    """Attached models of identical weights: one for each framework."""
    yield from watched(attached_models[request.param])


@pytest.fixture
def torch_vlm(attached_models: dict[str, Any]) -> Iterator[Any]:
    yield from watched(attached_models["torch"])


@pytest.fixture
def nnsight_vlm(attached_models: dict[str, Any]) -> Iterator[Any]:
    yield from watched(attached_models["nnsight"])


@pytest.fixture
def bridge_vlm(attached_models: dict[str, Any]) -> Iterator[Any]:
    yield from watched(attached_models["transformer_lens"])


@pytest.fixture(scope="session")
def plain() -> Any:
    """Return a further copy of the same weights that the package never sees."""
    return tiny_llava()


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    """Three rows of different lengths, left-padded."""
    return tiny_inputs(3)


@pytest.fixture
def placed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same batch with the position_ids that `generate` uses."""
    return with_position_ids(inputs)
