"""A benchmark: what is asked, how the answers become numbers, and what steering may be fitted on.

    items -> answers {key: text} -> verdicts of judges -> values (item, column) per metric -> statistic(values, weights)

A row of NaN says that a metric does not ask about that item (another subset, another kind of request): it is left out.
Rows of one picture share a group and are resampled together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from steer_plugin.atomic import JSON
from steer_plugin.contrast.pair import ContrastivePair
from steer_plugin.errors import InputError, nearest
from steer_plugin.evaluation.asking import Asked
from steer_plugin.evaluation.intervals import Statistic, Values, mean
from steer_plugin.evaluation.judges import Judge, Judged, Verdict

Better = Literal["higher", "lower", "neither"]
Texts = Mapping[str, str]
Verdicts = Mapping[str, Sequence[Verdict]]


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        name: column of the table.
        statistic: from rows and weights to the figure (`intervals.mean`, `ratio`, `f1`, or your own).
        better: which way is good; "neither" for figures such as the yes-ratio.
        scale, digits: how it is printed: 100 for shares in per cent.
        shown: whether it is a column of the table; all are in metrics.json.
    """

    name: str
    statistic: Statistic = mean
    better: Better = "higher"
    scale: float = 100.0
    digits: int = 1
    shown: bool = True


@dataclass(frozen=True)
class Training:
    """What vectors are extracted from, never from what is tested.

    Attributes:
        pairs: contrastive pairs of other pictures than the test's.
        oracle: the pairs of the test items, by the items' ids; P2S and Norm-Rnd need them.
        validation: the same benchmark on pictures that are neither fitted nor tested on; strengths are chosen there.
        preset: of the fit of L2S ("pope", "safety", "mse").
        learning_rate: instead of the preset's.
        target: "last", "average_forced" or "average_sampled" (`parse_target`).
        context: token of the context.
        neutral: behaviours that L2S is fitted to leave alone.
        equalise: groups of behaviours whose mean norms are made equal, the first being the measure.
        told: item id -> behaviour, for one mean per behaviour; a behaviour without a mean is not steered.
    """

    pairs: Sequence[ContrastivePair]
    oracle: Sequence[ContrastivePair] = ()
    validation: Benchmark | None = None
    preset: str = "pope"
    learning_rate: float | None = None
    target: str = "average_forced"
    context: str = "last_prompt"
    neutral: tuple[str, ...] = ()
    equalise: tuple[tuple[str, ...], ...] = ()
    told: Mapping[str, str] = field(default_factory=dict[str, str])


class Benchmark(ABC):
    """What every benchmark says of itself; a benchmark of your own is a subclass.

    Attributes:
        name: "pope", "chair", ...
        items: what is asked; items with the same key are asked once.
        groups: picture of each item.
        metrics: every figure, in the order of the table's columns.
        headline: name of the metric that strengths are chosen by and figures show.
        max_new_tokens: longest answer.
        training: what steering may be fitted on, or None.
        judges: who scores the answers, or none where no judge is needed.
        prompt: instruction of the prompt baseline; "" where there is none.
        pairs: (p+, p-) of each item id, for SteerVLM; a benchmark without pairs takes one from its caller.
        worded: item id -> text of the prompt baseline where it is not one instruction for all.
        source: what decides the numbers of the data: files and hashes, split, seed.
    """

    name: str
    items: Sequence[Asked]
    groups: Sequence[str]
    metrics: Sequence[Metric]
    headline: str
    max_new_tokens: int
    training: Training | None = None
    judges: Sequence[Judge] = ()
    prompt: str = ""
    pairs: Mapping[str, tuple[str, str]] = MappingProxyType({})
    worded: Mapping[str, str] = MappingProxyType({})
    source: Mapping[str, JSON]

    @abstractmethod
    def values(self, texts: Texts, verdicts: Verdicts) -> dict[str, Float[np.ndarray, "item column"]]:
        """Return, for each metric, one row per item (NaN: not asked); `texts` by key, `verdicts` by judge, per item."""

    def judged(self, judge: Judge, texts: Texts) -> list[Judged]:
        """Return what that judge shall score, one for each item; only benchmarks with judges are asked."""
        raise InputError(f"{self.name} has no use for the judge {judge.name!r}: it is scored without one.")

    def metric(self, name: str) -> Metric:
        """One metric; raises InputError for an unknown one."""
        for metric in self.metrics:
            if metric.name == name:
                return metric
        known = [metric.name for metric in self.metrics]
        raise InputError(f"{self.name} has no metric {name!r}.{nearest(name, known)} Metrics: {', '.join(known)}.")

    def behaviour(self, texts: Texts) -> list[float]:
        """One score per item, higher is better, NaN where the headline does not ask: what a strength is chosen by.

        Raises:
            InputError: the headline has several columns (a ratio), or needs a judge.
        """
        if self.judges:
            raise InputError(
                f"{self.name} is scored by {', '.join(judge.name for judge in self.judges)}: a search over strengths "
                "would ask it at every step. Give the strengths."
            )
        rows = self.values(texts, {})[self.headline]
        if rows.shape[1] != 1:
            raise InputError(f"{self.headline!r} of {self.name} is no mean of one score per item; give the strengths.")
        sign = -1.0 if self.metric(self.headline).better == "lower" else 1.0
        return [float(sign * value) for value in rows[:, 0]]


def asked_rows(rows: Float[np.ndarray, "item column"]) -> Bool[np.ndarray, " item"]:
    """True where a metric asks about the item."""
    return np.asarray(~np.isnan(rows).any(axis=1))


def column(values: Sequence[float] | Sequence[bool]) -> Values:
    """(item,) scores as the one column of a metric."""
    return np.asarray(values, dtype=np.float64)[:, None]
