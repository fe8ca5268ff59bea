"""What every test shares: no network, one thread, fixed seeds, the slow tests last."""

from __future__ import annotations

import os

# Before torch and transformers are imported: both read these once.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
from pathlib import Path

# nnsight breaks beartype's first use when it is imported before it.
import beartype  # noqa: F401
import hypothesis
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)
hypothesis.settings.register_profile("steer_plugin", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steer_plugin")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in this hook too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    for item in items:
        if item.get_closest_marker("slow") is not None:
            # One worker for the slow tests of a file: what they share (a demo, a training) is made once. Families are
            # many and share only a bridge: one worker for each.
            family = getattr(item, "callspec", None) and item.callspec.params.get("name")
            name = f"{item.path.name}-{family}" if item.path.name.startswith("test_famil") else item.path.name
            item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Start every test from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of shared material beside the project: published checkpoints and question sets."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no shared material: {folder.name}/ is not beside the project")
    return folder
