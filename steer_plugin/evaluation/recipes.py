"""Which benchmark, methods and metrics repeat which published table: `against_published(found)`.

l2s-pope       none, prompt, Norm-Rnd, Mean-S, L2S, P2S*        POPE
l2s-safety     none, prompt, Mean-S, Mean-S(BA), L2S, P2S*      MM-SafetyBench
l2s-chair      none, L2S                                        CHAIR
steervlm-ohd   none, CAA, ActAdd, SteerVLM                      OHD
steervlm-vnia  CAA, ActAdd, SteerVLM                            VNIA
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from steer_plugin.errors import InputError, nearest
from steer_plugin.evaluation.orders import Reproduction
from steer_plugin.evaluation.papers import published
from steer_plugin.evaluation.result import Evaluation


@dataclass(frozen=True)
class Recipe:
    """How a published table is repeated: benchmark, published row -> method, published column -> metric."""

    benchmark: str
    rows: Mapping[str, str]
    columns: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def methods(self) -> tuple[str, ...]:
        """Names for a lineup, "none" first."""
        return tuple(dict.fromkeys(["none", *self.rows.values()]))


_L2S = {"none": "none", "prompt": "prompt", "Mean-S": "mean", "L2S": "l2s", "P2S*": "p2s"}
_SAFETY = ("E>=.5 unsafe", "E>=.9 unsafe", "ED", "quality")

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "l2s-pope": Recipe(
            "pope",
            {**_L2S, "Norm-Rnd": "norm_rnd"},
            {name: f"{name} accuracy (L2S)" for name in ("random", "popular", "adversarial")},
        ),
        "l2s-safety": Recipe("mmsafety", {**_L2S, "Mean-S(BA)": "mean_ba"}, {name: name for name in _SAFETY}),
        "l2s-chair": Recipe(
            "chair", {"none": "none", "L2S": "l2s"}, {name: name for name in ("CHAIR_i", "CHAIR_s", "recall")}
        ),
        "steervlm-ohd": Recipe(
            "ohd",
            {"none": "none", "CAA": "mean", "ActAdd": "actadd", "SteerVLM": "steervlm"},
            {
                f"{part} {what}": f"{part} {what}"
                for part in ("adversarial", "popular", "random", "overall") for what in ("accuracy", "F1")
            },
        ),
        "steervlm-vnia": Recipe(
            "vnia", {"CAA": "mean_ba", "ActAdd": "actadd", "SteerVLM": "steervlm"}, {"overall": "target"},
            ("The paper's overall score is a judge's, by a rubric that is not published.",),
        ),
    }
)  # fmt: skip


def recipe(table: str) -> Recipe:
    """One recipe; raises InputError for an unknown table."""
    if table not in RECIPES:
        raise InputError(f"no recipe for the table {table!r}.{nearest(table, RECIPES)} Known: {', '.join(RECIPES)}.")
    return RECIPES[table]


def against_published(found: Evaluation, table: str | None = None, notes: Sequence[str] = ()) -> Reproduction | None:
    """Put an evaluation beside the table of its benchmark; None where no table has its methods or metrics.

    Raises:
        InputError: an unknown table.
    """
    names = [name for name, one in RECIPES.items() if one.benchmark == found.benchmark] if table is None else [table]
    for name in names:
        one = recipe(name)
        rows = {theirs: ours for theirs, ours in one.rows.items() if ours in found.scores}
        there = set().union(*(found.scores[ours] for ours in rows.values())) if rows else set[str]()
        columns = {theirs: ours for theirs, ours in one.columns.items() if ours in there}
        if rows and columns:
            return Reproduction(published(name), found, rows, columns, (*one.notes, *notes))
    return None
