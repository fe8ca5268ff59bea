"""benchmarks/extraction.py on a tiny model: what it compares is the same, and its ratios are those of its times."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

ARMS = ("floor", "ours", "ours_8", "ours_picture", "ours_whole")


@pytest.fixture(scope="module")
def runs() -> dict[str, dict[str, Any]]:
    import extraction

    vlm = extraction.model_of("quick")
    with torch.no_grad():
        return {
            name: extraction.measured(extraction.Task(vlm, name, "quick"), 1, ["authors_100"])
            for name in extraction.TASKS
        }


@pytest.mark.parametrize("task", ["pope", "safety", "late"])
def test_ours_equals_whole_forwards_and_ratios_those_of_the_times(runs: dict[str, dict[str, Any]], task: str):
    found = runs[task]
    apart = found["difference"]
    for arm in ("ours", "ours_8", "ours_picture"):
        assert apart[arm]["vector"] < 1e-4 * apart["largest_vector"]
        assert apart[arm]["context"] < 1e-4 * apart["largest_context"]
    seconds = found["seconds"]
    authors = {"safety": "authors"}.get(task, "authors_1")
    assert set(seconds) == {"R", authors, *ARMS}
    for arm, ((wall, cpu),) in seconds.items():
        assert found["in_R"][f"{arm} wall"]["each"] == [wall / seconds["R"][0][0]]
        assert found["in_R"][f"{arm} cpu"]["each"] == [cpu / seconds["R"][0][1]]
