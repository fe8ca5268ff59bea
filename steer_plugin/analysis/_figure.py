"""The one quiet style of the package's figures: no pyplot, one layout, readable in grey.

Lines differ by marker and dash as well as by colour; small heat maps have their numbers written in.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from steer_plugin.errors import FrameworkError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
else:
    Axes = Figure = AxesImage = object  # imported when needed; run-time type checkers look these names up

# Dark to light, so that they differ in grey too.
COLOURS = ("#1f3b5c", "#b5622b", "#5f8f8a", "#8a8a8a", "#c9a227", "#7b5ea7", "#9c3848", "#a9c5d6")
MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.", ":")
_WRITTEN = 160  # cells up to which a heat map's numbers can be read


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, in inches: pyplot would keep it, and show it twice in a notebook.

    Raises:
        FrameworkError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure as Made
    except ImportError as error:
        raise FrameworkError("figures need matplotlib: pip install 'steer-plugin[analysis]'.") from error
    return _shown(Made)(figsize=(width, height), layout="constrained")


@cache
def _shown(plain: type[Figure]) -> type[Figure]:
    """Figures that a notebook shows by themselves; IPython knows how to draw others once pyplot was imported."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    class Shown(plain):
        def _repr_png_(self) -> bytes:
            out = BytesIO()
            FigureCanvasAgg(self).print_png(out)
            return out.getvalue()

    return Shown


class Look(NamedTuple):
    """How the k-th of several series is drawn."""

    color: str
    marker: str
    linestyle: str

    @classmethod
    def of(cls, number: int) -> Look:
        """The look of series `number`; after 32 they repeat."""
        return cls(
            COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)], DASHES[number // len(COLOURS) % len(DASHES)]
        )


def tidy(axes: Axes, *, zero: bool = False) -> None:
    """Take away what frames a line chart; `zero`: draw the line at 0."""
    axes.spines[["top", "right"]].set_visible(False)
    if zero:
        axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)


def layer_ticks(axes: Axes, layers: Sequence[int], *, most: int = 12) -> None:
    """Name rows 0, 1, ... of a heat map by their layers, not more than fit."""
    step = max(1, round(len(layers) / most))
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_ylabel("layer")


def heat(
    axes: Axes,
    values: Float[np.ndarray, "down across"],
    *,
    limits: tuple[float, float] | None = None,
    written: str = "{:.2f}",
) -> AxesImage:
    """Draw a heat map, first row below: signed values around a white 0, cells without a number grey.

    `limits` are shared by panels that are to be compared; `written` formats the numbers of small maps, "" writes none.
    """
    finite = values[np.isfinite(values)]
    low, high = limits or ((float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0))
    signed = low < 0
    most = max(abs(low), abs(high)) or 1.0
    axes.set_facecolor("0.85")
    image = axes.imshow(
        np.ma.masked_invalid(values), aspect="auto", origin="lower", cmap="RdBu_r" if signed else "viridis",
        vmin=-most if signed else low, vmax=most if signed else high,
    )  # fmt: skip
    if written and values.size <= _WRITTEN:
        for (down, across), value in np.ndenumerate(values):
            if np.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
                text = written.format(value)
                axes.text(
                    across, down, text.lstrip("-") if float(text) == 0 else text, ha="center", va="center", fontsize=7,
                    color="black" if light else "white",
                )  # fmt: skip
    return image
