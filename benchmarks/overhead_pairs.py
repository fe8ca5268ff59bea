"""Steering overhead, told more sharply: two arms back to back, many times, where `overhead.py` runs all arms in turn.

On a machine whose speed changes from second to second (a virtual one beside others) a forward takes 1.0 s now and 1.6 s
ten seconds later; only what runs next to each other can be compared. A pair is A B or B A in turn, each a generation of
a few tokens: its prefill and the median of its decoded tokens, on the wall and in CPU seconds. Reported are median,
quartiles and a 95 % bootstrap interval of the median of the paired ratios.

The JSON is written after every round over the pairs; the same command goes on where it stopped.

    python benchmarks/overhead_pairs.py --block random:1 --rounds 50 --out benchmarks/results/overhead_pairs.json
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _overhead_arms import FRAMEWORKS, RATIOS, Arm, block
from gpu import all_versions, machine
from overhead import Stamps, checked, ratio
from tqdm import tqdm

from steer_plugin.atomic import atomic_write_json, make_folder

NAMES = ("first_token_s", "first_token_cpu_s", "token_s", "token_cpu_s")


def once(arm: Arm, tokens: int) -> dict[str, float]:
    """Time one generation: its prefill, and the median of its other tokens."""
    stamps = Stamps()
    wall, cpu = time.perf_counter(), time.process_time()
    arm.generate(max_new_tokens=tokens, logits_processor=[stamps])
    middle = [sorted(b - a for a, b in pairwise(seen))[(len(seen) - 1) // 2] for seen in (stamps.wall, stamps.cpu)]
    return dict(zip(NAMES, (stamps.wall[0] - wall, stamps.cpu[0] - cpu, *middle), strict=True))


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block", default="random:1", help="model:batch")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--out", type=Path, default=Path("results/overhead_pairs.json"))
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Run all rounds that are not there yet."""
    args = arguments(given)
    torch.set_grad_enabled(False)
    until = time.perf_counter() + 60 * args.minutes
    model, batch = args.block.split(":")
    made = block(model, int(batch), FRAMEWORKS, args.seed)
    pairs = [pair for pair in RATIOS if pair[0].endswith(("_ours", "_read", "_hook")) and pair[1] != "torch_hook"]
    config = {"block": args.block, "tokens": args.tokens, "seed": args.seed}
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    if found.get("config") != config:
        agreement, _ = checked(made, args.tokens)
        found = {
            "benchmark": "overhead_pairs", "machine": machine(torch.device("cpu")), "versions": all_versions(),
            "threads": torch.get_num_threads(), "config": config, "d_model": made.d_model, "layers": made.layers,
            "prompt_tokens": made.prompt_tokens, "attention": made.attention, "agreement": agreement,
            "times": {f"{one} / {other}": [[], []] for one, other in pairs},
        }  # fmt: skip
    gc.collect()
    gc.freeze()
    make_folder(args.out.parent)
    start = min(len(each[1]) for each in found["times"].values())
    for each in found["times"].values():
        each[0], each[1] = each[0][:start], each[1][:start]
    for number in tqdm(range(start, args.rounds), desc=args.block, mininterval=10):
        for one, other in pairs:
            taken = {name: once(made.arms[name], args.tokens) for name in ((one, other), (other, one))[number % 2]}
            for into, name in zip(found["times"][f"{one} / {other}"], (one, other), strict=True):
                into.append(taken[name])
        found["ratios"] = {
            pair: {name: ratio([t[name] for t in a], [t[name] for t in b], args.seed) for name in NAMES}
            for pair, (a, b) in found["times"].items()
        }
        atomic_write_json(args.out, found)
        if time.perf_counter() > until:
            print("--minutes is up; the same command goes on from here", file=sys.stderr)
            break
    print(table(found))


def table(found: dict[str, Any]) -> str:
    """Return the ratios as Markdown."""
    count = len(next(iter(found["times"].values()))[0])
    lines = [
        f"{found['config']['block']}, {found['prompt_tokens']} prompt tokens, d_model {found['d_model']}, "
        f"{found['layers']} layers, {count} pairs back to back: median (95 % interval), CPU time",
        "",
        "| | first token | one decoded token |",
        "|---|---|---|",
    ]
    for pair, values in found["ratios"].items():
        cells = [
            f"{values[name]['median']:.3f} ({values[name]['low']:.3f} to {values[name]['high']:.3f}), "
            f"{values[name.replace('_s', '_cpu_s')]['median']:.3f}"
            for name in ("first_token_s", "token_s")
        ]
        lines.append(f"| {pair} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
