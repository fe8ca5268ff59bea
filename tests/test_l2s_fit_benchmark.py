"""The benchmark of L2S fitting runs from the command line and writes what it promises; no time is asserted."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
ARMS = {
    "pope": ["authors", "pope", "fast", "batch_256", "whole_batch"],
    "safety": ["authors", "safety", "fast", "safety_svd", "safety_random"],
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("l2s_fit") / "new" / "fit.json"
    command = [sys.executable, "benchmarks/l2s_fit.py", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8"))


def test_says_where_and_how_it_ran(result: dict[str, Any]):
    assert {"platform", "cpu", "cores", "load_before", "load_after"} == result["machine"].keys()
    assert {"python", "steer_plugin", "torch", "numpy", "scikit-learn"} <= result["versions"].keys()
    assert result["config"] == {"problems": ["pope", "safety"], "repeats": 1, "dictionary_limit": 0.3}
    assert result["threads"] >= 1


def test_every_arm_has_times_and_quality(result: dict[str, Any]):
    for found in result["problems"]:
        assert list(found["runs"]) == ARMS[found["problem"]]
        assert found["configs"].keys() == found["runs"].keys() - {"authors"}
        for (run,) in found["runs"].values():
            assert run["train_wall_s"] == run["wall_s"] - run["start_wall_s"]
            assert all(math.isfinite(run[name]) for name in ("loss", "held_loss", "held_cosine", "held_explained"))
            assert run["loss"] < found["target_length"]
    (run,) = result["problems"][1]["runs"]["authors"]
    assert {"iterations", "finished", "wall_s", "cpu_s", "objective"} == run["dictionary"].keys()


def test_ratios_are_those_of_the_raw_times(result: dict[str, Any]):
    for found in result["problems"]:
        (theirs,) = found["runs"]["authors"]
        for arm, against in found["against_authors"].items():
            (ours,) = found["runs"][arm]
            assert against["wall_s_ratio"]["median"] == ours["wall_s"] / theirs["wall_s"]
            assert against["held_cosine_difference"]["each"] == [ours["held_cosine"] - theirs["held_cosine"]]


def test_dictionaries_are_compared(result: dict[str, Any]):
    runs = {run["start"]: run for run in result["dictionaries"]["runs"]}
    assert runs["ours"]["objective"] < 1.02 * runs["scikit_learn"]["objective"] < 0.5 * runs["random"]["objective"]
