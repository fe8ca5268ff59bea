"""Figures of a benchmark as its own metrics give them, and questions of POPE to ask."""

from __future__ import annotations

import numpy as np
from PIL import Image

from steer_plugin.contrast import ContrastivePair
from steer_plugin.evaluation.benchmark import Benchmark, Texts, Verdicts, asked_rows
from steer_plugin.evaluation.pope import PopeItem

PICTURE = Image.new("RGB", (4, 4))


def figure(benchmark: Benchmark, name: str, texts: Texts, said: Verdicts | None = None) -> float:
    """One figure: the metric's statistic over the rows that it asks about, each weighing 1."""
    rows = benchmark.values(texts, said or {})[name]
    assert rows.shape[0] == len(benchmark.items)
    chosen = rows[asked_rows(rows)]
    return float(benchmark.metric(name).statistic(chosen, np.ones((1, len(chosen))))[0])


def question(subset: str, picture: str, noun: str, label: bool) -> PopeItem:
    """A question on a picture."""
    yes, no = "Yes, the image", "No, the image"
    pair = ContrastivePair(
        f"{subset}-{picture}-{noun}", (PICTURE,), f"Is there a {noun}?", yes if label else no, no if label else yes,
        behaviour="yes" if label else "no", label=label,
    )  # fmt: skip
    return PopeItem(pair, subset, picture)
