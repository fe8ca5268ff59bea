"""The SteerVLM benchmark runs from the command line and writes what it promises; no time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARMS = ["unsteered", "naive", "ours", "naive_everywhere", "ours_everywhere"]
MEASURES = {"first_token_s", "total_s", "decode_s"}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("benchmark") / "bench.json"
    options = "--models pocket --tokens 3 --repeats 1 --batch 2 --device cpu --out"
    command = [sys.executable, "benchmarks/steervlm_latency.py", *options.split(), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert [line.split(" | ")[0].strip("| ") for line in done.stdout.splitlines() if line.startswith("|")][2:] == ARMS
    assert [path.name for path in out.parent.iterdir()] == ["bench.json"]
    return json.loads(out.read_text(encoding="utf-8"))


def test_says_where_and_how_it_ran(result: dict[str, Any]):
    assert result["versions"].keys() == {"python", "steer_plugin", "torch", "transformers"}
    assert result["threads"] >= 1
    assert result["device"]
    asked = {"models": "pocket", "tokens": 3, "repeats": 1, "batch": 2, "device": "cpu", "dtype": "float32"}
    assert result["config"] == {**asked, "compile": False}
    assert [(run["model"], run["dtype"]) for run in result["runs"]] == [("pocket", "float32")]


def test_naive_and_ours_say_the_same(result: dict[str, Any]):
    assert result["agrees"] is True
    found = result["runs"][0]["agreement"]
    assert found["agrees"] is True
    assert found["steering_changes_tokens"] is True
    assert found["said"]["naive"] == found["said"]["ours"] != found["said"]["unsteered"]
    assert found["said"]["naive_everywhere"] == found["said"]["ours_everywhere"] != found["said"]["unsteered"]
    assert 10 * found["largest_difference_of_scores"] < found["smallest_gap_between_best_two"]


def test_counts_what_is_saved(result: dict[str, Any]):
    run, rows = result["runs"][0], 2
    work, prompt = run["work"], rows * run["prompt_tokens"]
    for arm, forwards, streams, heads in (
        ("unsteered", 1, 1, 1), ("naive", 2, 2, 2), ("ours", 1, 2, 1), ("naive_everywhere", 2, 2, 2),
        ("ours_everywhere", 1, 2, 1),
    ):  # fmt: skip
        assert work[arm]["each_decoded_token"] == {
            "decoder_forwards": forwards, "decoder_tokens": streams * rows, "lm_head_forwards": heads,
            "lm_head_tokens": heads * rows, "vision_forwards": 0,
        }, arm  # fmt: skip
    first = {arm: counts["first_token"]["decoder_tokens"] for arm, counts in work.items()}
    assert first == {
        "unsteered": prompt, "naive": 2 * prompt, "ours": prompt + rows, "naive_everywhere": 2 * prompt,
        "ours_everywhere": 2 * prompt,
    }  # fmt: skip


def test_ratios_are_those_of_the_raw_times(result: dict[str, Any]):
    run = result["runs"][0]
    times = run["times"]
    assert list(times) == ARMS
    assert all(len(measured) == 1 and measured[0].keys() == MEASURES for measured in times.values())
    assert run["ratios"].keys() == {"first_token_s", "decode_s"}
    for measure, ratios in run["ratios"].items():
        assert {"naive / unsteered", "ours / unsteered", "ours / naive"} <= ratios.keys()
        assert "ours_everywhere / naive_everywhere" in ratios
        for name, ratio in ratios.items():
            one, other = (times[arm][0][measure] for arm in name.split(" / "))
            assert ratio == {"each": [one / other], "q1": one / other, "median": one / other, "q3": one / other}
