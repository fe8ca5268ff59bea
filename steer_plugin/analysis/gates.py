"""Pictures of a record: where and in which layers a gate opens.

plot_gates    heat map (layer, token), (layer, dim) or (layer, class), means over everything else
plot_profile  mean by layer, one line per record
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from steer_plugin.analysis._figure import new_figure
from steer_plugin.errors import InputError, nearest
from steer_plugin.record import CLASSES, PADDING, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = object  # imported when needed; run-time type checkers look these names up

WAYS = ("token", "dim", "class")
_MARKERS = "osD^vPX*"


class _Grid(NamedTuple):
    """What a heat map shows; `spans` are (first, last, text) of neighbouring columns that share a label."""

    values: Float[np.ndarray, "layer column"]
    spans: list[tuple[int, int, str]]
    axis: str
    meaning: str


def plot_gates(record: Record, name: str = "gate", x: str = "token", *, row: int | None = None) -> Figure:
    """Draw a heat map with layers upwards and `x` to the right: "token", "dim" or "class".

    By "token" it takes one `row`, or the mean over those that have a token in the column; `name` may also be a variable
    with one value per token, such as "change_norm". Grey cells have no token.

    Raises:
        InputError: unknown name, x or row, or what the record did not keep.
        FrameworkError: matplotlib is missing.
    """
    if x not in WAYS:
        raise InputError(f"cannot draw gates by {x!r}.{nearest(x, WAYS)} Known: {', '.join(WAYS)}.")
    if row is not None and x != "token":
        raise InputError(f"a single row can be drawn by token only, not by {x!r}.")
    grid = _tokens(record, name, row) if x == "token" else _means(record, name, x)
    width = min(14.0, 4.5 + (0.7 if x == "class" else 0.14) * grid.values.shape[1])
    figure = new_figure(width, 2.4 + 0.16 * min(40, len(grid.values)))
    axes = figure.subplots()
    axes.set_facecolor("0.85")
    finite = grid.values[np.isfinite(grid.values)]
    signed = bool((finite < 0).any())
    most = float(np.abs(finite).max()) if signed else None
    image = axes.imshow(
        grid.values, aspect="auto", origin="lower", cmap="RdBu_r" if signed else "viridis",
        vmin=-most if most else None, vmax=most,
    )  # fmt: skip
    figure.colorbar(image, ax=axes, label=grid.meaning)
    layers = [int(layer) for layer in record.data["layer"].values]
    step = max(1, round(len(layers) / 12))
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_ylabel("layer")
    axes.set_xlabel(grid.axis)
    _label(axes, grid, width - 2)  # colour bar and margins take about 2 inches
    return figure


def plot_profile(records: Mapping[str, Record], name: str = "gate") -> Figure:
    """Draw the mean by layer over all tokens and dimensions, one line per record under its key.

    Raises:
        InputError: no records, or a name that one of them does not have.
        FrameworkError: matplotlib is missing.
    """
    if not records:
        raise InputError("plot_profile needs at least one record, as in {'rain': record}.")
    figure = new_figure(6.0, 3.6)
    axes = figure.subplots()
    for number, (key, record) in enumerate(records.items()):
        frame = record.summary("layer", name)
        marker = _MARKERS[number % len(_MARKERS)]
        axes.plot(frame["layer"].to_numpy(), frame["mean"].to_numpy(), label=key, marker=marker, markersize=4)
    _whole(axes)
    axes.set_xlabel("layer")
    axes.set_ylabel(f"mean {name} over tokens and dimensions")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _whole(axes: Axes) -> None:
    """Put ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _means(record: Record, name: str, x: str) -> _Grid:
    """Means over tokens by class, or by dimension."""
    frame = record.summary(("layer", x), name).pivot(index="layer", columns=x, values="mean")
    tokens = f"over {int(record.data['tokens'].sum() // len(record.data['layer']))} tokens"
    if x == "dim":
        return _Grid(frame.to_numpy(), [], "hidden dimension", f"mean {name} {tokens}")
    frame = frame[[one for one in CLASSES if one in frame.columns]]
    spans = [(number, number, str(one).replace("_", " ")) for number, one in enumerate(frame.columns)]
    return _Grid(frame.to_numpy(), spans, "token class", f"mean {name}")


def _tokens(record: Record, name: str, row: int | None) -> _Grid:
    """One value per layer and column of the batch."""
    data, rows = record.data, int(record.data.sizes["row"])
    if row is not None and not 0 <= row < rows:
        raise InputError(f"the record has rows 0 to {rows - 1}, got {row}.")
    kept = [str(one) for one, found in data.data_vars.items() if found.dims == ("layer", "row", "token")]
    if name in kept:
        values, meaning = data[name].values, name.replace("_", " ")
    elif f"{name}_mean" in kept:
        values, meaning = data[f"{name}_mean"].values, f"mean {name} over dimensions"
    elif name in data and "token" in data[name].dims:
        values, meaning = data[name].values.mean(-1), f"mean {name} over dimensions"
    else:
        raise InputError(
            f"the record has no value of {name!r} per token; it has {', '.join(kept) or 'none at all'}. Record with "
            "reduce='mean', or draw x='class'."
        )
    valid, classes = data["valid"].values, data["token_class"].values
    chosen = slice(None) if row is None else slice(row, row + 1)
    valid, classes = valid[:, chosen], np.where(valid[:, chosen].any(0), classes[chosen], PADDING)
    counts = valid.sum(1)
    means = np.where(valid, values[:, chosen], 0).sum(1) / np.where(counts, counts, np.nan)
    there = counts.any(0)
    spans = _spans([_commonest(column) for column in classes[:, there].T.tolist()])
    where = f"columns, mean of {rows} rows" if row is None and rows > 1 else f"tokens of row {row or 0}"
    return _Grid(means[:, there], spans, f"{int(there.sum())} {where}, by token class", meaning)


def _commonest(words: Sequence[str]) -> str:
    """The most frequent class of a column, padding left out; the first of CLASSES where several are."""
    return max(CLASSES, key=list(words).count)


def _spans(words: Sequence[str]) -> list[tuple[int, int, str]]:
    out: list[tuple[int, int, str]] = []
    for word, run in groupby(enumerate(words), key=lambda pair: pair[1]):
        columns = [number for number, _ in run]
        out.append((columns[0], columns[-1], word.replace("_", " ")))
    return out


def _label(axes: Axes, grid: _Grid, width: float) -> None:
    """Name each span in its middle, part it from the next, and tilt the names where they would run together."""
    if not grid.spans:
        return
    middles, texts = [(first + last) / 2 for first, last, _ in grid.spans], [text for _, _, text in grid.spans]
    axes.set_xticks(middles, texts)
    for first, _, _ in grid.spans[1:]:
        axes.axvline(first - 0.5, color="white", linewidth=1)
    inches = width / grid.values.shape[1]
    near = zip(pairwise(middles), pairwise(texts), strict=True)
    if any((right - left) * inches < 0.045 * len(a + b) for (left, right), (a, b) in near):
        axes.tick_params(axis="x", labelrotation=35)
        for label in axes.get_xticklabels():
            label.set(horizontalalignment="right", rotation_mode="anchor")
