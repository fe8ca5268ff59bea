"""The benchmarks run from the command line and write what they promise; no time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

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


# -- benchmarks/gpu.py -----------------------------------------------------------------------------------------------

STAGES = {
    "torch": ("sdpa", ["unsteered", "torch_hook", "torch_ours", "l2s_same_layer", "l2s_late_read", "steervlm"]),
    "nnsight": ("sdpa", ["unsteered_wrapped", "nnsight_empty", "nnsight_ours"]),
    "eager": ("eager", ["unsteered_eager"]),
    "transformer_lens": ("eager", ["transformer_lens_empty", "transformer_lens_ours"]),
}


def gpu(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu.py", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def tiny_gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    options = "--geometry tiny --device cpu --tokens 3 --repeats 1 --batch 1,2 --out"
    done = gpu(*options.split(), str(out))
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_says_so_and_stops():
    done = gpu("--batch", "1")
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    assert "needs a CUDA device" in done.stdout


def test_gpu_says_where_and_how_it_ran(tiny_gpu: dict[str, Any]):
    assert {"platform", "cpu", "cores", "device", "gpu"} == tiny_gpu["machine"].keys()
    assert {"torch", "transformers", "steer_plugin", "nnsight", "transformer_lens"} <= tiny_gpu["versions"].keys()
    assert tiny_gpu["threads"] >= 1
    assert tiny_gpu["seeds"] == {"weights": 0, "inputs": 0, "steering": 0}
    asked = {"geometry": "tiny", "device": "cpu", "dtype": "float32", "batch": "1,2", "tokens": 3, "repeats": 1}
    assert tiny_gpu["config"] == {**asked, "seed": 0}
    runs = [(run["stage"], run["attention"], run["batch"], list(run["times"])) for run in tiny_gpu["runs"]]
    assert runs == [(name, kernel, rows, arms) for name, (kernel, arms) in STAGES.items() for rows in (1, 2)]


def test_gpu_arms_agree(tiny_gpu: dict[str, Any]):
    assert tiny_gpu["agrees"] is True
    for rows in (1, 2):
        said = {run["stage"]: run["agreement"]["said"] for run in tiny_gpu["runs"] if run["batch"] == rows}
        first = {name: said[name][arms[0]] for name, (_, arms) in STAGES.items()}
        assert first["torch"] == first["nnsight"]
        assert first["eager"] == first["transformer_lens"]
        for name, (_, arms) in STAGES.items():
            zeros = {arm: tokens for arm, tokens in said[name].items() if arm.endswith("_at_0")}
            assert list(zeros) == [f"{arm}_at_0" for arm in arms if "ours" in arm or arm.startswith(("l2s", "steer"))]
            assert all(tokens == first[name] for tokens in zeros.values())
            assert all(said[name][arm.removesuffix("_at_0")] != first[name] for arm in zeros)
        assert said["torch"]["torch_hook"] == said["torch"]["torch_ours"] == said["nnsight"]["nnsight_ours"]
        assert said["nnsight"]["nnsight_empty"] == first["torch"]
        assert len({json.dumps(said["torch"][arm]) for arm in STAGES["torch"][1]}) == len(STAGES["torch"][1]) - 1


def test_gpu_ratios_are_those_of_the_raw_times(tiny_gpu: dict[str, Any]):
    runs = {run["stage"]: run for run in tiny_gpu["runs"] if run["batch"] == 2}
    everything = {arm: times[0] for run in runs.values() for arm, times in run["times"].items()}
    for run in runs.values():
        for arm, figures in run["figures"].items():
            assert figures["peak_bytes"] is None
            assert figures["first_token_s"]["median"] == everything[arm]["first_token_s"]
            assert figures["decode_tokens_per_s"]["median"] == 2 * 2 / everything[arm]["decode_s"]
        for pair, found in run["ratios"].items():
            one, other = (everything[arm] for arm in pair.split(" / "))
            assert found["paired"] is ("unsteered_eager" not in pair)
            assert found["peak_bytes"] is None
            assert found["decode_s"]["median"] == one["decode_s"] / other["decode_s"]
    assert all(f"{arm} / unsteered" in runs["torch"]["ratios"] for arm in STAGES["torch"][1][1:])
    assert "nnsight_ours / nnsight_empty" in runs["nnsight"]["ratios"]
    assert "transformer_lens_ours / transformer_lens_empty" in runs["transformer_lens"]["ratios"]


def test_overhead_in_pairs(tmp_path: Path):
    """All ways agree on what they steer before they are timed; the figure draws what was found."""
    out, figure = tmp_path / "pairs.json", tmp_path / "overhead.png"
    options = f"--block pocket:1 --rounds 2 --tokens 3 --out {out}"
    for command in (
        ["benchmarks/overhead_pairs.py", *options.split()],
        ["benchmarks/overhead_figure.py", str(out), str(figure)],
    ):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["agreement"]["same_vector_same_tokens"]
    assert found["agreement"]["strength_0_is_unsteered"]
    pairs = {
        "torch_ours / unsteered",
        "l2s_late_read / unsteered",
        "nnsight_ours / nnsight_empty",
        "lens_ours / lens_empty",
    }
    assert pairs < set(found["ratios"])
    for name, (ours, other) in found["times"].items():
        each = [a["token_s"] / b["token_s"] for a, b in zip(ours, other, strict=True)]
        assert found["ratios"][name]["token_s"]["each"] == pytest.approx(each)
        assert len(each) == 2
    assert figure.read_bytes().startswith(b"\x89PNG")
