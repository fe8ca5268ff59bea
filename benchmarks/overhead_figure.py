r"""Draw what each way to steer costs, as a ratio to its baseline: all arms in turn, and pairs back to back.

python benchmarks/overhead_figure.py benchmarks/results/overhead.json benchmarks/results/overhead_pairs.json \
    docs/figures/overhead.png
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
LOOKS = {
    ("pocket", 1, False): ("0.75", "o"), ("pocket", 8, False): ("0.6", "s"), ("random", 1, False): ("#b5622b", "D"),
    ("random", 8, False): ("#c9a227", "^"), ("random", 1, True): ("#1f3b5c", "v"),
}  # fmt: skip


def label_of(run: dict[str, Any]) -> str:
    """Say of a run what it ran, and how many pairs its medians stand on."""
    pairs = len(next(iter(run["ratios"].values()))["token_s"]["each"])
    way = "pairs back to back" if run["close"] else "pairs, all arms in turn"
    return f"{run['model']}, d_model {run['d_model']}, batch {run['batch']}: {pairs} {way}"


def read(path: Path) -> list[dict[str, Any]]:
    """Return the runs of either benchmark."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["benchmark"] == "overhead":
        return [{**run, "close": False} for run in found["runs"] if run.get("ratios")]
    model, batch = found["config"]["block"].split(":")
    return [{**found, "model": model, "batch": int(batch), "close": True}]


def draw(runs: Sequence[dict[str, Any]]) -> Any:
    """Return the figure: medians of the paired ratios with their 95 % intervals, one panel for each measure."""
    figure = new_figure(9.0, 5.0)
    panels = figure.subplots(1, len(COLUMNS), sharey=True)
    for panel, (measure, title) in zip(panels, COLUMNS, strict=True):
        panel.axvline(1.0, color="0.6", linewidth=0.8)
        for number, run in enumerate(runs):
            shown = [
                (place, run["ratios"][pair][measure])
                for place, (pair, _) in enumerate(ROWS)
                if measure in run["ratios"].get(pair, {})
            ]
            heights = [place + 0.16 * (number - (len(runs) - 1) / 2) for place, _ in shown]
            middles = [one["median"] for _, one in shown]
            spread = [
                [one["median"] - one["low"] for _, one in shown],
                [one["high"] - one["median"] for _, one in shown],
            ]
            colour, marker = LOOKS.get((run["model"], run["batch"], run["close"]), ("0.3", "o"))
            panel.errorbar(middles, heights, xerr=spread, fmt=marker, color=colour, markersize=4, label=label_of(run))
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
    """Read the results, write the figure."""
    arguments = sys.argv[1:] if given is None else given
    if len(arguments) < 2:
        raise SystemExit("usage: overhead_figure.py RESULT.json [MORE.json] FIGURE.png")
    *sources, target = (Path(one) for one in arguments)
    draw([run for source in sources for run in read(source)]).savefig(target, dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main())
