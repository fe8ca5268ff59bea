"""What an evaluation found: every figure with its interval, every method against unsteered, what it costs, tables.

A figure over several seeds is the mean of theirs; its interval resamples seeds and pictures. p-values are two-sided, of
permuted pictures, and corrected by Holm over the methods of one metric (controls apart from methods). In tables ° marks
what cannot be told from unsteered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import cast

from steer_plugin.atomic import JSON
from steer_plugin.errors import InputError, nearest
from steer_plugin.evaluation.benchmark import Metric
from steer_plugin.evaluation.comparing import LEVEL, Against, Runs, gap
from steer_plugin.evaluation.cost_log import MethodCosts
from steer_plugin.evaluation.intervals import Interval
from steer_plugin.evaluation.seeds import SeedSummary
from steer_plugin.evaluation.table import Cell, cell_text, markdown_table

MARK = "°"


@dataclass(frozen=True)
class Evaluation:
    """Everything that was found.

    Attributes:
        scores: {method: {metric: figure with interval, spread between seeds, figure of each seed}}.
        against: {method: {metric: difference from unsteered}}.
        over_controls: {method: {control: difference of the headline from that control}}.
        costs: {method: what it costs}; empty where costs were not asked for.
        controls: {control: method that it is a control of}.
        provenance: everything that decides a number.
        runs: {method: per seed, {metric: (item, column) rows}}, and `groups` the picture of each item.
    """

    benchmark: str
    headline: str
    metrics: tuple[Metric, ...]
    n: int
    scores: Mapping[str, Mapping[str, SeedSummary]]
    against: Mapping[str, Mapping[str, Against]]
    over_controls: Mapping[str, Mapping[str, Against]]
    costs: Mapping[str, MethodCosts] = field(default_factory=dict[str, MethodCosts])
    controls: Mapping[str, str] = field(default_factory=dict[str, str])
    provenance: Mapping[str, JSON] = field(default_factory=dict[str, JSON])
    runs: Mapping[str, Runs] = field(default_factory=dict[str, Runs], repr=False)
    groups: Sequence[str] = ()

    def score(self, method: str, metric: str | None = None) -> Interval:
        """One figure; the headline by default.

        Raises:
            InputError: an unknown method or metric.
        """
        found = self.scores.get(method)
        if found is None:
            raise InputError(f"no method {method!r} here.{nearest(method, self.scores)}")
        name = self.headline if metric is None else metric
        if name not in found:
            raise InputError(f"no metric {name!r} here.{nearest(name, found)}")
        return found[name].mean

    def compare(self, first: str, second: str, metric: str | None = None, *, seed: int = 0) -> Against:
        """One method less another; the p-value is corrected for nothing.

        Raises:
            InputError: an unknown method or metric.
        """
        name = self.headline if metric is None else metric
        for method in (first, second):
            self.score(method, name)
        chosen = next(one for one in self.metrics if one.name == name)
        found, p = gap(chosen, self.groups, self.runs[first], self.runs[second], seed=seed)
        return Against(found, p, p, p <= LEVEL)

    def table(self, metrics: Sequence[str] | None = None) -> str:
        """Markdown: a row per method; ° behind what cannot be told from unsteered; `metrics` instead of those shown."""
        wanted = None if metrics is None else self._known(metrics)
        rows: dict[str, dict[str, Cell]] = {}
        for method, found in self.scores.items():
            cells: dict[str, Cell] = {}
            for metric in self.metrics:
                if metric.name in found and (metric.shown if wanted is None else metric.name in wanted):
                    cells[_title(metric)] = self._cell(method, metric, found[metric.name])
            rows[f"- {method}" if method in self.controls else method] = cells
        return markdown_table(rows)

    def cost_table(self) -> str:
        """Markdown: what each method costs; "" where costs were not asked for."""
        if not self.costs:
            return ""
        rows: dict[str, dict[str, Cell]] = {
            method: {
                "KL (nats/token)": "" if one.kl is None else cell_text(one.kl, 3, 1.0),
                "perplexity": "" if one.perplexity is None else f"{one.perplexity:.2f}",
                "tokens": f"{one.text.tokens:.1f}",
                "empty %": f"{100 * one.text.empty:.1f}",
                "unfinished %": "" if one.text.unfinished is None else f"{100 * one.text.unfinished:.1f}",
                "distinct-1": f"{one.text.distinct_1:.3f}",
                "distinct-2": f"{one.text.distinct_2:.3f}",
            }
            for method, one in self.costs.items()
        }
        return markdown_table(rows)

    def markdown(self) -> str:
        """Tables, differences and what they mean, as one page."""
        first = next(iter(self.costs.values()), None)
        parts = [
            f"# {self.benchmark}", "", self.table(),
            f"{self.n} items. In brackets 95 % intervals, bootstrapped over pictures (and over seeds, where there are "
            f"several: ± is their standard deviation). {MARK}: cannot be told from unsteered (permutation test, Holm "
            "over the methods, 5 %). Rows with a dash are controls of the method above them.", "",
            *self._unread(), f"## Against unsteered, {self.headline}", "", self._difference_table(), "",
        ]  # fmt: skip
        if self.over_controls:
            parts += [f"## Against their own controls, {self.headline}", "", self._control_table(), ""]
        if first is not None:
            parts += [
                "## What it costs", "", self.cost_table(),
                "Lengths, empty and unfinished answers and distinct-n over all answers (of the first seed); KL to the "
                f"unsteered model along the method's own answers, and their perplexity under it, on {first.n}.", "",
            ]  # fmt: skip
        return "\n".join(parts)

    def as_json(self) -> dict[str, JSON]:
        """Every number, and everything that decides one."""
        return {
            "benchmark": self.benchmark, "headline": self.headline, "items": self.n,
            "metrics": [{"name": m.name, "better": m.better, "scale": m.scale} for m in self.metrics],
            "scores": {
                method: {name: _summary(one) for name, one in found.items()} for method, found in self.scores.items()
            },
            "against_unsteered": _against_json(self.against),
            "against_controls": _against_json(self.over_controls),
            "controls": dict(self.controls),
            "costs": {method: one.as_json() for method, one in self.costs.items()},
            "provenance": dict(self.provenance),
        }  # fmt: skip

    def _known(self, metrics: Sequence[str]) -> list[str]:
        known = [metric.name for metric in self.metrics]
        for name in metrics:
            if name not in known:
                raise InputError(f"no metric {name!r} here.{nearest(name, known)} Metrics: {', '.join(known)}.")
        return list(metrics)

    def _unread(self) -> list[str]:
        """Name verdicts without a number: what they are on is left out, which may flatter a method that breaks text."""
        unread = cast("Mapping[str, int]", self.provenance.get("unread_verdicts") or {})
        told = ", ".join(f"{count} of {name}" for name, count in unread.items())
        return [f"Verdicts without a number, left out: {told}.", ""] if told else []

    def _cell(self, method: str, metric: Metric, found: SeedSummary) -> str:
        text = cell_text(found.mean, metric.digits, metric.scale)
        if found.spread is not None:
            text += f" ± {found.spread * metric.scale:.{metric.digits}f}"
        gap = self.against.get(method, {}).get(metric.name)
        return text if gap is None or gap.significant else f"{text} {MARK}"

    def _difference_table(self) -> str:
        metric = next(one for one in self.metrics if one.name == self.headline)
        rows = {
            method: _gap_cells(found[self.headline], metric)
            for method, found in self.against.items()
            if self.headline in found
        }
        return markdown_table(rows) if rows else "Nothing beside unsteered."

    def _control_table(self) -> str:
        metric = next(one for one in self.metrics if one.name == self.headline)
        rows = {
            f"{method} less {control}": _gap_cells(gap, metric)
            for method, found in self.over_controls.items() for control, gap in found.items()
        }  # fmt: skip
        return markdown_table(rows)


def _title(metric: Metric) -> str:
    arrow = {"higher": " ↑", "lower": " ↓", "neither": ""}[metric.better]
    return f"{metric.name}{' (%)' if metric.scale == 100 else ''}{arrow}"


def _gap_cells(gap: Against, metric: Metric) -> dict[str, Cell]:
    return {
        "difference": cell_text(gap.difference, metric.digits, metric.scale),
        "p": f"{gap.p_value:.2g}",
        "p (Holm)": f"{gap.p_holm:.2g}",
        "": "" if gap.significant else MARK,
    }


def _summary(one: SeedSummary) -> dict[str, JSON]:
    return {
        "value": one.mean.value, "low": one.mean.low, "high": one.mean.high, "spread": one.spread,
        "seeds": list(one.means),
    }  # fmt: skip


def _against_json(found: Mapping[str, Mapping[str, Against]]) -> dict[str, JSON]:
    return {name: {key: cast(JSON, asdict(gap)) for key, gap in gaps.items()} for name, gaps in found.items()}
