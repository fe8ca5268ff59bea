"""What patching found: a metric by site, part of the prompt and row, between the base run's and the source's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from torch import Tensor

from steer_plugin.analysis._figure import Look, heat, layer_ticks, new_figure, tidy
from steer_plugin.analysis._frames import frame, ratio_spread
from steer_plugin.errors import InputError
from steer_plugin.sites import Site

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
else:
    DataFrame = Figure = object  # imported when needed; run-time type checkers look these names up

_SAID = {
    "denoise": "clean streams put into the corrupt run",
    "noise": "corrupt streams put into the clean run",
    "insert": "steered streams put into the unsteered run",
    "remove": "unsteered streams put into the steered run",
}


@dataclass(frozen=True, repr=False)
class Patching:
    """How far each patch moves the metric from the base run towards the source.

    Attributes:
        sites, parts: what was patched.
        base, source: (row,) the metric of the two runs.
        patched: (site, part, row) the metric of the base run under each patch.
        metric: its name.
        way: "denoise", "noise", "insert" or "remove".
        seed: of the bootstrap.
        estimated: whether `patched` comes from gradients (attribution patching), not from forwards.
    """

    sites: tuple[Site, ...]
    parts: tuple[str, ...]
    base: Float[Tensor, " row"]
    source: Float[Tensor, " row"]
    patched: Float[Tensor, "site part row"]
    metric: str
    way: str
    seed: int = 0
    estimated: bool = False

    def __repr__(self) -> str:
        """Name sizes and the largest effect."""
        share = np.abs(self.effect)
        site, part = np.unravel_index(int(np.argmax(share)), share.shape)
        return (
            f"Patching({self.way}, {len(self.sites)} sites x {len(self.parts)} parts x {len(self.base)} rows; largest "
            f"effect {self.effect[site, part]:.2f} at {self.sites[site]} on {self.parts[part]!r})"
        )

    @property
    def effect(self) -> Float[np.ndarray, "site part"]:
        """Share of the way from base to source, mean over rows: 0 as the base, 1 as the source."""
        return self.intervals()[0]

    def intervals(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return effect and ends of its 95 % bootstrap interval over rows, each (site, part); NaN ends of one row."""
        base = self.base.double().numpy()
        moved = self.patched.double().numpy() - base
        return ratio_spread(moved, self.source.double().numpy() - base, self.seed)

    def to_frame(self) -> DataFrame:
        """Write a line per site and part: kind, layer, part, effect, its interval, and the metric's mean."""
        effect, low, high = self.intervals()
        cells = [(i, j) for i in range(len(self.sites)) for j in range(len(self.parts))]
        return frame(
            {
                "kind": [self.sites[i].kind for i, _ in cells],
                "layer": [self.sites[i].layer for i, _ in cells],
                "part": [self.parts[j] for _, j in cells],
                "effect": effect.reshape(-1),
                "low": low.reshape(-1),
                "high": high.reshape(-1),
                "metric": self.patched.mean(-1).reshape(-1).numpy(),
            }
        )

    def plot(self) -> Figure:
        """Draw heat maps of the effect, one for each kind of site; of a single part, lines with intervals.

        Raises:
            FrameworkError: matplotlib is missing.
        """
        figure = self._lines() if len(self.parts) == 1 else self._maps()
        source = "estimated by one backward pass; " if self.estimated else ""
        rows = f"{len(self.base)} prompt{'s' if len(self.base) > 1 else ''}"
        figure.suptitle(f"{_SAID[self.way]}\n{source}{self.metric}, {rows}", fontsize=9)
        return figure

    def _kinds(self) -> list[str]:
        return list(dict.fromkeys(site.kind for site in self.sites))

    def _rows_of(self, kind: str) -> list[int]:
        return [number for number, site in enumerate(self.sites) if site.kind == kind]

    def _lines(self) -> Figure:
        figure = new_figure(6.0, 3.4)
        axes = figure.subplots()
        effect, low, high = self.intervals()
        for number, kind in enumerate(self._kinds()):
            rows = self._rows_of(kind)
            layers = [self.sites[row].layer or 0 for row in rows]
            middle = effect[rows, 0]
            ends = np.stack([middle - low[rows, 0], high[rows, 0] - middle])
            look = Look.of(number)
            error = None if np.isnan(ends).any() else ends.clip(0)
            axes.errorbar(
                np.array(layers) + 0.06 * number, middle, error, label=kind, color=look.color, marker=look.marker,
                linestyle=look.linestyle, markersize=5, capsize=2, linewidth=1.2,
            )  # fmt: skip
        axes.set_xticks(sorted({site.layer or 0 for site in self.sites}))
        axes.set_xlabel("layer")
        axes.set_ylabel("share of the effect")
        tidy(axes, zero=True)
        axes.legend(frameon=False)
        return figure

    def _maps(self) -> Figure:
        kinds = self._kinds()
        tall = max(len(self._rows_of(kind)) for kind in kinds)
        figure = new_figure(1.4 + len(kinds) * (0.9 + 0.75 * len(self.parts)), 2.3 + 0.3 * min(40, tall))
        panels = figure.subplots(1, len(kinds), squeeze=False)[0]
        values = self.effect
        low = float(values.min())
        limits = (low if low < -0.05 else 0.0, max(1.0, float(values.max())))
        drawn = None
        for axes, kind in zip(panels, kinds, strict=True):
            rows = self._rows_of(kind)
            drawn = heat(axes, values[rows], limits=limits)
            layer_ticks(axes, [self.sites[row].layer or 0 for row in rows])
            axes.set_xticks(range(len(self.parts)), self.parts, rotation=35, ha="right", rotation_mode="anchor")
            axes.set_title(kind, fontsize=9)
        if drawn is not None:
            figure.colorbar(drawn, ax=list(panels), label="share of the effect")
        return figure

    def compared(self, other: Patching) -> DataFrame:
        """Set two sweeps over the same places side by side, such as patches and their estimates.

        Raises:
            InputError: other sites or parts.
        """
        if (self.sites, self.parts) != (other.sites, other.parts):
            raise InputError("the two sweeps are of other sites or parts; run both over the same.")
        table = self.to_frame()[["kind", "layer", "part", "effect"]]
        return table.assign(other=other.effect.reshape(-1))
