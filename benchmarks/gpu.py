"""What steering costs on a CUDA device: LLaVA-1.5-7B's geometry with random bf16 weights, nothing downloaded.

    torch             unsteered, torch_hook (a vector added by hand), torch_ours (the same vector through the package),
                      l2s_same_layer (L' = L* = 14), l2s_late_read (L' = 30 behind L* = 15), steervlm
    nnsight           unsteered_wrapped (called past nnsight), nnsight_empty (an empty trace), nnsight_ours
    eager             unsteered_eager: what a bridge starts from
    transformer_lens  transformer_lens_empty (a bridge without hooks of ours), transformer_lens_ours

The arms of one line share one model and are timed in turn (A B C A B C); ratios are formed within a repeat, so what
slows the machine for a while cancels. Each line has a model of its own, drawn from the same seed. A bridge changes its
model in place, with eager attention: it comes last, its arms are compared with each other, and with `unsteered_eager`
by the ratio of medians, which were not taken in turn ("paired": false). Every run names its attention kernel.

    first_token_s  generate(max_new_tokens=1), picture included
    decode_s       the other tokens of generate(max_new_tokens=N), from when the first one's logits are there
    peak_bytes     torch.cuda.max_memory_allocated of the N tokens, weights included; null on a CPU

Before anything is timed, the arms' first greedy tokens are compared: strength 0 with unsteered, the hook with ours.

    python benchmarks/gpu.py --out gpu.json                              # a CUDA device of 24 GB or more
    python benchmarks/gpu.py --geometry tiny --device cpu --tokens 4     # the same code, for a test
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _gpu_arms import GEOMETRIES, Arm, Stage, batch_of, stages
from steervlm_latency import timed

from steer_plugin.artefact import versions
from steer_plugin.atomic import JSON, atomic_write_json

CHECKED_TOKENS = 6
MEASURES = ("first_token_s", "decode_s", "peak_bytes")
NEEDS_CUDA = (
    "benchmarks/gpu.py needs a CUDA device and torch sees none here: skipped. "
    "To run its code on a CPU: --geometry tiny --device cpu."
)
# Across stages: the same vector must lead to the same tokens where the attention kernel is the same.
SAME_TOKENS = (("torch", "torch_hook"), ("torch", "torch_ours"), ("nnsight", "nnsight_ours"))


def machine(device: torch.device) -> dict[str, JSON]:
    """Say what the numbers were measured on."""
    found: dict[str, JSON] = {
        "platform": platform.platform(), "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "device": str(device), "gpu": None,
    }  # fmt: skip
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {"gpu": about.name, "gpu_bytes": about.total_memory, "gpu_count": torch.cuda.device_count()}
        found |= {"capability": f"{about.major}.{about.minor}", "cuda": torch.version.cuda}
    return found


def all_versions() -> dict[str, JSON]:
    """Name the packages in use; null where one is not installed."""
    found: dict[str, JSON] = {**versions()}
    for name in ("nnsight", "transformer-lens", "accelerate"):
        try:
            found[name.replace("-", "_")] = version(name)
        except PackageNotFoundError:
            found[name.replace("-", "_")] = None
    return found


def quartiles(values: Sequence[float]) -> dict[str, JSON]:
    """Return median and quartiles beside the values themselves."""
    low, median, high = (float(q) for q in np.percentile(values, (25, 50, 75)))
    return {"each": list(values), "q1": low, "median": median, "q3": high}


def measured(arm: Arm, tokens: int, device: torch.device) -> dict[str, float | None]:
    """Measure an arm once; memory is null where it cannot be told."""
    return {"peak_bytes": None, **timed(arm, tokens, device)}


def checked(stage: Stage, inputs: dict[str, torch.Tensor]) -> dict[str, JSON]:
    """Compare the first tokens of a stage's arms with its first one's."""
    width = inputs["input_ids"].shape[1]

    def said(arm: Arm) -> list[list[int]]:
        return arm(max_new_tokens=CHECKED_TOKENS)[:, width:].tolist()

    arms = {name: said(arm) for name, arm in stage.arms(inputs).items()}
    zeros = {name: said(arm) for name, arm in stage.zeros(inputs).items()}
    baseline = next(iter(arms.values()))
    return {
        "tokens": CHECKED_TOKENS,
        "strength_0_is_unsteered": all(tokens == baseline for tokens in zeros.values()) if zeros else None,
        "steering_changes_tokens": {name: arms[name] != baseline for name in zeros},
        "said": {**arms, **{f"{name}_at_0": tokens for name, tokens in zeros.items()}},
    }


def measure(stage: Stage, inputs: dict[str, torch.Tensor], args: argparse.Namespace) -> dict[str, JSON]:
    """Check, warm up and time the arms of one stage on one batch."""
    device, rows = torch.device(args.device), inputs["input_ids"].shape[0]
    agreement, arms = checked(stage, inputs), stage.arms(inputs)
    for arm in arms.values():
        timed(arm, 2, device)
    times: dict[str, list[dict[str, float | None]]] = {name: [] for name in arms}
    for _ in range(args.repeats):
        for name, arm in arms.items():
            times[name].append(measured(arm, args.tokens, device))
    figures: dict[str, dict[str, JSON]] = {}
    for name, each in times.items():
        decoded = [rows * (args.tokens - 1) / float(one["decode_s"] or 0) for one in each]
        figures[name] = {
            "first_token_s": quartiles([float(one["first_token_s"] or 0) for one in each]),
            "decode_tokens_per_s": quartiles(decoded),
            "peak_bytes": max((int(one["peak_bytes"]) for one in each if one["peak_bytes"] is not None), default=None),
        }
    return {
        "stage": stage.name, "attention": stage.attention, "batch": rows,
        "prompt_tokens": inputs["input_ids"].shape[1], "agreement": agreement, "times": times, "figures": figures,
        "ratios": {f"{one} / {other}": ratio(times[one], times[other]) for one, other in stage.ratios},
    }  # fmt: skip


def ratio(
    ones: list[dict[str, float | None]], others: list[dict[str, float | None]], *, paired: bool = True
) -> dict[str, JSON]:
    """Divide two arms measure by measure: within each repeat, or median by median where they were not taken in turn."""
    found: dict[str, JSON] = {"paired": paired}
    for name in MEASURES:
        above, below = ([float(one[name]) for one in arm if one[name] is not None] for arm in (ones, others))
        if not above:
            found[name] = None
        elif paired:
            found[name] = quartiles([a / b for a, b in zip(above, below, strict=True)])
        else:
            found[name] = {"median": float(np.median(above) / np.median(below))}
    return found


def compare(runs: list[dict[str, Any]]) -> dict[str, JSON]:
    """Compare across stages: tokens of one vector, and a bridge with the model that it was made of."""
    found: dict[str, JSON] = {}
    for batch in sorted({run["batch"] for run in runs}):
        stage = {run["stage"]: run for run in runs if run["batch"] == batch}
        said = [stage[name]["agreement"]["said"][arm] for name, arm in SAME_TOKENS if name in stage]
        found[str(batch)] = {"same_vector_same_tokens": all(tokens == said[0] for tokens in said)}
        if "transformer_lens" in stage:
            bridge, plain = stage["transformer_lens"], stage["eager"]["times"]["unsteered_eager"]
            for arm, times in bridge["times"].items():
                bridge["ratios"][f"{arm} / unsteered_eager"] = ratio(times, plain, paired=False)
    return found


def table(run: dict[str, Any]) -> str:
    """Return one run as Markdown."""
    lines = [
        f"\n{run['stage']}, batch {run['batch']}, {run['prompt_tokens']} prompt tokens, {run['attention']} attention\n",
        "| | first token, ms | decoded tokens/s | peak, GB |",
        "|---|---|---|---|",
    ]
    for arm, one in run["figures"].items():
        peak = "" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 1e9:.2f}"
        first, decode = one["first_token_s"]["median"], one["decode_tokens_per_s"]["median"]
        lines.append(f"| {arm} | {1000 * first:.1f} | {decode:.1f} | {peak} |")
    if run["ratios"]:
        lines += ["\n| ratio | first token | decoding | peak |", "|---|---|---|---|"]
    for pair, one in run["ratios"].items():
        cells = ["" if one[name] is None else _shown(one[name]) for name in MEASURES]
        lines.append(f"| {pair}{'' if one['paired'] else ' (not in turn)'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(one: dict[str, Any]) -> str:
    return f"{one['median']:.3f}" + (f" ({one['q1']:.3f} to {one['q3']:.3f})" if "q1" in one else "")


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="llava-1.5-7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="", help="of torch; bfloat16, on a CPU float32")
    parser.add_argument("--batch", default="1,8", help="rows, several with commas")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens, the first included; at least 2")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0, help="of weights, inputs and steering")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args(given)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    if args.tokens < 2 or args.repeats < 1 or not all(rows.isdigit() and int(rows) for rows in args.batch.split(",")):
        parser.error("--tokens at least 2, --repeats at least 1, --batch numbers of at least 1 with commas")
    return args


def main(given: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if strength 0 changed a token, or one vector led to different ones."""
    args = arguments(given)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print(NEEDS_CUDA)
        return 0
    device, dtype, geometry = torch.device(args.device), getattr(torch, args.dtype), GEOMETRIES[args.geometry]
    runs: list[dict[str, Any]] = []
    for stage in stages(geometry, device, dtype, args.seed):
        for rows in map(int, args.batch.split(",")):
            runs.append(measure(stage, batch_of(geometry, rows, device, dtype, args.seed), args))
            print(f"{stage.name}, batch {rows}: done", file=sys.stderr)
        del stage  # its model, before the next one is drawn
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    across = compare(runs)
    agrees = all(run["agreement"]["strength_0_is_unsteered"] is not False for run in runs)
    agrees = agrees and all(one["same_vector_same_tokens"] for one in across.values())  # pyright: ignore
    result: dict[str, Any] = {
        "benchmark": "gpu", "machine": machine(device), "versions": all_versions(),
        "threads": torch.get_num_threads(), "seeds": {"weights": args.seed, "inputs": args.seed, "steering": args.seed},
        "config": {key: value for key, value in vars(args).items() if key != "out"},
        "geometry": {"text": geometry.text, "vision": geometry.vision, "layer": geometry.layer, "late": geometry.late},
        "agrees": agrees, "across_stages": across, "runs": runs,
    }  # fmt: skip
    if args.out is not None:
        atomic_write_json(args.out, result)
    for run in runs:
        print(table(run))
    print(f"\nstrength 0 says what unsteered says, one vector leads to one text: {agrees}")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
