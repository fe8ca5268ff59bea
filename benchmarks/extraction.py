"""What P2S extraction costs per sample, in units of one full prefill of the bare prompt (R), side by side in one run.

    authors_100   their POPE script as the same model's passes: a whole pass for T+ and one for T-, 100 new tokens each
    authors_1     the same at one new token
    authors       safety: whole passes for T+, T- and the context, logits of every token
    floor         one prefill of the bare prompt, stopped behind layer max(L*, L')
    ours          this package's tree of prefixes, one sample at a time, each about its own picture
    ours_8        eight samples in a batch, each about its own picture
    ours_picture  eight samples in a batch about one picture (POPE asks six questions of each)
    ours_whole    vlm.extract on those of ours_8: pictures opened, resized and encoded, rows written and read back

    pope    question, forced "Yes, the image" / "No, the image"     target average_forced, L' = L*
    safety  question, suffix of 30 words, one forced word           target average_forced, L' = L*
    late    as pope, with L' the last layer but one

The model is random: LLaVA-1.5's 576 image tokens and 16 decoder layers, L* = 7, as in the figures of the authors' code.
Rounds are interleaved and ratios formed within a round, so that what slows the machine for a while cancels; seconds of
wall and of CPU; median and quartiles. Before anything is timed, ours is compared with two whole forwards per sample.

    python benchmarks/extraction.py --rounds 5 --out benchmarks/results/extraction.json
    python benchmarks/extraction.py --memory 200,2000 --out benchmarks/results/extraction_memory.json
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from _steervlm_arms import word_processor
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import steer_plugin as sp
from steer_plugin.adapters._completions import forced_inputs
from steer_plugin.adapters._extract import Extraction
from steer_plugin.adapters._plan import Plan
from steer_plugin.adapters._taps import reading
from steer_plugin.artefact import versions
from steer_plugin.atomic import JSON, atomic_write_json
from steer_plugin.contrast import ContrastivePair

Arm = Callable[[], object]
SIZES = {"real": (512, 16, 7, 336), "quick": (64, 4, 1, 56)}
TASKS = ("pope", "safety", "late")


def model_of(size: str) -> sp.AttachedModel:
    """Draw the random LLaVA."""
    width, layers, _, picture = SIZES[size]
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, image_size=picture,
        patch_size=14, projection_dim=64,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32064, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=width // 32, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    tokens = (picture // 14) ** 2
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=tokens)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0 if parameter.ndim == 2 else 1.0)  # so that tokens attend to others
    model.generation_config.eos_token_id = None
    processor = word_processor()
    processor.image_processor.size = {"shortest_edge": picture}
    processor.image_processor.crop_size = {"height": picture, "width": picture}
    return sp.attach(model, processor)


def pairs_of(task: str, count: int, picture: int, *, one_picture: bool = False) -> list[ContrastivePair]:
    """Draw pairs; `count` questions about their own pictures, or about one."""
    draw = np.random.default_rng(0)

    def words(number: int) -> str:
        return " ".join(f"w{i}" for i in draw.integers(10, 60, number))

    out: list[ContrastivePair] = []
    image = None
    for number in range(count):
        if image is None or not one_picture:
            image = Image.fromarray(draw.integers(0, 256, (picture, picture, 3), np.uint8))
        if task == "safety":
            out.append(ContrastivePair(f"{number}", (image,), words(40), "w7", "w8", "w9 " + words(30)))
        else:
            out.append(ContrastivePair(f"{number}", (image,), words(10), "w7 w61 w62", "w8 w61 w62"))
    return out


class Task:
    """One task's arms on one model."""

    def __init__(self, vlm: sp.AttachedModel, name: str, size: str) -> None:
        _, layers, write, picture = SIZES[size]
        self.vlm, self.name, self.write = vlm, name, sp.resid_post(write)
        self.read = sp.resid_post(layers - 2) if name == "late" else self.write
        self.pairs = pairs_of(name, 8, picture)
        self.same = pairs_of(name, 8, picture, one_picture=True)
        plan = Plan(self.write, self.read, sp.Positions.parse("last_prompt"), "average_forced", 8, 0)
        self.extraction = Extraction(vlm.parts, vlm.processor, vlm.ends, plan)
        first = self.pairs[0]
        self.bare = vlm.inputs([first.prompt], [list(first.images)])
        user = vlm.inputs([first.user_text], [list(first.images)])
        tokenizer: Any = vlm.processor.tokenizer
        forced = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (first.positive, first.negative)]
        self.forced = [forced_inputs(user, [one])[0] for one in forced]
        self.lengths = [len(one) for one in forced]

    def arms(self) -> dict[str, tuple[Arm, int]]:
        """Each arm with the samples that it makes."""
        model: Any = self.vlm.root
        single, eight = self.extraction.batch(self.pairs[:1]), self.extraction.batch(self.pairs)
        same = self.extraction.batch(self.same)

        def floor() -> None:
            last = max(self.write, self.read, key=lambda site: site.order)
            with reading(self.vlm.ends, [], last):
                model(**self.bare, use_cache=False, logits_to_keep=1)

        def generated(new: int) -> Arm:
            return lambda: [model.generate(**one, max_new_tokens=new, do_sample=False) for one in self.forced]

        def whole() -> None:
            with TemporaryDirectory() as folder:
                self.vlm.extract(self.pairs, self.write, self.read, folder, batch_size=8, progress=False)

        found: dict[str, tuple[Arm, int]] = {"R": (lambda: model(**self.bare, use_cache=True, logits_to_keep=1), 1)}
        if self.name == "safety":
            found["authors"] = (
                lambda: [model(**one, output_hidden_states=True) for one in (self.bare, *self.forced)],
                1,
            )
        else:
            found |= {"authors_100": (generated(100), 1), "authors_1": (generated(1), 1)}
        return {
            **found,
            "floor": (floor, 1),
            "ours": (lambda: self.extraction.shifts(single), 1),
            "ours_8": (lambda: self.extraction.shifts(eight), 8),
            "ours_picture": (lambda: self.extraction.shifts(same), 8),
            "ours_whole": (whole, 8),
        }

    def difference(self) -> dict[str, JSON]:
        """Largest difference between ours and whole forwards, and the size of what is compared."""
        model: Any = self.vlm.root

        def states(inputs: dict[str, Tensor], layer: int) -> Tensor:
            return model.model(**inputs, output_hidden_states=True).hidden_states[layer + 1][0]

        layers = (self.write.layer, self.read.layer)
        pooled = [states(one, layers[0])[-n:].mean(0) for one, n in zip(self.forced, self.lengths, strict=True)]
        vector, context = pooled[0] - pooled[1], states(self.bare, layers[1])[-1]
        found: dict[str, JSON] = {
            "largest_vector": float(vector.abs().max()),
            "largest_context": float(context.abs().max()),
        }
        for name, pairs in (("ours", self.pairs[:1]), ("ours_8", self.pairs), ("ours_picture", self.same)):
            z, c = self.extraction.shifts(self.extraction.batch(pairs))
            found[name] = {"vector": float((z[0] - vector).abs().max()), "context": float((c[0] - context).abs().max())}
        return found


def timed(arm: Arm) -> tuple[float, float]:
    """Seconds of wall and of CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    arm()
    return time.perf_counter() - wall, time.process_time() - cpu


def measured(task: Task, rounds: int, skip: Sequence[str]) -> dict[str, JSON]:
    """Time all arms round by round; ratios to R within each round."""
    arms = {name: arm for name, arm in task.arms().items() if name not in skip}
    for name, (arm, _) in arms.items():
        if name != "authors_100":
            arm()  # first calls build what later ones find
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, (arm, samples) in arms.items():
            wall, cpu = timed(arm)
            times[name].append((wall / samples, cpu / samples))
    ratios: dict[str, JSON] = {}
    for name, seconds in times.items():
        for kind, column in (("wall", 0), ("cpu", 1)):
            each = [one[column] / unit[column] for one, unit in zip(seconds, times["R"], strict=True)]
            low, median, high = (float(q) for q in np.percentile(each, (25, 50, 75)))
            ratios[f"{name} {kind}"] = {"q1": low, "median": median, "q3": high, "each": each}
    return {"task": task.name, "prompt_tokens": task.bare["input_ids"].shape[1], "in_R": ratios,
            "seconds": {name: [list(one) for one in seconds] for name, seconds in times.items()},
            "difference": task.difference()}  # fmt: skip


def machine(args: argparse.Namespace) -> dict[str, JSON]:
    """Where and how it ran."""
    return {
        "machine": {"platform": platform.platform(), "cpu": platform.processor() or platform.machine()},
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "config": {key: value for key, value in vars(args).items() if key != "out"},
    }


def costs(args: argparse.Namespace) -> dict[str, JSON]:
    """Time every task."""
    vlm = model_of(args.size)
    runs: list[JSON] = []
    with torch.no_grad():
        for name in args.tasks.split(","):
            found = measured(Task(vlm, name, args.size), args.rounds, args.skip.split(","))
            runs.append(found)
            print(f"| {name} | wall, R | CPU, R |\n| --- | --- | --- |")
            ratios: Any = found["in_R"]
            for arm in dict.fromkeys(key.split()[0] for key in ratios):
                cells = [f"{ratios[f'{arm} {kind}']['median']:.3f}" for kind in ("wall", "cpu")]
                print(f"| {arm} | {' | '.join(cells)} |")
    _, layers, write, _ = SIZES[args.size]
    return {**machine(args), "layers": layers, "write": write, "runs": runs}


def extracted(count: int) -> None:
    """Extract so many samples in this process, and print its peak memory in bytes."""
    vlm = model_of("quick")
    draw = np.random.default_rng(0)
    pairs = [
        ContrastivePair(
            f"{i}", (Image.fromarray(draw.integers(0, 256, (56, 56, 3), np.uint8)),), f"w{10 + i % 40} w9", "w7", "w8"
        )
        for i in range(count)
    ]
    with TemporaryDirectory() as folder:
        vlm.extract(pairs, sp.resid_post(1), out=folder, batch_size=16, progress=False)
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def memory(args: argparse.Namespace) -> dict[str, JSON]:
    """Peak memory of whole processes that extract different numbers of samples."""
    peaks: dict[str, JSON] = {}
    for count in args.memory.split(","):
        command = [sys.executable, __file__, "--one", count]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[count] = json.loads(done.stdout)["peak"]
        print(f"{count} samples: {peaks[count] / 2**20:.0f} MiB")
    return {**machine(args), "peak_bytes": peaks}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="real", choices=list(SIZES))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip", default="", help="arms that are left out, such as authors_100")
    parser.add_argument("--memory", help="measure memory instead, at these numbers of samples: 200,2000")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.one:
        extracted(args.one)
        return
    found = memory(args) if args.memory else costs(args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(args.out, found)


if __name__ == "__main__":
    main()
