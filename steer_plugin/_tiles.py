"""Grids of image tokens, and how picture processors cut, crop and pad: arithmetic on picture sizes alone.

Boxes are (left, top, right, bottom) in fractions of the user's picture, beyond 0..1 where a processor padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers.image_processing_utils import select_best_resolution

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Section:
    """A grid of image tokens, row by row, over one box of a picture.

    Attributes:
        rows, cols: size of the grid in tokens.
        box: (left, top, right, bottom) in fractions of the user's picture. It reaches beyond 0..1 where the processor
            padded, and covers less where it cropped.
        newline: one extra image token, at the "end" of the grid or of each "row" (LLaVA-NeXT's image_newline).
        view: the "whole" picture, one of its "tiles" (or all of them), or the vision tower's "class" token.
    """

    rows: int
    cols: int
    box: Box = WHOLE
    newline: Literal["row", "end"] | None = None
    view: Literal["whole", "tiles", "class"] = "whole"

    @property
    def tokens(self) -> int:
        """Number of image tokens, newlines included."""
        return self.rows * self.cols + {"row": self.rows, "end": 1, None: 0}[self.newline]

    def boxes(self) -> list[Box | None]:
        """Box of each token in order; None for a newline."""
        cells: list[Box | None] = [inside(self.box, cell) for cell in tile_boxes(self.rows, self.cols)]
        if self.newline == "row":
            return [box for r in range(self.rows) for box in [*cells[r * self.cols : (r + 1) * self.cols], None]]
        return [*cells, None] if self.newline == "end" else cells


Picture = tuple[Section, ...]


def tile_boxes(rows: int, cols: int) -> list[Box]:
    """Boxes of equal tiles, row by row."""
    return [(c / cols, r / rows, (c + 1) / cols, (r + 1) / rows) for r in range(rows) for c in range(cols)]


def squared(width: int, height: int) -> Box:
    """Box of a picture that was padded to a square and stands in its middle (`pad_to_square` of LLaVA)."""
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    return -left / width, -top / height, (side - left) / width, (side - top) / height


def cropped(width: int, height: int, shortest: int | None, crop: tuple[int, int]) -> Box:
    """Box of the centre crop (height, width) of a picture whose shorter edge was first made `shortest` pixels long.

    As CLIP's image processor does it; None leaves the picture's size as it is.
    """
    if shortest is not None:
        short, long = min(width, height), max(width, height)
        longest = int(shortest * long / short)
        width, height = (shortest, longest) if width <= height else (longest, shortest)
    left, top = (width - crop[1]) // 2, (height - crop[0]) // 2
    return left / width, top / height, (left + crop[1]) / width, (top + crop[0]) / height


def inside(outer: Box, inner: Box) -> Box:
    """A box given in fractions of another box, in fractions of what that one is measured in."""
    wide, tall = outer[2] - outer[0], outer[3] - outer[1]
    return (
        outer[0] + inner[0] * wide, outer[1] + inner[1] * tall, outer[0] + inner[2] * wide, outer[1] + inner[3] * tall,
    )  # fmt: skip


def unpadded_grid(
    width: int, height: int, shapes: Sequence[Sequence[int]], tile: int, side: int, most: int | None = None
) -> tuple[int, int, Box]:
    """Rows, columns and box of the tile features of LLaVA-NeXT and LLaVA-OneVision, margins cut off.

    The picture is fitted into the best of `shapes` (height, width), cut into tiles of `tile` pixels with `side` x
    `side` features each; whole rows or columns of padding go, and above `most` tiles the grid is shrunk (OneVision's
    anyres_max).

    Source: `pack_image_features` and `get_image_patches` in transformers.
    """
    tall, wide = select_best_resolution((height, width), list(shapes))
    across, down = wide / width, tall / height
    fitted = (
        (wide, min(math.ceil(height * across), tall)) if across < down else (min(math.ceil(width * down), wide), tall)
    )
    rows, cols = tall // tile * side, wide // tile * side
    cut_rows = cut_cols = 0
    if width / height > cols / rows:
        cut_rows = (rows - int(round(height * (cols / width), 7))) // 2
    else:
        cut_cols = (cols - int(round(width * (rows / height), 7))) // 2
    box = (
        _fraction(cut_cols * tile / side, wide, fitted[0]), _fraction(cut_rows * tile / side, tall, fitted[1]),
        _fraction((cols - cut_cols) * tile / side, wide, fitted[0]),
        _fraction((rows - cut_rows) * tile / side, tall, fitted[1]),
    )  # fmt: skip
    rows, cols = rows - 2 * cut_rows, cols - 2 * cut_cols
    shrink = math.sqrt(rows * cols / (most * side**2)) if most else 1.0
    return (int(rows // shrink), int(cols // shrink), box) if shrink > 1.1 else (rows, cols, box)


def _fraction(pixel: float, canvas: int, fitted: int) -> float:
    """Where a pixel of the canvas lies on the picture that stands `fitted` pixels long in its middle."""
    return (pixel - (canvas - fitted) // 2) / fitted


def canvas(width: int, height: int, tile: tuple[int, int], least: int, most: int) -> tuple[int, int]:
    """Rows and columns of tiles that InternVL cuts a picture into (`tile` = height, width in pixels).

    The arrangement of `least` to `most` tiles whose aspect ratio is nearest; among equals the larger one while the
    picture has more than half of its pixels. Source: `get_optimal_tiled_canvas` in transformers.
    """
    best, nearest = (1, 1), math.inf
    shapes = [(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if least <= c * r <= most]
    for cols, rows in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        off = abs(width / height - cols / rows)
        if off < nearest or (off == nearest and width * height > 0.5 * tile[0] * tile[1] * cols * rows):
            best, nearest = (rows, cols), off
    return best


def pan_and_scan(width: int, height: int, smallest: int, most: int, ratio: float) -> list[Box]:
    """Boxes of the crops that Gemma 3 adds to a long picture; none for one that is nearly square or too small.

    Source: `Gemma3ImageProcessor.pan_and_scan` in transformers.
    """
    long, short = max(width, height), min(width, height)
    if long / short < ratio:
        return []
    count = min(most, max(2, min(long // smallest, math.floor(long / short + 0.5))))
    step = math.ceil(long / count)
    if min(step, short) < smallest:
        return []
    spans = [(step * i / long, min(step * (i + 1) / long, 1.0)) for i in range(count)]
    return [(a, 0.0, b, 1.0) if width >= height else (0.0, a, 1.0, b) for a, b in spans]
