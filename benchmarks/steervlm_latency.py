"""What SteerVLM costs: unsteered generation, the paper's two passes, and this package, side by side in one run.

    unsteered         model.generate
    naive             before each steered forward of `generate` an unsteered one: plain torch hooks, a KV cache for
                      each stream, p+ and p- read beforehand; steers "last_prompt|generated"
    ours              vlm.generate(steering=...) on the same positions, the default
    naive_everywhere  both of these on every token
    ours_everywhere
    ours_compiled     `ours` with its module under torch.compile (--compile); a failure is reported, not raised

All of them go through the same `generate` (which encodes a picture once, for naive's two passes as well), so a ratio
holds the steering alone. Repeats are interleaved (A B C A B C) and ratios are formed within a repeat, so what slows
the machine for a while cancels; reported are median and quartiles.

    first_token_s  generate(max_new_tokens=1), picture included
    decode_s       the other tokens of generate(max_new_tokens=N), from when the first one's logits are there
    peak_bytes     of the N tokens, weights included; CUDA only

Before anything is timed, naive and ours must say the same greedy tokens in float32, steering must change them, and
the forwards, decoder tokens and rows of lm_head are counted by hooks. Models: the pocket VLM, where bookkeeping shows,
and a random LLaVA of real image geometry (576 image tokens), where the arithmetic does.

    python benchmarks/steervlm_latency.py --models pocket,random --tokens 24 --repeats 5 --out bench.json
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import copy
import gc
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _steervlm_arms import PAIRS, Naive, drawn_steering, load
from torch import Tensor, nn

import steer_plugin as sp
from steer_plugin.artefact import versions
from steer_plugin.atomic import JSON, atomic_write_json

RATIOS = (
    ("naive", "unsteered"), ("ours", "unsteered"), ("ours", "naive"), ("naive_everywhere", "unsteered"),
    ("ours_everywhere", "unsteered"), ("ours_everywhere", "naive_everywhere"), ("ours_compiled", "ours"),
    ("ours_compiled", "naive"),
)  # fmt: skip
CHECKED_TOKENS = 6
Arm = Callable[..., Tensor]  # generate(max_new_tokens=..., logits_processor=...), inputs bound


class Watch:
    """A logits processor that keeps when the first token's logits were there and, if asked, all scores."""

    def __init__(self, device: torch.device, keep: bool = False) -> None:
        self.device, self.keep, self.at = device, keep, 0.0
        self.scores: list[Tensor] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Change nothing."""
        self.at = self.at or now(self.device)
        if self.keep:
            self.scores.append(scores.float().cpu())
        return scores


def now(device: torch.device) -> float:
    """Tell the time once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(arm: Arm, tokens: int, device: torch.device) -> dict[str, float]:
    """Measure the arm once: its first token, then N tokens."""
    found: dict[str, float] = {}
    for new in (1, tokens):
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        watch, start = Watch(device), now(device)
        arm(max_new_tokens=new, logits_processor=[watch])
        end = now(device)
        found |= {"first_token_s": end - start} if new == 1 else {"total_s": end - start, "decode_s": end - watch.at}
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return found


def check(arms: dict[str, Arm], width: int, device: torch.device) -> dict[str, JSON]:
    """Compare the tokens of naive and ours, and say how far apart scores are and how close to a tie they come."""
    said: dict[str, list[list[int]]] = {}
    scores: dict[str, Tensor] = {}
    for name, arm in arms.items():
        watch = Watch(device, keep=True)
        said[name] = arm(max_new_tokens=CHECKED_TOKENS, logits_processor=[watch])[:, width:].tolist()
        scores[name] = torch.stack(watch.scores)
    pairs = [(naive, naive.replace("naive", "ours")) for naive in ("naive", "naive_everywhere")]
    finite = [(scores[one].nan_to_num(neginf=0) - scores[two].nan_to_num(neginf=0)).abs().max() for one, two in pairs]
    best = torch.cat([scores[name].topk(2).values for pair in pairs for name in pair])
    return {
        "tokens": CHECKED_TOKENS,
        "agrees": all(said[one] == said[two] for one, two in pairs),
        "steering_changes_tokens": all(said[one] != said["unsteered"] for one, _ in pairs),
        "largest_difference_of_scores": float(max(finite)),
        "smallest_gap_between_best_two": float((best[..., 0] - best[..., 1]).min()),
        "said": said,
    }


def work(arm: Arm, model: nn.Module) -> dict[str, JSON]:
    """Count, with hooks, what one batch costs up to its first token and for each token after it."""
    seen: dict[str, int] = {}

    def count(name: str, module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        rows = hidden.shape[0] * hidden.shape[1] if isinstance(hidden, Tensor) else 0
        seen[f"{name}_forwards"] = seen.get(f"{name}_forwards", 0) + 1
        seen[f"{name}_tokens"] = seen.get(f"{name}_tokens", 0) + rows

    places = {"decoder": "model.language_model.layers.0", "lm_head": "lm_head", "vision": "model.vision_tower"}
    hooks = [model.get_submodule(at).register_forward_hook(partial(count, name)) for name, at in places.items()]
    totals: list[dict[str, int]] = []
    for new in (1, 3):
        seen.clear()
        arm(max_new_tokens=new)
        totals.append(dict(seen))
    for hook in hooks:
        hook.remove()
    first, more = ({name: one[name] for name in one if name != "vision_tokens"} for one in totals)
    return {"first_token": first, "each_decoded_token": {name: (more[name] - first[name]) / 2 for name in more}}


def summary(times: dict[str, list[dict[str, float]]]) -> dict[str, JSON]:
    """Return, for each measure, the ratio of two arms within each repeat, with median and quartiles."""
    found: dict[str, JSON] = {}
    for measure in ("first_token_s", "decode_s", "peak_bytes"):
        rows: dict[str, JSON] = {}
        for one, other in RATIOS:
            if one in times and other in times and measure in times[one][0]:
                each = [a[measure] / b[measure] for a, b in zip(times[one], times[other], strict=True)]
                low, median, high = (float(q) for q in np.percentile(each, (25, 50, 75)))
                rows[f"{one} / {other}"] = {"each": each, "q1": low, "median": median, "q3": high}
        if rows:
            found[measure] = rows
    return found


def compiled(steering: sp.SteerVLM) -> sp.SteerVLM:
    """Return the same steering with a copy of its module under torch.compile, which happens at the first token."""
    module = copy.deepcopy(steering.module)
    module.compile()
    return sp.SteerVLM(module, pairs=steering.pairs)


def measure(name: str, dtype: str, args: argparse.Namespace) -> dict[str, JSON]:
    """Check, count and time every arm on one model in one precision."""
    device = torch.device(args.device)
    model, processor, batch = load(name, args.batch)
    model.to(device)
    inputs = {key: value.to(device) for key, value in batch.items()}
    vlm = sp.attach(model, processor)
    steering = drawn_steering(name, vlm)
    module = steering.module

    def bound(call: Callable[..., Tensor], **more: Any) -> Arm:
        return partial(call, **inputs, **more, do_sample=False)

    def arms() -> dict[str, Arm]:
        found = {"unsteered": bound(model.generate)}
        for end, where in (("", "last_prompt|generated"), ("_everywhere", "everywhere")):
            found[f"naive{end}"] = bound(Naive(model, processor, module, PAIRS[name], where).generate)
            found[f"ours{end}"] = bound(vlm.generate, steering=steering.with_positions(where))
        return found

    width = inputs["input_ids"].shape[1]
    report: dict[str, JSON] = {
        "model": name, "dtype": dtype, "d_model": vlm.d_model, "layers": vlm.n_layers, "prompt_tokens": width,
        "parameters": sum(one.numel() for one in model.parameters()),
        "module_parameters": sum(one.numel() for one in module.parameters()),
        "agreement": check(arms(), width, device),
        "work": {arm: work(call, model) for arm, call in arms().items()},
    }  # fmt: skip
    model.to(getattr(torch, dtype))
    module.to(getattr(torch, dtype))
    timed_arms = arms()
    if args.compile:
        try:
            fast = bound(vlm.generate, steering=compiled(steering))
            said = [arm(max_new_tokens=CHECKED_TOKENS) for arm in (fast, timed_arms["ours"])]
            report["compile"] = {"same_tokens": torch.equal(*said)}
            timed_arms["ours_compiled"] = fast
        except Exception as error:  # whatever keeps a compiler from working here: none of it is needed
            report["compile"] = {"failed": f"{type(error).__name__}: {error}"[:1000]}
    for arm in timed_arms.values():
        timed(arm, 2, device)  # reads the pair, fills caches, compiles
    times: dict[str, list[dict[str, float]]] = {arm: [] for arm in timed_arms}
    for _ in range(args.repeats):
        for arm, call in timed_arms.items():
            times[arm].append(timed(call, args.tokens, device))
    return {**report, "times": times, "ratios": summary(times)}


def table(run: dict[str, Any], batch: int, tokens: int) -> str:
    """Return one run as Markdown: medians of the times, and of the ratios with their quartiles."""
    times, ratios = run["times"], run["ratios"]

    def ratio(measure: str, arm: str, other: str) -> str:
        found = ratios[measure].get(f"{arm} / {other}")
        return f"{found['median']:.2f} ({found['q1']:.2f} to {found['q3']:.2f})" if found else ""

    lines = [
        f"\n{run['model']}, {run['dtype']}, batch {batch}; same tokens as naive: {run['agreement']['agrees']}\n",
        "| | first token, ms | of unsteered | of naive | decoded tokens/s | time of unsteered | time of naive |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, measured in times.items():
        naive = "naive_everywhere" if "everywhere" in arm else "naive"
        first, decode = (float(np.median([one[key] for one in measured])) for key in ("first_token_s", "decode_s"))
        cells = [arm, f"{1000 * first:.1f}", *(ratio("first_token_s", arm, other) for other in ("unsteered", naive))]
        cells += [f"{batch * (tokens - 1) / decode:.1f}"]
        cells += [ratio("decode_s", arm, other) for other in ("unsteered", naive)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *([f"\ncompile: {run['compile']}"] if "compile" in run else [])])


def main(given: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if naive and ours did not say the same."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default="pocket,random", help="pocket, random or both")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens, the first included; at least 2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="", help="of torch, several with commas; float32, on CUDA bfloat16 as well")
    parser.add_argument("--compile", action="store_true", help="time the module under torch.compile too")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args(given)
    args.dtype = args.dtype or ("float32,bfloat16" if args.device.startswith("cuda") else "float32")
    if args.tokens < 2 or args.repeats < 1 or args.batch < 1 or not set(args.models.split(",")) <= set(PAIRS):
        parser.error(f"--tokens at least 2, --repeats and --batch at least 1, --models out of {', '.join(PAIRS)}")
    runs = [measure(name, dtype, args) for name in args.models.split(",") for dtype in args.dtype.split(",")]
    on_cuda = args.device.startswith("cuda")
    result: dict[str, Any] = {
        "benchmark": "steervlm_latency", "versions": versions(), "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(args.device) if on_cuda else platform.processor() or platform.machine(),
        "config": {key: value for key, value in vars(args).items() if key != "out"},
        "agrees": all(run["agreement"]["agrees"] for run in runs),  # pyright: ignore
        "runs": runs,
    }  # fmt: skip
    if args.out is not None:
        atomic_write_json(args.out, result)
    for run in runs:
        print(table(run, args.batch, args.tokens))
    return 0 if result["agrees"] else 1


if __name__ == "__main__":
    sys.exit(main())
