"""Interactive heat maps, by plotly: hover over a cell to read its place and value."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from steer_plugin.analysis._sweeps import Patching
from steer_plugin.analysis.footprints import Projection
from steer_plugin.analysis.lens import Lens
from steer_plugin.errors import FrameworkError, InputError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure
else:
    Figure = object  # imported when needed; run-time type checkers look the name up

Mapped: TypeAlias = Lens | Projection | Patching


def interactive(result: Mapped, *, row: int = 0, target: str | None = None) -> Figure:
    """Draw what `result.plot()` draws as a plotly figure; `row` and `target` as there (a lens names words on hover).

    Raises:
        InputError: unknown row or target.
        FrameworkError: plotly is missing.
    """
    try:
        from plotly.graph_objects import Figure as Made
        from plotly.graph_objects import Heatmap
    except ImportError as error:
        raise FrameworkError("interactive figures need plotly: pip install 'steer-plugin[interactive]'.") from error
    across, down, values, said, meaning = _map(result, row, target)
    signed = bool(np.nanmin(values) < 0)
    heat = Heatmap(
        x=list(range(len(across))), y=list(range(len(down))), z=values, customdata=said, zmid=0 if signed else None,
        colorscale="RdBu_r" if signed else "Viridis", colorbar={"title": meaning},
        hovertemplate="%{customdata}<br>%{z:.3f}<extra></extra>",
    )  # fmt: skip
    figure = Made(heat)
    figure.update_xaxes(tickvals=list(range(len(across))), ticktext=across)
    figure.update_yaxes(tickvals=list(range(len(down))), ticktext=down)
    return figure


def _map(result: Mapped, row: int, target: str | None) -> tuple[list[str], list[str], np.ndarray, np.ndarray, str]:
    """Columns, rows, values, hover texts and what the colours mean."""
    if target is not None and not isinstance(result, Lens):
        raise InputError(f"only a lens has targets; got target {target!r} with a {type(result).__name__}.")
    down = [str(site) for site in result.sites]
    if isinstance(result, Patching):
        across = list(result.parts)
        said = np.array([[f"{site}, {part}" for part in across] for site in down])
        return across, down, result.effect, said, "share of the effect"
    columns = result.tokens.columns(row)
    across = [result.tokens.words[row][column].replace("▁", " ").strip() for column in columns]
    classes = [result.tokens.classes[row][column] for column in columns]
    said = [
        [f"{site}, {column}: {word} ({name})" for column, word, name in zip(columns, across, classes, strict=True)]
        for site in down
    ]
    if isinstance(result, Lens):
        best = result.top[:, row][:, columns, 0].tolist()
        said = [
            [f"{text} -> {result.words[i]!r}" for text, i in zip(*lines, strict=True)]
            for lines in zip(said, best, strict=True)
        ]
        values = result.top_probability[:, row, :, 0] if target is None else result.of(target)[:, row]
        return across, down, values[:, columns].double().numpy(), np.array(said), "probability"
    return across, down, result.values[:, row, columns].double().numpy(), np.array(said), "projection"
