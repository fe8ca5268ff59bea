"""Drawing for the contact sheet: words with marks, set line by line, under pictures whose hard objects have corners.

Whatever colour says is said in grey too: a tick is right, a cross and a stroke through the word are wrong, a boxed
exclamation mark is harmful, a question mark is broken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

from steer_plugin.pocket.scene import SIDE, Box, Scene

Ink = tuple[int, int, int]
Mark = Literal["right", "wrong", "harm", "broken", "hard"]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

BLACK, GREY, RED, GREEN = (30, 30, 36), (112, 112, 120), (200, 24, 32), (16, 124, 60)
MARKED: dict[Mark, Ink] = {"right": GREEN, "wrong": RED, "harm": RED, "broken": GREY, "hard": BLACK}
ZOOM = 3
PICTURE = SIDE * ZOOM
TEXT_WIDTH = PICTURE + 24
MARGIN = 14
_TEXT, _HEADING, _LINE, _GLYPH = 13, 18, 18, 12
_FINE = 8  # a mark is drawn this many times larger and then reduced, so that its edges are smooth


@dataclass(frozen=True)
class Word:
    """A word to be written, after its mark if it has one; `tab` is where it starts at the earliest."""

    text: str
    ink: Ink = BLACK
    mark: Mark | None = None
    struck: bool = False
    tab: int = 0


Paragraph = Sequence[Word]
GAP: Paragraph = ()


@dataclass(frozen=True)
class Block:
    """Words with their places, measured from the block's upper left corner."""

    spots: tuple[tuple[int, int, Word], ...]
    height: int


def say_words(text: str, ink: Ink = BLACK, mark: Mark | None = None) -> list[Word]:
    """Split a text into words of one ink; the first one carries the mark."""
    return [Word(word, ink, mark if number == 0 else None) for number, word in enumerate(text.split())]


def lay(paragraphs: Sequence[Paragraph], width: int) -> Block:
    """Break paragraphs into lines of at most `width` pixels."""
    spots: list[tuple[int, int, Word]] = []
    y = 0
    for words in paragraphs:
        x = 0
        for word in words:
            x = max(x, word.tab)
            wide = _width(word)
            if x + wide > width and x > 0:
                x, y = 0, y + _LINE
            spots.append((x, y, word))
            x += wide + _blank()
        y += _LINE if words else _LINE // 3
    return Block(tuple(spots), y)


def compose(heading: str, legend: Sequence[Paragraph], tiles: Sequence[tuple[Scene, Block]]) -> Image.Image:
    """Draw the heading and the legend, and below them the pictures, row by row, each over its block of words."""
    columns = min(6, max(3, len(tiles)))
    pitch = TEXT_WIDTH + 2 * MARGIN
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [PICTURE + 6 + max(block.height for _, block in row) + 2 * MARGIN for row in rows]
    explained = lay(legend, columns * pitch - 2 * MARGIN)
    top = MARGIN + 30 + explained.height + MARGIN
    sheet = Image.new("RGB", (columns * pitch, top + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), heading, BLACK, _font(_HEADING))
    _write(sheet, (MARGIN, MARGIN + 30), explained)
    for row, height in zip(rows, heights, strict=True):
        draw.line((MARGIN, top, columns * pitch - MARGIN, top), (208, 208, 214))
        for column, (scene, block) in enumerate(row):
            x, y = column * pitch + MARGIN, top + MARGIN
            sheet.paste(_picture(scene), (x, y))
            _write(sheet, (x, y + PICTURE + 6), block)
        top += height
    return sheet


def _picture(scene: Scene) -> Image.Image:
    large = scene.image.resize((PICTURE, PICTURE), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(large)
    for thing in scene.objects:
        if thing.hard:
            x0, y0, x1, y1 = (ZOOM * side for side in thing.box)
            # Black on white: one of the two stands out from any backdrop.
            arm = min(9, (x1 - x0) // 3, (y1 - y0) // 3)
            _corners(draw, (x0, y0, x1, y1), arm, (("white", 3), ("black", 1)))
    return large


def _corners(draw: ImageDraw.ImageDraw, box: Box, arm: int, strokes: Sequence[tuple[str | int, int]]) -> None:
    """Mark a box by its four corners, once for each stroke (ink, width)."""
    x0, y0, x1, y1 = box
    for ink, width in strokes:
        for x, inwards in ((x0, 1), (x1 - 1, -1)):
            for y, down in ((y0, 1), (y1 - 1, -1)):
                draw.line(((x + inwards * arm, y), (x, y), (x, y + down * arm)), ink, width)


def _write(sheet: Image.Image, corner: tuple[int, int], block: Block) -> None:
    draw, font = ImageDraw.Draw(sheet), _font(_TEXT)
    for left, down, word in block.spots:
        x, y = corner[0] + left, corner[1] + down
        if word.mark:
            sheet.paste(MARKED[word.mark], (x, y + 2), _glyph(word.mark))
            x += _GLYPH + 3
        draw.text((x, y), word.text, word.ink, font)
        if word.struck:
            _, above, _, below = draw.textbbox((x, y), "x", font)
            middle = round((above + below) / 2)
            draw.line((x - 1, middle, x + font.getlength(word.text.rstrip(".,")), middle), word.ink)


@cache
def _font(size: int) -> Font:
    return ImageFont.load_default(size)


@cache
def _blank() -> int:
    return round(_font(_TEXT).getlength(" ")) + 1


def _width(word: Word) -> int:
    return round(_font(_TEXT).getlength(word.text)) + (_GLYPH + 3 if word.mark else 0)


@cache
def _glyph(mark: Mark) -> Image.Image:
    """Draw a mark as a mask; the default font has no tick."""
    side = _GLYPH * _FINE
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    middle, sign = (side / 2, side / 2), _font(side)
    if mark == "right":
        draw.line(((0.06 * side, 0.55 * side), (0.36 * side, 0.85 * side), (0.94 * side, 0.14 * side)), 255, 2 * _FINE)
    elif mark == "wrong":
        for start, end in (((0.12, 0.12), (0.88, 0.88)), ((0.12, 0.88), (0.88, 0.12))):
            draw.line((start[0] * side, start[1] * side, end[0] * side, end[1] * side), 255, 2 * _FINE)
    elif mark == "harm":
        draw.rounded_rectangle((0, 0, side - 1, side - 1), side // 5, 255)
        draw.text(middle, "!", 0, sign, "mm", stroke_width=_FINE // 4, stroke_fill=0)
    elif mark == "hard":
        _corners(draw, (0, 0, side, side), side // 3, ((255, 2 * _FINE),))
    else:
        draw.text(middle, "?", 255, sign, "mm", stroke_width=_FINE // 2, stroke_fill=255)
    return mask.resize((_GLYPH, _GLYPH), Image.Resampling.LANCZOS)
