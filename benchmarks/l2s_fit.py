"""Fitting L2S: the authors' way and this package's presets, side by side in one run, on time, loss and held-out cosine.

    authors        TruncatedSVD (pope) or DictionaryLearning (safety, stopped after --dictionary-limit seconds), Adam,
                   batches of 64, 100 epochs: `_l2s_fit_authors.py`
    pope, safety   this package's presets of the same hyper-parameters
    fast           its short preset
    safety_svd, safety_random   "safety" from other starts
    batch_256, whole_batch      "fast" at twice its rate in batches of 256; in one batch, for 100 epochs

Every repeat has a seed of its own and runs all arms in turn (A B C A B C); ratios are formed within a repeat, so what
slows the machine for a while cancels. Reported are median and quartiles over the repeats.

    wall_s, cpu_s  of the whole fit; start_* is the share of the decoder's start, train_* what is left
    loss           squared + absolute error - 0.1 cosine on all that was fitted on, by the same code for every arm
    held_*         the same loss, cosine and share of explained energy on what was held out

The dictionaries are compared once more where scikit-learn's finishes: seconds, objective (per sample, with codes found
to convergence for both), and the network that the authors' training fits from each, at a rate of 1e-3. Problems:
`_l2s_fit_problems.py`.

    python benchmarks/l2s_fit.py --out benchmarks/results/l2s_fit.json     # some twenty minutes
    python benchmarks/l2s_fit.py --quick                                   # seconds: the same code, small
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _l2s_fit_authors import components, learned, row_losses, trained
from _l2s_fit_problems import PUBLISHED, Problem, drawn, pocket, published
from torch import Tensor, nn
from tqdm import tqdm

from steer_plugin.artefact import versions
from steer_plugin.atomic import atomic_write_json
from steer_plugin.training.config import FitConfig, preset
from steer_plugin.training.l2s import fit_network
from steer_plugin.training.starts import atoms, directions

LIBRARIES = ("numpy", "scikit-learn")
MEASURES = ("wall_s", "cpu_s", "train_wall_s", "train_cpu_s")
QUALITY = ("loss", "held_loss", "held_cosine", "held_explained")


@dataclass(frozen=True)
class Sizes:
    """How large everything is: the papers' sizes, or small ones for a test."""

    train: int = 1344
    held: int = 336
    width: int = 4096
    hidden: int = 100
    epochs: int = 100
    dictionary: tuple[int, int, int] = (600, 512, 32)  # samples, width and atoms where scikit-learn's finishes


QUICK = Sizes(96, 32, 96, 12, 6, (60, 24, 6))
Run = dict[str, Any]


class Clock:
    """Wall and processor seconds since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self, before: str = "") -> dict[str, float]:
        """Tell both."""
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        return {f"{before}wall_s": wall, f"{before}cpu_s": cpu}


def times(whole: dict[str, float], start: dict[str, float]) -> dict[str, float]:
    """Add to the seconds of a fit those of its start, and those of the rest."""
    return {**whole, **start, **{f"train_{name}": whole[name] - start[f"start_{name}"] for name in whole}}


def quality(net: nn.Module, problem: Problem) -> dict[str, float]:
    """What a network is worth, by the same code for every arm."""
    found: dict[str, float] = {}
    with torch.no_grad():
        for part, shifts in (("", problem.train), ("held_", problem.held)):
            predicted = net(shifts.contexts)
            missed = (predicted - shifts.vectors).square().sum() / shifts.vectors.square().sum()
            cosine = nn.functional.cosine_similarity(predicted, shifts.vectors).mean()
            loss = row_losses(predicted, shifts.vectors, 0.1).mean()
            found |= {f"{part}loss": float(loss), f"{part}cosine": float(cosine), f"{part}explained": 1 - float(missed)}
    return found


def by_authors(problem: Problem, sizes: Sizes, limit: float, seed: int) -> Run:
    """Fit the authors' way."""
    clock, note = Clock(), dict[str, Any]()
    vectors = problem.train.vectors
    if problem.recipe == "pope":
        start = components(vectors, sizes.hidden, seed)
    else:
        dictionary = learned(vectors, sizes.hidden, limit, seed)
        start, note = dictionary.atoms, {"dictionary": dictionary.as_json()}
    begun = clock.read("start_")
    net, epoch = trained(problem.recipe, problem.train, problem.held, start, sizes.hidden, sizes.epochs, seed)
    found = {**times(clock.read(), begun), **quality(net, problem), "epoch": epoch, **note}
    if note:
        note["dictionary"]["objective"] = objective(vectors, start)
    return found


def by_us(problem: Problem, config: FitConfig, seed: int) -> Run:
    """Fit with this package; the start is run once more by itself for its share."""
    clock = Clock()
    net, report = fit_network(problem.train, config, validation=problem.held, seed=seed)
    spent, clock = clock.read(), Clock()
    start = directions(problem.train.vectors, config, seed)
    found = {**times(spent, clock.read("start_")), **quality(net, problem), "epoch": report.epoch}
    if config.start == "dictionary":
        found["dictionary"] = {"objective": objective(problem.train.vectors, start)}
    return found


def arms(problem: Problem, sizes: Sizes, more: bool) -> dict[str, FitConfig]:
    """The configurations of this package that a problem is fitted with; `more`: beyond the presets."""
    size = {"hidden": sizes.hidden, "epochs": sizes.epochs}
    own, fast = preset(problem.recipe, **size), preset("fast", hidden=sizes.hidden)
    fast = replace(fast, epochs=min(fast.epochs, sizes.epochs))
    found = {problem.recipe: own, "fast": fast}
    if more and problem.recipe == "safety":
        found |= {f"safety_{start}": replace(own, start=start) for start in ("svd", "random")}
    if more and problem.recipe == "pope":
        found["batch_256"] = replace(fast, batch_size=256, learning_rate=2e-3)
        found["whole_batch"] = replace(fast, batch_size=sizes.train, learning_rate=2e-3, epochs=sizes.epochs)
    return found


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles, and what they are of."""
    low, median, high = (float(q) for q in np.percentile(values, (25, 50, 75)))
    return {"each": list(values), "q1": low, "median": median, "q3": high}


def paired(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Return each arm beside the authors' within each repeat: ratios of seconds, differences of quality."""
    found: dict[str, Any] = {}
    for arm, ours in runs.items():
        if arm != "authors":
            pairs = list(zip(ours, runs["authors"], strict=True))
            found[arm] = {
                **{f"{name}_ratio": summary([a[name] / b[name] for a, b in pairs]) for name in MEASURES},
                **{f"{name}_difference": summary([a[name] - b[name] for a, b in pairs]) for name in QUALITY},
            }
    return found


def measured(problem: Problem, sizes: Sizes, args: argparse.Namespace) -> dict[str, Any]:
    """Fit one problem with every arm, repeat by repeat."""
    configs = arms(problem, sizes, problem.name == problem.recipe)
    calls: dict[str, Callable[[int], Run]] = {"authors": lambda s: by_authors(problem, sizes, args.dictionary_limit, s)}
    calls |= {name: lambda s, c=config: by_us(problem, c, s) for name, config in configs.items()}
    runs: dict[str, list[Run]] = {name: [] for name in calls}
    for seed in range(args.repeats):
        for name, call in tqdm(calls.items(), desc=f"{problem.name}, repeat {seed + 1}", disable=None):
            runs[name].append({"seed": seed, **call(seed)})
    train, held = problem.train, problem.held
    return {
        "problem": problem.name, "samples": len(train), "held": len(held), "width": train.contexts.shape[1],
        "target_length": float(train.vectors.norm(dim=1).mean()), "behaviours": train.counts(),
        "mean_alone_explains": train.explained_by_mean(),
        "configs": {name: asdict(config) for name, config in configs.items()}, "runs": runs,
        "summary": {
            arm: {name: summary([run[name] for run in some]) for name in (*MEASURES, *QUALITY)}
            for arm, some in runs.items()
        },
        "against_authors": paired(runs),
    }  # fmt: skip


def objective(vectors: Tensor, dictionary: Tensor) -> float:
    """Half the squared error plus the sum of the codes, the codes found for these atoms to convergence, per sample."""
    gram, pull = dictionary @ dictionary.T, vectors @ dictionary.T - 1
    codes = torch.zeros_like(pull)
    for _ in range(200):
        for k, own in enumerate(gram.diagonal().clamp_min(1e-12)):
            codes[:, k] = (codes[:, k] + (pull[:, k] - codes @ gram[k]) / own).clamp_min(0)
    return float((vectors - codes @ dictionary).square().sum() / 2 + codes.sum()) / len(vectors)


def dictionaries(sizes: Sizes, args: argparse.Namespace) -> dict[str, Any]:
    """Compare the two dictionaries where scikit-learn's finishes, and the networks fitted from them."""
    samples, width, count = sizes.dictionary
    found: list[Run] = []
    for seed in tqdm(range(args.repeats), desc="dictionaries", disable=None):
        problem = drawn("safety", samples, samples // 4, width, seed)
        vectors, config = problem.train.vectors, preset("safety", hidden=count, epochs=sizes.epochs)
        theirs = learned(vectors, count, args.dictionary_limit, seed)
        clock = Clock()
        own = atoms(vectors, count, config, seed)[0]
        spent = clock.read()
        drawn_atoms = nn.functional.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)))
        starts: dict[str, tuple[Tensor, Run]] = {
            "scikit_learn": (theirs.atoms, theirs.as_json()), "ours": (own, spent), "random": (drawn_atoms, {}),
        }  # fmt: skip
        for name, (start, facts) in starts.items():
            net, _ = trained("safety", problem.train, problem.held, start, count, sizes.epochs, seed, 1e-3)
            worth = {"objective": objective(vectors, start), **quality(net, problem)}
            found.append({"seed": seed, "start": name, **facts, **worth})
    return {"samples": samples, "width": width, "atoms": count, "runs": found}


def problems(names: Sequence[str], sizes: Sizes, folder: Path | None) -> Iterator[Problem]:
    """Make the problems that were asked for, one at a time."""
    for name in names:
        if name == "pocket":
            yield pocket(sizes.train, sizes.held, 0)
        elif name in PUBLISHED:
            if folder is not None:
                yield published(name, folder, sizes.train, sizes.held, 0)
        else:
            yield drawn(name, sizes.train, sizes.held, sizes.width, 0)


def table(found: dict[str, Any]) -> str:
    """Return one problem as Markdown: medians, and ratios to the authors' with their quartiles."""
    lines = [
        f"\n{found['problem']}: {found['samples']} x {found['width']}, {found['held']} held out\n",
        "| | wall, s | CPU, s | wall of authors' | loss | held-out loss | held-out cosine |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, one in found["summary"].items():
        ratio = found["against_authors"].get(arm, {}).get("wall_s_ratio")
        cells = [arm, *(f"{one[name]['median']:.1f}" for name in MEASURES[:2])]
        cells += [f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})" if ratio else ""]
        cells += [f"{one[name]['median']:.4f}" for name in QUALITY[:3]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> int:
    """Run the benchmark and write its JSON after every problem."""
    known = ("pope", "safety", "pocket", *PUBLISHED)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--problems", default="", help=f"out of {', '.join(known)}; default: all that can be made")
    parser.add_argument("--published", type=Path, help="folder of the networks that the L2S authors published")
    parser.add_argument("--repeats", type=int, default=0, help="each with a seed of its own; default 3, quick 1")
    parser.add_argument("--dictionary-limit", type=float, default=0.0, help="seconds; default 60, quick 0.3")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args(given)
    names = args.problems.split(",") if args.problems else list(known[:2] if args.quick else known)
    args.repeats = args.repeats or (1 if args.quick else 3)
    args.dictionary_limit = args.dictionary_limit or (0.3 if args.quick else 60.0)
    if not set(names) <= set(known) or args.repeats < 1 or args.dictionary_limit <= 0:
        parser.error(f"--problems out of {', '.join(known)}, --repeats at least 1, --dictionary-limit above 0")
    if args.problems and args.published is None and set(names) & set(PUBLISHED):
        parser.error(f"{', '.join(PUBLISHED)} need --published, the folder of the authors' files")
    sizes = QUICK if args.quick else Sizes()
    result: dict[str, Any] = {
        "benchmark": "l2s_fit", "versions": {**versions(), **{name: version(name) for name in LIBRARIES}},
        "machine": {
            "platform": platform.platform(), "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(), "load_before": os.getloadavg()[0],
        },
        "threads": torch.get_num_threads(), "sizes": asdict(sizes),
        "config": {"problems": names, "repeats": args.repeats, "dictionary_limit": args.dictionary_limit},
        "problems": [],
    }  # fmt: skip

    def save() -> None:
        result["machine"]["load_after"] = os.getloadavg()[0]
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_json(args.out, result)

    warm = replace(drawn("pope", QUICK.train, QUICK.held, QUICK.width, 0), name="warm")
    for arm in (lambda: by_authors(warm, QUICK, 1.0, 0), lambda: by_us(warm, preset("fast", epochs=2), 0)):
        arm()  # loads what torch and scikit-learn load at first use
    for problem in problems(names, sizes, args.published):
        result["problems"].append(measured(problem, sizes, args))
        save()
        print(table(result["problems"][-1]), flush=True)
    result["dictionaries"] = dictionaries(sizes, args)
    save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
