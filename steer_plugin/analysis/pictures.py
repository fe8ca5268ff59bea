"""Image tokens drawn on the pictures that they stand for.

plot_positions    which image tokens are selected, or one value for each, as grids over the pictures of one prompt
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig, ProcessorMixin

from steer_plugin.analysis._figure import new_figure
from steer_plugin.errors import InputError
from steer_plugin.pictures import Box, Inputs, Picture, Pictures, Section, sections

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = object  # imported when needed; run-time type checkers look these names up

_VIEWS = {"whole": "whole picture", "tiles": "tiles", "class": "class token"}
_ACROSS = 3  # panels side by side


class _Panel(NamedTuple):
    """One view of a picture: its sections, and for each of its tokens the box (None: newline) and number in the row."""

    picture: int
    sections: list[Section]
    boxes: list[Box | None]
    tokens: range

    @property
    def name(self) -> str:
        """What the view shows, for the panel's title."""
        left, top, right, bottom = self.sections[0].box
        cut = max(left, top, 1 - right, 1 - bottom) > 1e-6
        view = self.sections[0].view
        return "the part that the model sees" if view == "whole" and cut else _VIEWS[view]

    @property
    def cells(self) -> list[tuple[Box, int]]:
        """Box and number of each token that covers a part of the picture."""
        return [(box, token) for box, token in zip(self.boxes, self.tokens, strict=True) if box is not None]


def plot_positions(
    config: PretrainedConfig,
    inputs: Inputs,
    pictures: Pictures,
    mask: Bool[Tensor, "row pos"] | None = None,
    *,
    values: Float[Tensor, " token"] | None = None,
    label: str = "value",
    row: int = 0,
    processor: ProcessorMixin | None = None,
) -> Figure:
    """Draw the image tokens of one prompt on its pictures: a panel per view, selected tokens shaded and hatched.

    Args:
        config: the model's config.
        inputs: the batch as the processor made it.
        pictures: the pictures of every row, as they were given to the processor.
        mask: selected prompt tokens, such as `vlm.show_positions(...).mask`; tokens of text are left out.
        values: one number per image token of the row in prompt order, newline tokens included, drawn as a heat map with
            dots on the selected tokens; cells without a finite number stay clear.
        label: what the values are.
        row: which prompt of the batch.
        processor: needed by the families that cut or crop pictures (see `sections`).

    Raises:
        InputError: a row without pictures, a mask or values of another size, or what `sections` refuses.
        FamilyError: a family whose geometry is not known.
        FrameworkError: matplotlib is missing.
    """
    ids = inputs.get("input_ids")
    found = sections(config, inputs, processor, pictures)
    if not isinstance(ids, Tensor) or not 0 <= row < len(found):
        raise InputError(f"the batch has rows 0 to {len(found) - 1}, got {row}.")
    panels = _panels(found[row])
    if not panels:
        raise InputError(f"row {row} has no picture to draw on.")
    count = panels[-1].tokens.stop
    if mask is not None and mask.shape != ids.shape:
        raise InputError(f"the mask is of {tuple(mask.shape)} tokens, but input_ids of {tuple(ids.shape)}.")
    if values is not None and len(values) != count:
        raise InputError(f"got {len(values)} values for the {count} image tokens of row {row}; give one for each.")
    token_id: Any = getattr(config, "image_token_id", None)
    chosen = None if mask is None else mask[row].cpu()[ids[row].cpu() == token_id].numpy()
    return _draw(panels, pictures[row], chosen, None if values is None else _heat_of(values), label)


class _Heat(NamedTuple):
    """Values by token, and how they become colours."""

    values: Float[np.ndarray, " token"]
    colours: str
    limits: tuple[float, float]


def _heat_of(values: Float[Tensor, " token"]) -> _Heat:
    """Signed values around a white zero, others from the smallest to the largest."""
    numbers = values.detach().float().cpu().numpy()
    finite = numbers[np.isfinite(numbers)]
    if not len(finite):
        raise InputError("none of the values is a finite number; there is nothing to draw.")
    if (finite < 0).any():
        most = float(np.abs(finite).max())
        return _Heat(numbers, "RdBu_r", (-most, most))
    return _Heat(numbers, "viridis", (float(finite.min()), float(finite.max())))


def _panels(row: Sequence[Picture]) -> list[_Panel]:
    """Gather neighbouring sections of one view, such as the tiles of a picture."""
    out: list[_Panel] = []
    start = 0
    for number, picture in enumerate(row):
        for _, group in groupby(picture, key=lambda section: section.view):
            together = list(group)
            boxes = [box for section in together for box in section.boxes()]
            out.append(_Panel(number, together, boxes, range(start, start + len(boxes))))
            start += len(boxes)
    return out


def _draw(
    panels: Sequence[_Panel],
    pictures: Sequence[Image.Image],
    chosen: Bool[np.ndarray, " token"] | None,
    heat: _Heat | None,
    label: str,
) -> Figure:
    """Lay the panels out, fill them, and give the values their colour bar."""
    across, down = min(_ACROSS, len(panels)), -(-len(panels) // _ACROSS)
    tallest = max(picture.size[1] / picture.size[0] for picture in pictures)
    figure = new_figure(3.2 * across + 0.8 * (heat is not None), down * (0.7 + 3.0 * min(1.6, max(0.4, tallest))))
    every = figure.subplots(down, across, squeeze=False).flatten().tolist()
    drawn: Any = None
    for axes, panel in zip(every, panels, strict=False):
        _show(axes, pictures[panel.picture], grey=heat is not None)
        drawn = _fill(axes, panel, pictures[panel.picture].size, chosen, heat) or drawn
        where = f"picture {panel.picture}, " if len(pictures) > 1 else ""
        axes.set_title(f"{where}{panel.name}\n{_counts(panel, chosen)}", fontsize=9)
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    if drawn is not None:
        figure.colorbar(drawn, ax=every, label=label)
    return figure


def _show(axes: Axes, picture: Image.Image, *, grey: bool) -> None:
    """Draw the picture itself, one unit to the pixel; without colour where colours carry values."""
    width, height = picture.size
    pixels = np.asarray(picture.convert("L" if grey else "RGB"))
    # Under values a pale picture: its own dark places must not read as dark values.
    axes.imshow(pixels, extent=(0, width, height, 0), cmap="gray", vmin=-255, vmax=255, zorder=0)
    axes.set_facecolor("0.85")  # what a processor padded
    axes.set_xticks([])
    axes.set_yticks([])


def _rectangles(boxes: Sequence[Box], size: tuple[int, int]) -> Float[np.ndarray, "cell corner xy"]:
    """Corners of each box in pixels of the picture."""
    return np.array(boxes).reshape(-1, 4)[:, [[0, 1], [2, 1], [2, 3], [0, 3]]] * np.array(size)


def _fill(
    axes: Axes,
    panel: _Panel,
    size: tuple[int, int],
    chosen: Bool[np.ndarray, " token"] | None,
    heat: _Heat | None,
) -> Any:
    """Draw the cells: values, grid lines, then the selection; returns what a colour bar can be made for."""
    from matplotlib.collections import PolyCollection

    tokens, drawn = [token for _, token in panel.cells], None
    cells = _rectangles([box for box, _ in panel.cells], size)
    if heat is not None:
        values = np.ma.masked_invalid(heat.values[tokens])
        drawn = PolyCollection(list(cells), array=values, cmap=heat.colours, alpha=0.75, linewidths=0, label="values")
        drawn.set_clim(*heat.limits)
        axes.add_collection(drawn)
    tiles = _rectangles([section.box for section in panel.sections], size) if len(panel.sections) > 1 else cells[:0]
    thin = _thin(cells, size[0])
    # White on black can be seen on any picture.
    lines = ((cells, "black", 1.4 * thin), (cells, "white", 0.6 * thin), (tiles, "black", 3.6), (tiles, "white", 2.0))
    for boxes, colour, line in lines:
        axes.add_collection(PolyCollection(list(boxes), facecolors="none", edgecolors=colour, linewidths=line))
    if chosen is not None:
        _select(axes, cells[chosen[tokens]], thin, filled=heat is None)
    across, down = cells.reshape(-1, 2).T
    axes.set_xlim(across.min(initial=0), across.max(initial=size[0]))
    axes.set_ylim(down.max(initial=size[1]), down.min(initial=0))
    return drawn


def _thin(cells: Float[np.ndarray, "cell corner xy"], width: int) -> float:
    """Factor for lines and dots: 1 down to cells of a tenth of the picture's width, then in proportion."""
    return min(1.0, 10 * float((cells[:, 1, 0] - cells[:, 0, 0]).min(initial=width)) / width)


def _select(axes: Axes, cells: Float[np.ndarray, "cell corner xy"], thin: float, *, filled: bool) -> None:
    """Shade and hatch the selected cells, or dot them where a fill would change the colours of values."""
    from matplotlib.collections import PolyCollection

    if filled:
        style: dict[str, Any] = {"facecolors": (1.0, 0.6, 0.0, 0.55), "edgecolors": "black", "hatch": "////"}
        axes.add_collection(PolyCollection(list(cells), linewidths=0.8 * thin, label="selected", **style))
        return
    across, down = cells.mean(1).T
    look: dict[str, Any] = {"color": "white", "edgecolors": "black", "linewidths": thin}
    axes.scatter(across, down, s=(8 * thin) ** 2, label="selected", zorder=3, **look)


def _counts(panel: _Panel, chosen: Bool[np.ndarray, " token"] | None) -> str:
    """How many tokens the panel has, and how many of them are selected."""
    newlines = {token for box, token in zip(panel.boxes, panel.tokens, strict=True) if box is None}
    if chosen is None:
        return f"{len(panel.cells)} tokens{f' + {len(newlines)} newlines' if newlines else ''}"
    picked = {int(token) for token in np.flatnonzero(chosen) if token in panel.tokens}
    tail = f" + {len(picked & newlines)} of {len(newlines)} newlines" if newlines else ""
    return f"{len(picked - newlines)} of {len(panel.cells)} tokens selected{tail}"
