"""Which dimensions a gate opens: the same ones for every picture, for every pair?

    overlap(pair a, pair b, layer) = |top_k(a) & top_k(b)| / k          by chance k / d_model
    stability(layer)               = mean cosine between pictures of the gates' means by dimension

Means are over the tokens that were steered; records need "dim_mean" (or "none") among their reductions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steer_plugin.analysis._figure import Look, new_figure, tidy
from steer_plugin.analysis._frames import frame, over, spread
from steer_plugin.errors import InputError
from steer_plugin.record import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
else:
    DataFrame = Figure = object  # imported when needed; run-time type checkers look these names up


def _by_dimension(record: Record, name: str) -> tuple[Int[np.ndarray, " layer"], Float[np.ndarray, "layer row dim"]]:
    """Mean of a noted value by layer, row and dimension, over steered tokens."""
    table = record.summary(("layer", "row", "dim"), name)
    layers = record.data["layer"].values
    values = table["mean"].to_numpy(dtype=float).reshape(len(layers), record.data.sizes["row"], -1)
    return layers, values


def mean_steps(record: Record, name: str = "change") -> dict[str, Float[Tensor, " d_model"]]:
    """Mean of what was added in each layer, over rows and steered tokens: "layer 3" -> vector, for `direction_lens`.

    Raises:
        InputError: the record did not keep dimensions.
    """
    layers, values = _by_dimension(record, name)
    return {f"layer {layer}": torch.from_numpy(values[k].mean(0)).float() for k, layer in enumerate(layers)}


@dataclass(frozen=True)
class GateOverlap:
    """Dimensions that two records have in common among those that open widest.

    Attributes:
        pairs: names of the two records.
        layers: decoder layers.
        share: (pair, layer) of the top k that both have.
        k, chance: how many were compared, and the share that two random choices have in common.
    """

    pairs: tuple[tuple[str, str], ...]
    layers: Int[np.ndarray, " layer"]
    share: Float[np.ndarray, "pair layer"]
    k: int
    chance: float

    def to_frame(self) -> DataFrame:
        """Write a line per pair of records and layer."""
        lines = [
            (a, b, int(layer), float(v))
            for (a, b), row in zip(self.pairs, self.share, strict=True)
            for layer, v in zip(self.layers, row, strict=True)
        ]
        return frame(
            {title: [line[i] for line in lines] for i, title in enumerate(("first", "second", "layer", "share"))}
        )

    def plot(self) -> Figure:
        """Draw the shared share by layer, a line per pair of records; the dotted line is chance.

        Raises:
            FrameworkError: matplotlib is missing.
        """
        figure = new_figure(6.2, 3.4)
        axes = figure.subplots()
        for number, ((first, second), row) in enumerate(zip(self.pairs, self.share, strict=True)):
            axes.plot(self.layers, row, label=f"{first} / {second}", **Look.of(number)._asdict())
        axes.axhline(self.chance, color="0.4", linestyle=":", linewidth=0.8, label="chance")
        axes.set_xticks(self.layers)
        axes.set_xlabel("layer")
        axes.set_ylabel(f"shared among the top {self.k} dimensions")
        axes.set_ylim(0, 1.05)
        tidy(axes)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return figure


def gate_overlap(records: Mapping[str, Record], name: str = "gate", k: int = 10) -> GateOverlap:
    """Compare which dimensions open widest (largest mean by magnitude) under different pairs, tasks or pictures.

    Raises:
        InputError: fewer than two records, other layers, k out of range, or dimensions that were not kept.
    """
    if len(records) < 2:
        raise InputError(f"gate_overlap compares at least two records, got {len(records)}.")
    means = {key: _by_dimension(record, name) for key, record in records.items()}
    layers, first = next(iter(means.values()))
    width = first.shape[-1]
    if not 1 <= k <= width:
        raise InputError(f"k must lie between 1 and the {width} dimensions, got {k}.")
    tops: dict[str, list[set[int]]] = {}
    for key, (own, values) in means.items():
        if not np.array_equal(own, layers) or values.shape[-1] != width:
            raise InputError(f"record {key!r} has other layers or dimensions than the first; record the same steering.")
        order = np.argsort(-np.abs(values.mean(1)), axis=-1)[:, :k]
        tops[key] = [set(row.tolist()) for row in order]
    pairs = tuple(combinations(records, 2))
    share = np.array([[len(a & b) / k for a, b in zip(tops[x], tops[y], strict=True)] for x, y in pairs])
    return GateOverlap(pairs, layers, share, k, k / width)


@dataclass(frozen=True)
class GateStability:
    """How alike the gates of different pictures are.

    Attributes:
        names: of the records.
        layers: decoder layers.
        cosine: (record, layer, row) of each row's mean gate with the mean of the other rows, both about the layer's
            overall mean level.
        seed: of the bootstrap.
    """

    names: tuple[str, ...]
    layers: Int[np.ndarray, " layer"]
    cosine: Float[np.ndarray, "record layer row"]
    seed: int

    def to_frame(self) -> DataFrame:
        """Write a line per record and layer: mean cosine with its 95 % interval over rows."""
        mean, low, high = spread(self.cosine, self.seed)
        cells = [(r, k) for r in range(len(self.names)) for k in range(len(self.layers))]
        return frame(
            {
                "record": [self.names[r] for r, _ in cells], "layer": [int(self.layers[k]) for _, k in cells],
                "cosine": mean.reshape(-1), "low": low.reshape(-1), "high": high.reshape(-1),
            }
        )  # fmt: skip

    def plot(self) -> Figure:
        """Draw the mean cosine by layer, a line per record with 95 % intervals over rows.

        Raises:
            FrameworkError: matplotlib is missing.
        """
        figure = new_figure(6.0, 3.4)
        axes = figure.subplots()
        mean, low, high = spread(self.cosine, self.seed)
        for number, name in enumerate(self.names):
            look = Look.of(number)
            ends = np.stack([mean[number] - low[number], high[number] - mean[number]]).clip(0)
            axes.errorbar(
                self.layers + 0.05 * number, mean[number], ends, label=name, color=look.color, marker=look.marker,
                markersize=5, capsize=2,
            )  # fmt: skip
        axes.set_xticks(self.layers)
        axes.set_xlabel("layer")
        axes.set_ylabel("cosine of a picture's gate with the others'")
        axes.set_title(over(self.cosine.shape[-1], "picture"), fontsize=9)
        tidy(axes, zero=True)
        axes.legend(frameon=False, fontsize=8)
        return figure


def gate_stability(records: Mapping[str, Record], name: str = "gate", *, seed: int = 0) -> GateStability:
    """Ask whether the dimensions that open depend on the picture; the rows of a record are its pictures.

    Raises:
        InputError: no records, a record of one row, other layers or numbers of rows, dimensions that were not kept.
    """
    if not records:
        raise InputError("gate_stability needs at least one record, as in {'rain': record}.")
    means = {key: _by_dimension(record, name) for key, record in records.items()}
    layers, first = next(iter(means.values()))
    found: list[np.ndarray] = []
    for key, (own, values) in means.items():
        rows = values.shape[1]
        if rows < 2:
            raise InputError(
                f"record {key!r} has a single row, so there is nothing to compare; record several pictures."
            )
        if not np.array_equal(own, layers) or values.shape != first.shape:
            raise InputError(f"record {key!r} has other layers, rows or dimensions than the first.")
        centred = values - values.mean((1, 2), keepdims=True)
        others = (centred.sum(1, keepdims=True) - centred) / (rows - 1)
        lengths = np.linalg.norm(centred, axis=-1) * np.linalg.norm(others, axis=-1)
        found.append(np.divide((centred * others).sum(-1), lengths, out=np.zeros_like(lengths), where=lengths > 0))
    return GateStability(tuple(records), layers, np.stack(found), seed)
