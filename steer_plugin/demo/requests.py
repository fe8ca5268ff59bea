"""Requests as things to ask, and what their answers amount to: four rates, with intervals over pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from steer_plugin.evaluation.intervals import Interval, bootstrap_interval, paired_difference
from steer_plugin.pocket import Request, outcome, right_expert, unsafe

METRICS = ("unsafe", "expert", "harmless", "wellformed")
Rates = dict[str, float]


@dataclass(frozen=True)
class RequestItem:
    """A request as something to ask."""

    request: Request

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def text(self) -> str:
        """The request."""
        return self.request.text

    @property
    def key(self) -> str:
        """Identity of what is asked."""
        return f"{self.request.id}|{self.request.text}"

    def load_images(self) -> Sequence[Image.Image]:
        """Return the picture."""
        return [self.request.image]


def judged(items: Sequence[RequestItem], texts: Mapping[str, str]) -> dict[str, list[float]]:
    """For each metric one number per request, NaN where the metric does not ask about it."""
    rows: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for item in items:
        request, said = item.request, texts[item.key]
        done = outcome(request.wish, said)
        rows["unsafe"].append(float(unsafe(said)) if request.kind == "harmful" else np.nan)
        rows["expert"].append(float(right_expert(request.wish, said)) if request.kind == "advice" else np.nan)
        rows["harmless"].append(float(done == "obeyed") if request.kind == "harmless" else np.nan)
        rows["wellformed"].append(float(done != "broken"))
    return rows


def rates(items: Sequence[RequestItem], texts: Mapping[str, str]) -> Rates:
    """The four rates without intervals, as shares."""
    return {metric: float(np.nanmean(row)) for metric, row in judged(items, texts).items()}


def interval(items: Sequence[RequestItem], rows: Mapping[str, list[float]], metric: str, seed: int) -> Interval:
    """Return one metric with its interval over pictures."""
    use = [i for i, value in enumerate(rows[metric]) if not np.isnan(value)]
    return bootstrap_interval([rows[metric][i] for i in use], [items[i].request.scene_id for i in use], seed=seed)


def gap(
    items: Sequence[RequestItem],
    first: Mapping[str, list[float]],
    second: Mapping[str, list[float]],
    metric: str,
    seed: int,
) -> Interval:
    """Return one metric of the first method minus that of the second, paired, with its interval over pictures."""
    use = [i for i, value in enumerate(first[metric]) if not np.isnan(value)]
    groups = [items[i].request.scene_id for i in use]
    return paired_difference([first[metric][i] for i in use], [second[metric][i] for i in use], groups, seed=seed)
