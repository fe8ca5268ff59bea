"""Draw benchmarks/results/overhead.json: what each way to steer costs, as a ratio to its baseline.

python benchmarks/overhead_figure.py benchmarks/results/overhead.json docs/figures/overhead.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steer_plugin.analysis._figure import new_figure

ROWS = (
    ("torch_hook / unsteered", "hook by hand / unsteered"),
    ("torch_ours / unsteered", "ours, torch / unsteered"),
    ("l2s_late_read / unsteered", "ours, L2S late read / unsteered"),
    ("nnsight_ours / nnsight_empty", "ours, nnsight / empty trace"),
    ("lens_ours / lens_empty", "ours, TransformerLens / empty bridge"),
)
COLUMNS = (("forward_s", "forward"), ("first_token_s", "first token"), ("token_s", "each further token"))
COLOURS = {("pocket", 1): "#9ecae1", ("pocket", 8): "#4292c6", ("random", 1): "#fc9272", ("random", 8): "#cb181d"}


def draw(result: dict[str, Any]) -> Any:
    """Return the figure: medians of the paired ratios with their 95 % intervals, one panel for each measure."""
    figure = new_figure(9.0, 4.2)
    panels = figure.subplots(1, len(COLUMNS), sharey=True)
    runs = [run for run in result["runs"] if run.get("ratios")]
    for panel, (measure, title) in zip(panels, COLUMNS, strict=True):
        panel.axvline(1.0, color="0.6", linewidth=0.8)
        for number, run in enumerate(runs):
            shown = [
                (place, run["ratios"][pair][measure]) for place, (pair, _) in enumerate(ROWS) if pair in run["ratios"]
            ]
            heights = [place + 0.16 * (number - (len(runs) - 1) / 2) for place, _ in shown]
            middles = [one["median"] for _, one in shown]
            spread = [
                [one["median"] - one["low"] for _, one in shown],
                [one["high"] - one["median"] for _, one in shown],
            ]
            repeats = len(run["times"]["unsteered"])
            label = f"{run['model']}, d_model {run['d_model']}, batch {run['batch']} ({repeats} pairs)"
            colour = COLOURS.get((run["model"], run["batch"]), "0.3")
            panel.errorbar(middles, heights, xerr=spread, fmt="o", color=colour, markersize=4, label=label)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("time, ratio", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(ROWS)), [label for _, label in ROWS], fontsize=8)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def main(given: Sequence[str] | None = None) -> int:
    """Read the one, write the other."""
    arguments = sys.argv[1:] if given is None else given
    if len(arguments) != 2:
        raise SystemExit("usage: overhead_figure.py RESULT.json FIGURE.png")
    source, target = (Path(one) for one in arguments)
    draw(json.loads(source.read_text(encoding="utf-8"))).savefig(target, dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main())
