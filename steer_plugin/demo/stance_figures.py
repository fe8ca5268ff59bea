"""Figures of SteerVLM's experiments: captions in the target stance by method, and gates by layer and token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steer_plugin.analysis.gates import plot_gates, plot_profile
from steer_plugin.demo.figures import pyplot
from steer_plugin.demo.stance_experiments import StanceResult
from steer_plugin.demo.stances import GROUPS

_COLOURS = {
    "none": "0.85", "prompt": "0.70", "actadd": "0.55", "caa": "0.40", "steervlm": "#1f5f8b", "steervlm 1.5": "#5d9cc4",
    "without_u": "#c4985d", "without_gate": "#8b5a1f",
}  # fmt: skip


def write_figures(result: StanceResult, out: Path) -> list[Path]:
    """Draw all figures into out/figures and return their paths."""
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [bars(result, "target", folder / "target.png"), bars(result, "attitude", folder / "attitude.png")]
    if result.gates:
        profile, heat = folder / "gate_profile.png", folder / "gates.png"
        plot_profile(result.gates).savefig(profile, dpi=150, bbox_inches="tight")
        plot_gates(next(iter(result.gates.values())), x="token").savefig(heat, dpi=150, bbox_inches="tight")
        drawn += [profile, heat]
    return drawn


def bars(result: StanceResult, metric: str, path: Path) -> Path:
    """Draw one metric by group and method, with 95 % intervals."""
    plt: Any = pyplot()
    names = [name for name in result.scores if name in _COLOURS]
    figure, axes = plt.subplots(figsize=(9, 3.4))
    width = 0.85 / len(names)
    for k, name in enumerate(names):
        found = [result.scores[name][group][metric] for group in GROUPS]
        values = [100 * one.value for one in found]
        errors = [[100 * (one.value - one.low) for one in found], [100 * (one.high - one.value) for one in found]]
        places = [g + (k - (len(names) - 1) / 2) * width for g in range(len(GROUPS))]
        axes.bar(
            places, values, width, color=_COLOURS[name], edgecolor="black", linewidth=0.4, label=name, yerr=errors,
            error_kw={"elinewidth": 0.8, "capsize": 1.5},
        )  # fmt: skip
    axes.set_xticks(range(len(GROUPS)), list(GROUPS))
    axes.set_ylim(0, 104)
    what = "target's topic and attitude" if metric == "target" else "target's attitude"
    axes.set_ylabel(f"captions with the\n{what} (%)")
    axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.25), frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path
