"""Every notebook is a slow test of its own: nbmake runs it where it lies, from top to bottom, and changes nothing."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

# The notebooks' kernels inherit them: no network, and no more threads than cores.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

FOLDER = Path(__file__).resolve().parent


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a notebook as soon as it is known: tests/conftest.py sorts and groups by the mark."""
    if item.path.suffix == ".ipynb":
        item.add_marker(pytest.mark.slow)
        item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Refuse a notebook that leaves files beside itself."""
    before = _files()
    yield
    if left := _files() - before:
        pytest.fail(f"{item.path.name} left {sorted(left)} in the folder of the tutorials.", pytrace=False)


def _files() -> set[str]:
    return {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if "__pycache__" not in path.parts}
