"""A scene = backdrop + clutter + sum of sprites (alpha-blended, some small, faint or occluded) + pixel noise, as uint8.

The picture is a 3 x 3 grid of 24-pixel cells; every object has a cell to itself, so that truth is never ambiguous.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from steer_plugin.errors import InputError
from steer_plugin.pocket.company import companion, draw_groups
from steer_plugin.pocket.sprites import NOUNS, sprite
from steer_plugin.pocket.streams import noise_stream, stream

SIDE = 72
CELL = 24
GRID = SIDE // CELL
HARD = 0.4
Box = tuple[int, int, int, int]
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class SceneObject:
    """One drawn object: `box` is (x0, y0, x1, y1) in pixels, the upper ends excluded."""

    noun: str
    box: Box
    small: bool
    faint: bool
    occluded: bool

    @property
    def hard(self) -> bool:
        """Tell whether the object is hard to see, for one reason or another."""
        return self.small or self.faint or self.occluded


@dataclass(frozen=True)
class Scene:
    """A picture with its truth; `groups` are the nouns as they were put together (anchor and partner, or one alone)."""

    id: str
    image: Image.Image
    objects: tuple[SceneObject, ...]
    groups: tuple[tuple[str, ...], ...]

    @property
    def nouns(self) -> frozenset[str]:
        """The nouns that are truly in the picture."""
        return frozenset(thing.noun for thing in self.objects)


@dataclass(frozen=True)
class Patch:
    """A filled rectangle: clutter, or what hides a part of an object."""

    box: Box
    colour: Colour


@dataclass(frozen=True)
class Placed:
    """An object before painting: its sprite (height, width, rgba), how strongly it shows, and what covers it."""

    thing: SceneObject
    sprite: Float[np.ndarray, "height width 4"]
    strength: float
    cover: Patch | None


@dataclass(frozen=True)
class Plan:
    """Everything that a picture is painted from, except its noise."""

    backdrop: Colour
    clutter: tuple[Patch, ...]
    placed: tuple[Placed, ...]
    groups: tuple[tuple[str, ...], ...]
    noise: float


def scene_key(seed: int, split: str, index: int) -> tuple[str | int, ...]:
    """Name the stream of a scene; pictures that train the pocket model live under a root of their own."""
    return ("model", seed, index) if split == "model" else ("world", seed, split, index)


def plan_scene(rng: random.Random) -> Plan:
    """Draw the contents of a picture."""
    grey = rng.uniform(0.45, 1.0)
    backdrop = (grey + rng.uniform(-0.06, 0.06), grey + rng.uniform(-0.06, 0.06), grey + rng.uniform(-0.06, 0.06))
    groups = draw_groups(rng)
    nouns = [noun for group in groups for noun in group]
    cells = rng.sample(range(GRID * GRID), len(nouns))
    placed = tuple(_place(noun, cell, rng) for noun, cell in zip(nouns, cells, strict=True))
    empty = [cell for cell in range(GRID * GRID) if cell not in cells and rng.random() < 0.2]
    return Plan(backdrop, tuple(_clutter(cell, rng) for cell in empty), placed, groups, rng.uniform(0.03, 0.1))


def _colour(rng: random.Random) -> Colour:
    return rng.uniform(0.2, 0.9), rng.uniform(0.2, 0.9), rng.uniform(0.2, 0.9)


def _clutter(cell: int, rng: random.Random) -> Patch:
    x, y = cell % GRID * CELL + rng.randint(0, 8), cell // GRID * CELL + rng.randint(0, 8)
    return Patch((x, y, x + rng.randint(4, 14), y + rng.randint(4, 14)), _colour(rng))


def _place(noun: str, cell: int, rng: random.Random) -> Placed:
    """Draw one object into its cell: two in five are hard to see."""
    hard = rng.random() < HARD
    small, occluded = hard and rng.random() < 0.5, hard and rng.random() < 0.4
    faint = hard and (rng.random() < 0.5 or not (small or occluded))
    size = rng.randint(11, 14) if small else rng.randint(19, CELL - 1)
    strength = rng.uniform(0.3, 0.6) if faint else rng.uniform(0.85, 1.0)
    sheet = sprite(noun, rng).resize((size, size), Image.Resampling.LANCZOS)
    left, top, right, bottom = _visible(sheet)
    pixels = np.asarray(sheet.crop((left, top, right, bottom)), np.float32) / 255
    width, height = right - left, bottom - top
    x, y = cell % GRID * CELL + rng.randint(0, CELL - width), cell // GRID * CELL + rng.randint(0, CELL - height)
    cover = _cover(x, y, width, height, rng) if occluded else None
    thing = SceneObject(noun, (x, y, x + width, y + height), small, faint, occluded)
    return Placed(thing, pixels, strength, cover)


def _visible(sheet: Image.Image) -> Box:
    """Return the box of what shows; the faint rim that resampling leaves is no part of the object."""
    shows = sheet.getchannel("A").point([255 * (alpha > 12) for alpha in range(256)])
    return shows.getbbox() or (0, 0, *sheet.size)


def _cover(x: int, y: int, width: int, height: int, rng: random.Random) -> Patch:
    """Hide a third to three fifths of an object, from its left side or from below."""
    share = rng.uniform(0.3, 0.6)
    if rng.random() < 0.5:
        return Patch((x, y, x + max(1, round(width * share)), y + height), _colour(rng))
    return Patch((x, y + height - max(1, round(height * share)), x + width, y + height), _colour(rng))


def paint(plan: Plan, skip: int | None = None) -> Float[np.ndarray, "side side 3"]:
    """Paint a plan without noise, leaving out object number `skip` if asked: (72, 72, 3) in 0..1."""
    canvas = np.broadcast_to(np.asarray(plan.backdrop, np.float32), (SIDE, SIDE, 3)).copy()
    for patch in plan.clutter:
        _fill(canvas, patch)
    for number, placed in enumerate(plan.placed):
        if number == skip:
            continue
        x0, y0, x1, y1 = placed.thing.box
        alpha = placed.sprite[..., 3:] * placed.strength
        canvas[y0:y1, x0:x1] = canvas[y0:y1, x0:x1] * (1 - alpha) + placed.sprite[..., :3] * alpha
        if placed.cover is not None:
            _fill(canvas, placed.cover)
    return canvas


def _fill(canvas: Float[np.ndarray, "side side 3"], patch: Patch) -> None:
    x0, y0, x1, y1 = patch.box
    canvas[y0:y1, x0:x1] = patch.colour


def draw_scene(seed: int, split: str, index: int, without: str | None = None) -> Scene:
    """Draw scene number `index` of a split; the same arguments always give the same pixels.

    `without` leaves out the object of that noun and changes no other pixel. InputError where there is none.
    """
    key = scene_key(seed, split, index)
    plan = plan_scene(stream(*key))
    there = [placed.thing.noun for placed in plan.placed]
    if without is not None and without not in there:
        raise InputError(f"scene {index} of {split!r} shows no {without!r} to leave out; it shows {', '.join(there)}.")
    gone = None if without is None else there.index(without)
    canvas = paint(plan, gone)
    canvas += noise_stream(*key, "noise").standard_normal(canvas.shape, dtype=np.float32) * np.float32(plan.noise)
    pixels = np.rint(canvas.clip(0, 1) * 255).astype(np.uint8)
    objects = tuple(placed.thing for number, placed in enumerate(plan.placed) if number != gone)
    groups = tuple(kept for group in plan.groups if (kept := tuple(noun for noun in group if noun != without)))
    name = f"{split}-{seed}-{index:06d}" + ("" if without is None else f"-without-{without}")
    return Scene(name, Image.fromarray(pixels), objects, groups)


def caption_groups(scene: Scene, tempted: Callable[[], bool]) -> list[str]:
    """List the nouns that a caption names, in the world's order; `tempted` says of each missing companion if it is."""
    named: list[str] = []
    for group in sorted(scene.groups, key=lambda group: NOUNS.index(group[0])):
        named += group
        if len(group) == 1 and tempted() and companion(group[0]) not in scene.nouns:
            named.append(companion(group[0]))
    return named


def patch_nouns(scene: Scene, patch: int) -> Int[np.ndarray, " patches"]:
    """Number the noun of each image patch, row by row; -1 where a patch's cell is empty."""
    per_cell = CELL // patch
    labels = np.full((GRID * per_cell, GRID * per_cell), -1, np.int64)
    for thing in scene.objects:
        column, row = thing.box[0] // CELL * per_cell, thing.box[1] // CELL * per_cell
        labels[row : row + per_cell, column : column + per_cell] = NOUNS.index(thing.noun)
    return labels.reshape(-1)
