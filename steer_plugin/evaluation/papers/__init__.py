"""The published figures of both papers, to stand beside ours: `beside(ours, published("l2s-pope"))`.

    l2s-pope, l2s-safety, l2s-chair       Learning to Steer (arXiv 2508.12815)
    steervlm-ohd, steervlm-vnia           SteerVLM (arXiv 2510.26769)

All are for LLaVA-1.5-7B, and stand in the JSON files beside this one in the units in which they were printed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TypedDict, cast

from steer_plugin.errors import InputError, nearest
from steer_plugin.evaluation.table import Cell, cell_text, markdown_table

NAMES = ("l2s-pope", "l2s-safety", "l2s-chair", "steervlm-ohd", "steervlm-vnia")


@dataclass(frozen=True)
class Column:
    """One figure of a table.

    Attributes:
        unit: "%", "share" (0 to 1) or "points of 10".
        digits: decimals as printed.
        higher_is_better: False for figures such as the unsafe share.
    """

    name: str
    unit: str
    digits: int
    higher_is_better: bool

    @property
    def scale(self) -> float:
        """What our own value is multiplied by: scores of this package are shares, never per cent."""
        return 100.0 if self.unit == "%" else 1.0


@dataclass(frozen=True)
class PublishedTable:
    """One published table: {method: {column: number as printed}}, complete, with its source and what to know of it."""

    name: str
    paper: str
    arxiv: str
    table: str
    model: str
    data: str
    columns: tuple[Column, ...]
    rows: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...]

    @property
    def source(self) -> str:
        """Paper, table and model in one line."""
        return f"{self.paper} (arXiv {self.arxiv}), {self.table}, {self.model}; {self.data}."

    def column(self, name: str) -> Column:
        """One column; raises InputError for an unknown one, the nearest is proposed."""
        for column in self.columns:
            if column.name == name:
                return column
        known = [column.name for column in self.columns]
        raise InputError(f"{self.name} has no column {name!r}.{nearest(name, known)} Columns: {', '.join(known)}.")


class _File(TypedDict):
    name: str
    paper: str
    arxiv: str
    table: str
    model: str
    data: str
    columns: list[_ColumnFile]
    rows: dict[str, dict[str, float]]
    notes: list[str]


class _ColumnFile(TypedDict):
    name: str
    unit: str
    digits: int
    higher_is_better: bool


def published(name: str) -> PublishedTable:
    """Return a published table by its name, one of `NAMES`; raises InputError otherwise, the nearest is proposed."""
    if name not in NAMES:
        raise InputError(f"unknown table {name!r}.{nearest(name, NAMES)} Known: {', '.join(NAMES)}.")
    given = cast("_File", json.loads(files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8")))
    return PublishedTable(
        name=given["name"],
        paper=given["paper"],
        arxiv=given["arxiv"],
        table=given["table"],
        model=given["model"],
        data=given["data"],
        columns=tuple(Column(**column) for column in given["columns"]),
        rows=given["rows"],
        notes=tuple(given["notes"]),
    )


def beside(ours: Mapping[str, Mapping[str, Cell]], table: PublishedTable, model: str | None = None) -> str:
    """Render ours, {method: {column: score}}, beside a published table as Markdown, its source and notes below.

    Our scores are shares (intervals or numbers; points where the column's unit is points), and methods meet by name.
    Columns that ours lacks are left out; `model` says below what ours were measured on. Raises InputError for an
    unknown column, or none at all.
    """
    wanted = {name for cells in ours.values() for name in cells}
    for name in sorted(wanted):
        table.column(name)
    columns = [column for column in table.columns if column.name in wanted]
    if not columns:
        raise InputError(f"Got no score to stand beside {table.name}: expected {{method: {{column: score}}}}.")
    rows = {
        method: _row(ours.get(method, {}), table.rows.get(method, {}), columns)
        for method in dict.fromkeys([*table.rows, *ours])
    }
    below = [f"Paper: {table.source}", *([] if model is None else [f"Ours: {model}."]), *table.notes]
    return f"{markdown_table(rows)}\n{_lines(below)}"


def _row(ours: Mapping[str, Cell], theirs: Mapping[str, float], columns: Sequence[Column]) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for column in columns:
        unit = "" if column.unit == "share" else f" ({column.unit})"
        printed = theirs.get(column.name)
        cells[f"{column.name}{unit}, ours"] = cell_text(ours.get(column.name), column.digits, column.scale)
        cells[f"{column.name}, paper"] = None if printed is None else cell_text(printed, column.digits, 1.0)
    return cells


def _lines(texts: Iterable[str]) -> str:
    return "".join(f"- {text}\n" for text in texts)
