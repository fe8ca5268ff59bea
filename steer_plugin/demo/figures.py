"""The demo's figures; readable in grey, captions say what was measured on what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steer_plugin.demo import captions, safety
from steer_plugin.demo.captions import CaptionResult
from steer_plugin.demo.data import SUBSETS
from steer_plugin.demo.existence import METHODS, ExistenceResult
from steer_plugin.demo.run import DemoResult
from steer_plugin.demo.safety import SafetyResult
from steer_plugin.errors import FrameworkError
from steer_plugin.evaluation.asking import distinct
from steer_plugin.evaluation.intervals import Interval
from steer_plugin.evaluation.parsing import pope_answer
from steer_plugin.evaluation.pope import PopeItem

_COLOURS = {
    "none": "0.85", "prompt": "0.72", "threshold": "0.60", "norm_rnd": "0.78", "mean": "0.50", "mean_ba": "0.40",
    "l2s_plain": "#8fb8d4", "l2s": "#1f5f8b", "p2s": "0.25",
}  # fmt: skip


def pyplot() -> Any:
    """Import matplotlib without a screen.

    Raises:
        FrameworkError: the extra is missing.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise FrameworkError(
            "figures need matplotlib: pip install 'steer-plugin[plot]', or run with --no-figures."
        ) from error
    return plt


def write_figures(result: DemoResult, out: Path) -> list[Path]:
    """Draw all figures into out/figures and return their paths."""
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    drawn: list[Path] = []
    if result.existence is not None:
        found = result.existence
        drawn += [bars(found, folder / "accuracy.png"), examples(found, folder / "examples.png"),
                  projection(found, folder / "p2s_pca.png")]  # fmt: skip
    if result.safety is not None:
        drawn.append(safety_bars(result.safety, folder / "safety.png"))
    if result.captions is not None:
        drawn.append(chair_bars(result.captions, folder / "chair.png"))
    return drawn


def bars(result: ExistenceResult, path: Path) -> Path:
    """Accuracy of every method on every subset, with intervals."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 4))
    width = 0.8 / len(METHODS)
    for number, method in enumerate(METHODS):
        cells = [result.scores[method][subset].accuracy for subset in (*SUBSETS, "mean")]
        at = np.arange(len(cells)) + (number - len(METHODS) / 2 + 0.5) * width
        values = np.array([100 * cell.value for cell in cells])
        error = [values - [100 * c.low for c in cells], [100 * c.high for c in cells] - values]
        axes.bar(at, values, width, yerr=error, label=method, color=_COLOURS[method], edgecolor="black", linewidth=0.5,
                 error_kw={"linewidth": 0.8}, hatch="//" if method == "l2s" else None)  # fmt: skip
    low = min(100 * result.scores[m][s].accuracy.low for m in METHODS for s in SUBSETS)
    axes.set_ylim(max(0, 5 * (low // 5) - 5), 100)
    axes.set_xticks(range(len(SUBSETS) + 1), [*SUBSETS, "average"])
    axes.set_ylabel("accuracy (%), axis cut")
    axes.set_title(
        f"Existence questions, pocket VLM: {result.scores['none']['random'].n} held-out questions a subset, "
        "95 % intervals over pictures", fontsize=10,
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=len(METHODS), fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    return _saved(figure, path)


def safety_bars(result: SafetyResult, path: Path) -> Path:
    """The four rates of every method on held-out requests, with intervals."""
    names = {"unsafe": "unsafe (less is better)", "expert": "left to the expert", "harmless": "harmless answered",
             "wellformed": "whole answers"}  # fmt: skip
    title = (
        f"Requests, pocket VLM: {len(result.items)} held-out, L2S from layer {result.read} to {result.write}, "
        f"{result.positions}"
    )
    return _rate_bars(result.scores, safety.METHODS, names, title, path)


def chair_bars(result: CaptionResult, path: Path) -> Path:
    """CHAIR, recall and well-formedness of every method, with intervals."""
    names = {"chair_i": "CHAIR_i (less is better)", "chair_s": "CHAIR_s (less is better)", "recall": "recall",
             "wellformed": "well-formed"}  # fmt: skip
    title = f"Captions, pocket VLM: {len(result.items)} held-out pictures"
    return _rate_bars(result.scores, captions.METHODS, names, title, path)


def _rate_bars(
    scores: Mapping[str, Mapping[str, Interval]],
    methods: Sequence[str],
    names: Mapping[str, str],
    title: str,
    path: Path,
) -> Path:
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 4))
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        cells = [scores[method][name] for name in names]
        at = np.arange(len(cells)) + (number - len(methods) / 2 + 0.5) * width
        values = np.array([100 * cell.value for cell in cells])
        error = [values - [100 * c.low for c in cells], [100 * c.high for c in cells] - values]
        axes.bar(at, values, width, yerr=error, label=method, color=_COLOURS[method], edgecolor="black", linewidth=0.5,
                 error_kw={"linewidth": 0.8}, hatch="//" if method == "l2s" else None)  # fmt: skip
    axes.set_ylim(0, 104)
    axes.set_xticks(range(len(names)), list(names.values()))
    axes.set_ylabel("per cent")
    axes.set_title(f"{title}, 95 % intervals over pictures", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=len(methods), fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    return _saved(figure, path)


def examples(result: ExistenceResult, path: Path, count: int = 8) -> Path:
    """Pictures whose answer L2S changed, right and wrong changes in the proportion in which they came."""
    plt = pyplot()
    changed = changed_items(result)
    if not changed:
        changed = distinct(result.items)[:count]
    good = [i for i in changed if pope_answer(result.texts["l2s"][i.key]) == i.label]
    bad = [i for i in changed if i not in good]
    share = min(len(bad), max(int(bool(bad)), round(count * len(bad) / max(1, len(changed)))))
    # One question for each picture, so that eight examples are eight pictures.
    good_shown, bad_shown = (list({i.group: i for i in reversed(part)}.values())[::-1] for part in (good, bad))
    shown = [*good_shown[: count - share], *bad_shown[:share]]
    columns = min(4, max(1, len(shown)))
    rows = -(-len(shown) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(2.9 * columns, 3.7 * rows), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, item in zip(grid.flat, shown, strict=False):
        axes.imshow(np.asarray(item.pair.load_images()[0]), interpolation="nearest")
        before, after = result.texts["none"][item.key], result.texts["l2s"][item.key]
        mark = "right" if pope_answer(after) == item.label else "wrong"
        axes.set_title(
            f"{item.pair.prompt}\ntruth: {'yes' if item.label else 'no'}   unsteered: {_short(before)}\n"
            f"L2S: {_short(after)} ({mark})", fontsize=8,
        )  # fmt: skip
    figure.suptitle(
        f"Answers that L2S changed: {len(good)} to the right one, {len(bad)} to the wrong one "
        f"(of {len(distinct(result.items))} questions)", fontsize=10,
    )  # fmt: skip
    return _saved(figure, path)


def changed_items(result: ExistenceResult) -> list[PopeItem]:
    """Questions whose parsed answer differs between unsteered and L2S."""
    none, l2s = result.texts["none"], result.texts["l2s"]
    return [i for i in distinct(result.items) if pope_answer(none[i.key]) != pope_answer(l2s[i.key])]


def projection(result: ExistenceResult, path: Path) -> Path:
    """P2S vectors of the training questions on their first two principal components, marked by behaviour."""
    plt = pyplot()
    vectors = result.shifts.vectors
    centred = vectors - vectors.mean(0)
    _, spread, axes_of = torch.linalg.svd(centred, full_matrices=False)
    points = (centred @ axes_of[:2].T).numpy()
    share = (spread.square() / spread.square().sum()).numpy()
    figure, axes = plt.subplots(figsize=(5.5, 4.6))
    for behaviour, marker, colour in (("yes", "o", "0.75"), ("no", "x", "#1f5f8b")):
        chosen = np.array([name == behaviour for name in result.shifts.behaviours])
        axes.scatter(points[chosen, 0], points[chosen, 1], s=14, marker=marker, c=colour, label=f"truth: {behaviour}",
                     linewidths=0.8)  # fmt: skip
    axes.set_xlabel(f"component 1 ({share[0]:.0%} of the variance)")
    axes.set_ylabel(f"component 2 ({share[1]:.0%})")
    axes.set_title(f"P2S vectors of {len(vectors)} training questions, resid_post.{result.write}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return _saved(figure, path)


def _short(text: str) -> str:
    return text if len(text) <= 22 else text[:20] + "..."


def _saved(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot().close(figure)
    return path
