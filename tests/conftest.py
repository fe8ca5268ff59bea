"""What every test shares: no network, one thread, fixed seeds, the slow tests last."""

from __future__ import annotations

import os

# Before torch and transformers are imported: both read these once.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import random
from pathlib import Path

import _checked

# nnsight breaks beartype's first use when it is imported before it.
import beartype  # noqa: F401
import hypothesis
import numpy as np
import pytest
import torch

_checked.install()  # before the package is imported

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)
hypothesis.settings.register_profile("steer_plugin", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steer_plugin")


# Slow groups that take longest, the longest first: one that began last would leave the other worker without work.
LONGEST = (
    "test_published_orders.py", "forked", "test_processes.py", "test_stances.py", "test_cli.py",
    "test_reproduce.py", "test_pocket_benchmarks.py", "test_benchmarks.py", "test_demo.py", "test_nnsight_remote.py",
)  # fmt: skip


# Not units: whole jobs, real models through every framework. They run with the slow ones.
WHOLE = (
    "test_runner.py", "test_check.py", "test_devices.py", "test_travel.py", "test_pocket_laws.py",
    "test_pocket_model.py", "test_pocket_training.py", "test_overhead_counts.py", "test_bridges.py",
    "test_prefix.py", "test_calibrate.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Let xdist give the groups out in the order below; by itself it puts those of many tests first."""
    config.option.loadscopereorder = False


def group_of(item: pytest.Item) -> str:
    """One worker for the tests of a file: what they share (a demo, a training) is made once."""
    name = item.path.name
    if item.get_closest_marker("slow") is None:
        return f"{name}, fast"
    if hasattr(getattr(item, "module", None), "_forked"):
        return "forked"  # the processes that the jobs are forked from are loaded once
    # Families are many and share only a bridge: one worker for each.
    family = getattr(item, "callspec", None) and item.callspec.params.get("name")
    return f"{name}-{family}" if name.startswith("test_famil") else name


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in this hook too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {id(item): -1 for item in items}
    for item in items:
        if item.path.parent.name == "jobs" or item.path.name in WHOLE:
            item.add_marker(pytest.mark.slow)
        name = group_of(item)
        item.add_marker(pytest.mark.xdist_group(name))
        if item.get_closest_marker("slow") is not None:
            rank[id(item)] = LONGEST.index(name) if name in LONGEST else len(LONGEST)
    items.sort(key=lambda item: rank[id(item)])


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not walk over it again, and comes less often."""
    gc.freeze()
    gc.set_threshold(5_000, 20, 20)


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
