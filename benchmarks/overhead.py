"""What steering costs: one vector and one late read through every framework, beside that framework's empty run.

    forward_s      one plain forward over the prompt, picture included, the steering block around it as well
    first_token_s  generate(max_new_tokens=N) up to its first logits: the prefill
    decode_s       its other tokens, from the first logits to the end
    token_s        median time of one decoded token, between two calls of the logits processor
    ..._cpu_s      the same in CPU seconds of the process, which other processes disturb far less

Arms (`_overhead_arms.py`) are timed in turn (A B C A B C, each repeat begins with another arm) and ratios are formed
within a repeat, so what slows the machine for a while cancels. Reported are the median of the paired ratios, quartiles
and a 95 % bootstrap interval of the median. A bridge runs eager attention: its empty run is what ours is compared with.

Before anything is timed, strength 0 must say what the baseline says, and the same vector the same through every way.
Blocks are (model, batch): the pocket VLM, where bookkeeping shows, and a random LLaVA of real image geometry (576 image
tokens, d_model 1024, 12 layers). The JSON is written after every repeat; the same command goes on where it stopped, and
starts no repeat that would end after --minutes.

    python benchmarks/overhead.py --blocks pocket:1:20,random:1:5 --out benchmarks/results/overhead.json
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _overhead_arms import FRAMEWORKS, RATIOS, SAME_TOKENS, ZEROS, Arm, Block, block
from _steervlm_arms import PAIRS
from gpu import all_versions, machine
from torch import Tensor
from tqdm import tqdm

from steer_plugin.atomic import JSON, atomic_write_json, make_folder

CHECKED_TOKENS = 4
DRAWS = 10_000
MEASURES = ("forward_s", "first_token_s", "decode_s", "token_s")
Times = dict[str, list[dict[str, float]]]


@dataclass(frozen=True)
class Asked:
    """A block of the command line: "model:batch:repeats"."""

    model: str
    batch: int
    repeats: int

    @classmethod
    def parse(cls, text: str) -> Asked:
        """Read one.

        Raises:
            ValueError: not of that form.
        """
        model, batch, repeats = text.split(":")
        if model not in PAIRS or int(batch) < 1 or int(repeats) < 1:
            raise ValueError(text)
        return cls(model, int(batch), int(repeats))


class Stamps:
    """A logits processor that keeps when each token's logits were there, on the wall and in CPU seconds."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Change nothing."""
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())
        return scores


def timed(arm: Arm, tokens: int) -> dict[str, float]:
    """Measure an arm once: a forward, then a generation."""
    gc.collect()
    found: dict[str, float] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    arm.forward()
    found |= {"forward_s": time.perf_counter() - wall, "forward_cpu_s": time.process_time() - cpu}
    stamps = Stamps()
    wall, cpu = time.perf_counter(), time.process_time()
    arm.generate(max_new_tokens=tokens, logits_processor=[stamps])
    end_wall, end_cpu = time.perf_counter(), time.process_time()
    for end, start, stop, seen in (("_s", wall, end_wall, stamps.wall), ("_cpu_s", cpu, end_cpu, stamps.cpu)):
        found |= {f"first_token{end}": seen[0] - start, f"decode{end}": stop - seen[0]}
        found[f"token{end}"] = float(np.median(np.diff(seen)))
    return found


def checked(found: Block, tokens: int) -> tuple[dict[str, JSON], float]:
    """Compare the first tokens of the arms, which warms them up; also estimate a repeat's seconds.

    Raises:
        SystemExit: strength 0 said something else than its baseline, or one vector different things.
    """
    said: dict[str, list[list[int]]] = {}
    estimate = 0.0
    for name, arm in {**found.arms, **{f"{name}_at_0": arm for name, arm in found.zeros.items()}}.items():
        stamps, start = Stamps(), time.perf_counter()
        said[name] = arm.generate(max_new_tokens=CHECKED_TOKENS, logits_processor=[stamps]).tolist()
        if name in found.arms:
            estimate += 2 * (stamps.wall[0] - start) + tokens * float(np.median(np.diff(stamps.wall)))
    silent = {name: said[f"{name}_at_0"] == said[ZEROS[name]] for name in found.zeros}
    same = all(said[name] == said["torch_ours"] for name in SAME_TOKENS if name in said)
    if not (same and all(silent.values())):
        raise SystemExit(f"{found.model}, batch {found.batch}: strength 0 is unsteered {silent}, same vector {same}")
    changed: dict[str, JSON] = {name: said[name] != said[ZEROS[name]] for name in found.zeros}
    agreement: dict[str, JSON] = {"tokens": CHECKED_TOKENS, "same_vector_same_tokens": True}
    return {**agreement, "strength_0_is_unsteered": True, "steering_changes_tokens": changed}, estimate


def ratio(ones: Sequence[float], others: Sequence[float], seed: int) -> dict[str, JSON]:
    """Divide pair by pair: each, median and quartiles, and a 95 % bootstrap interval of the median."""
    each = np.array(ones) / np.array(others)
    draws = np.random.default_rng(seed).integers(0, len(each), (DRAWS, len(each)))
    low, high = (float(q) for q in np.percentile(np.median(each[draws], axis=1), (2.5, 97.5)))
    q1, median, q3 = (float(q) for q in np.percentile(each, (25, 50, 75)))
    return {"each": each.tolist(), "median": median, "q1": q1, "q3": q3, "low": low, "high": high}


def ratios(times: Times, seed: int) -> dict[str, JSON]:
    """Return, for each pair of arms, every measure's ratio, on the wall and in CPU seconds."""
    found: dict[str, JSON] = {}
    for one, other in RATIOS:
        if times.get(one) and times.get(other):
            names = [name.replace("_s", end) for end in ("_s", "_cpu_s") for name in MEASURES]
            pairs = {name: ([a[name] for a in times[one]], [b[name] for b in times[other]]) for name in names}
            found[f"{one} / {other}"] = {name: ratio(*pair, seed) for name, pair in pairs.items()}
    return found


def measure(
    asked: Asked, run: dict[str, Any], args: argparse.Namespace, save: Callable[[], None], until: float
) -> None:
    """Check, warm up and time one block, going on from what `run` holds."""
    made = block(asked.model, asked.batch, tuple(args.frameworks.split(",")), args.seed)
    agreement, one = checked(made, args.tokens)
    run |= {
        "d_model": made.d_model, "layers": made.layers, "prompt_tokens": made.prompt_tokens,
        "attention": made.attention, "agreement": agreement,
    }  # fmt: skip
    times: Times = run.setdefault("times", {})
    if list(times) != list(made.arms):
        times.clear()
        times.update({name: [] for name in made.arms})
    done = min(len(each) for each in times.values())
    for each in times.values():
        del each[done:]
    gc.collect()
    gc.freeze()  # what is loaded by now need not be looked through before every measurement
    title = f"{asked.model}, batch {asked.batch}"
    print(f"{title}: {asked.repeats - done} repeats of about {one:.1f} s to go", file=sys.stderr)
    names = list(made.arms)
    for repeat in tqdm(range(done, asked.repeats), desc=title, mininterval=5):
        if time.perf_counter() + one > until:
            print(f"{title}: stopped after {repeat} of {asked.repeats} repeats, --minutes is up", file=sys.stderr)
            break
        began, turn = time.perf_counter(), repeat % len(names)
        taken = {name: timed(made.arms[name], args.tokens) for name in names[turn:] + names[:turn]}
        one = time.perf_counter() - began
        for name in names:
            times[name].append(taken[name])
        run["ratios"] = ratios(times, args.seed)
        save()


def table(run: Mapping[str, Any]) -> str:
    """Return one block as Markdown: paired ratios of wall time, and of CPU time behind them."""
    repeats = len(next(iter(run["times"].values())))
    lines = [
        f"\n{run['model']}, batch {run['batch']}, {run['prompt_tokens']} prompt tokens, d_model {run['d_model']}, "
        f"{run['layers']} layers, {repeats} paired repeats: median (95 % interval), CPU time\n",
        "| | forward | first token | 64-token decode | one token |".replace("64", str(run["tokens"])),
        "|---|---|---|---|---|",
    ]
    for pair, found in run.get("ratios", {}).items():
        cells = [
            f"{found[name]['median']:.3f} ({found[name]['low']:.3f} to {found[name]['high']:.3f}), "
            f"{found[name.replace('_s', '_cpu_s')]['median']:.3f}"
            for name in MEASURES
        ]
        lines.append(f"| {pair} | {' | '.join(cells)} |")
    return "\n".join(lines)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--blocks", default="pocket:1:20,pocket:8:10,random:1:5,random:8:2", help="model:batch:repeats")
    parser.add_argument("--frameworks", default=",".join(FRAMEWORKS), help="beside torch: nnsight, transformer_lens")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens, the first included; at least 3")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no repeat that would end later")
    parser.add_argument("--seed", type=int, default=0, help="of steering and bootstrap")
    parser.add_argument("--out", type=Path, help="where the JSON goes, and where it is gone on from")
    args = parser.parse_args(given)
    try:
        args.asked = [Asked.parse(one) for one in args.blocks.split(",")]
    except ValueError as error:
        parser.error(f"--blocks model:batch:repeats with commas, models {', '.join(PAIRS)}; got {error}")
    if args.tokens < 3 or not set(args.frameworks.split(",")) <= set(FRAMEWORKS):
        parser.error(f"--tokens at least 3, --frameworks out of {', '.join(FRAMEWORKS)}")
    return args


def known(args: argparse.Namespace, now: dict[str, Any]) -> dict[str, Any]:
    """Return what a file holds already, or nothing.

    Raises:
        SystemExit: it was measured with other settings, on another machine or with other versions.
    """
    if args.out is None or not args.out.exists():
        return {**now, "runs": []}
    held = json.loads(args.out.read_text(encoding="utf-8"))
    odd = [key for key in now if held.get(key) != json.loads(json.dumps(now[key]))]
    if odd:
        raise SystemExit(f"{args.out} was measured with other {', '.join(odd)}: give another --out, or remove it.")
    return held


@torch.no_grad()
def main(given: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a repeat that was asked for was not made."""
    args = arguments(given)
    until = time.perf_counter() + 60 * args.minutes
    settings = {"tokens": args.tokens, "seed": args.seed, "frameworks": args.frameworks}
    now = {
        "benchmark": "overhead", "machine": machine(torch.device("cpu")), "versions": all_versions(),
        "threads": torch.get_num_threads(), "config": settings,
    }  # fmt: skip
    result = known(args, now)
    runs: list[dict[str, Any]] = result["runs"]

    def save() -> None:
        if args.out is not None:
            make_folder(args.out.parent)
            atomic_write_json(args.out, result)

    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    complete = True
    for asked in args.asked:
        place = {"model": asked.model, "batch": asked.batch, "tokens": args.tokens}
        run = next((one for one in runs if place.items() <= one.items()), None)
        if run is None:
            run = dict[str, Any](place)
            runs.append(run)
        if "times" not in run or min(map(len, run["times"].values())) < asked.repeats:
            measure(asked, run, args, save, until)
            gc.unfreeze()
            gc.collect()
        complete = complete and min(map(len, run["times"].values())) >= asked.repeats
    for run in runs:
        print(table(run))
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
