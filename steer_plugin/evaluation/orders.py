"""Does a published table's order of methods hold in ours? Every pair of methods, column by column.

reproduced   ours differ as the paper's do, and the 95 % interval of the paired difference leaves 0 out
open         the interval holds 0
reversed     it lies on the other side
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from steer_plugin.evaluation.intervals import Interval
from steer_plugin.evaluation.papers import PublishedTable, beside
from steer_plugin.evaluation.result import Evaluation
from steer_plugin.evaluation.table import Cell, cell_text, markdown_table

Verdict = Literal["reproduced", "open", "reversed"]


@dataclass(frozen=True)
class Order:
    """Two methods in one column: `better` is the better one in print, `ours` its difference here, good side up."""

    column: str
    better: str
    worse: str
    printed: float
    ours: Interval
    verdict: Verdict


@dataclass(frozen=True)
class Reproduction:
    """Ours beside a published table.

    Attributes:
        rows: published method -> ours.
        columns: published column -> our metric.
        notes: what ours are, and how they differ from the paper's.
    """

    table: PublishedTable
    found: Evaluation
    rows: Mapping[str, str]
    columns: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def orders(self) -> list[Order]:
        """Every pair of methods that the paper tells apart, in the order of its columns and rows."""
        made: list[Order] = []
        for name, metric in self.columns.items():
            column = self.table.column(name)
            sign = 1 if column.higher_is_better else -1
            for one, two in combinations(self.rows, 2):
                values = self.table.rows[one].get(name), self.table.rows[two].get(name)
                if values[0] is None or values[1] is None or values[0] == values[1]:
                    continue
                if any(metric not in self.found.scores[self.rows[name]] for name in (one, two)):
                    continue
                better, worse = (one, two) if sign * (values[0] - values[1]) > 0 else (two, one)
                gap = self.found.compare(self.rows[better], self.rows[worse], metric, seed=self._seed).difference
                # + 0.0 makes a plain zero of the negative one.
                low, high = sorted((sign * gap.low + 0.0, sign * gap.high + 0.0))
                ours = Interval(sign * gap.value + 0.0, low, high, gap.level)
                made.append(Order(name, better, worse, abs(values[0] - values[1]), ours, _verdict(ours)))
        return made

    @property
    def _seed(self) -> int:
        seed = self.found.provenance.get("seed", 0)
        return seed if isinstance(seed, int) else 0

    def markdown(self) -> str:
        """Ours beside theirs, then the orders: how many hold, and each one that does not."""
        cells: dict[str, dict[str, Cell]] = {
            row: {
                name: self.found.score(ours, metric)
                for name, metric in self.columns.items()
                if metric in self.found.scores[ours]
            }
            for row, ours in self.rows.items()
        }
        orders = self.orders()
        parts = [f"# {self.table.name}", "", beside(cells, self.table, _what(self.found))]
        parts += [*(f"- {note}" for note in self.notes), "", "## Orders of the paper", "", _counted(orders), ""]
        missing = [one for one in orders if one.verdict != "reproduced"]
        return "\n".join([*parts, *([_listed(missing, self.table)] if missing else []), ""])


def _verdict(ours: Interval) -> Verdict:
    return "reproduced" if ours.low > 0 else "reversed" if ours.high < 0 else "open"


def _what(found: Evaluation) -> str:
    return f"{found.benchmark}, {found.n} items, 95 % intervals over pictures"


def _counted(orders: Sequence[Order]) -> str:
    counts = {name: sum(one.verdict == name for one in orders) for name in ("reproduced", "open", "reversed")}
    return (
        f"Of {len(orders)} pairs of methods that the paper tells apart, {counts['reproduced']} are reproduced, "
        f"{counts['open']} are open (the interval holds 0), {counts['reversed']} reversed."
    )


def _listed(orders: Sequence[Order], table: PublishedTable) -> str:
    rows: dict[str, dict[str, Cell]] = {}
    for one in orders:
        column = table.column(one.column)
        printed = cell_text(one.printed, column.digits, 1.0)
        ours = cell_text(one.ours, column.digits, column.scale)
        name = f"{one.column}: {one.better} over {one.worse}"
        rows[name] = {"paper": printed, "ours": ours, "": one.verdict}
    return markdown_table(rows, corner="not reproduced")
