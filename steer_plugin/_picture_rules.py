"""The rules of each family: which grids of image tokens its inputs ask for, and how they make up pictures.

blocks    (config, inputs) -> one grid, or group of grids, for each picture or tile of the batch, in prompt order
arrange   (prompt, blocks of that row) -> its pictures: tiles are put together and cropped views placed
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple, cast

from torch import Tensor
from transformers import PretrainedConfig, ProcessorMixin

from steer_plugin._tiles import (
    WHOLE,
    Box,
    Picture,
    Section,
    canvas,
    cropped,
    inside,
    pan_and_scan,
    squared,
    tile_boxes,
    unpadded_grid,
)
from steer_plugin.errors import InputError

Inputs = Mapping[str, object]

_TILE_TAG = re.compile(r"<row_(\d+)_col_(\d+)>")


class Prompt(NamedTuple):
    """What is known of one prompt: its token ids, and the sizes (width, height) of its pictures where given."""

    number: int
    ids: list[int]
    token: int
    processor: ProcessorMixin | None
    sizes: list[tuple[int, int]] | None

    def runs(self, tokens: int) -> list[tuple[int, int]]:
        """(first column, number of blocks of so many tokens) of each unbroken run of image tokens.

        Raises:
            InputError: a run that is no whole number of blocks.
        """
        out: list[tuple[int, int]] = []
        for image, run in groupby(enumerate(self.ids), key=lambda one: one[1] == self.token):
            if not image:
                continue
            columns = [column for column, _ in run]
            if len(columns) % tokens:
                raise InputError(
                    f"row {self.number} has {len(columns)} image tokens in a row where each tile takes {tokens}; give "
                    "the inputs as the processor made them."
                )
            out.append((columns[0], len(columns) // tokens))
        return out

    def expect(self, pictures: int) -> None:
        """Compare the number of pictures found with those given."""
        if self.sizes is not None and len(self.sizes) != pictures:
            raise InputError(
                f"row {self.number} has image tokens for {pictures} pictures, but {len(self.sizes)} were given; give "
                "the pictures that the inputs were made from."
            )

    def option(self, name: str, default: object = None) -> Any:
        """A setting of the processor, which hands its own down to the image processor."""
        if self.processor is None:
            raise InputError(
                f"how the pictures of row {self.number} were cut is the processor's rule; pass processor=."
            )
        found = getattr(self.processor, "images_kwargs", {}).get(name)
        found = getattr(cast("Any", self.processor).image_processor, name, None) if found is None else found
        return default if found is None else found


def _numbers(inputs: Inputs, key: str) -> Any:
    """A small table of the inputs, such as image_sizes, as lists; None where it is not given."""
    value = inputs.get(key)
    return value.tolist() if isinstance(value, Tensor) else value


def _shape(inputs: Inputs, dims: int) -> tuple[int, ...] | None:
    """Shape of pixel_values; None unless it is a tensor of so many dimensions."""
    pixels = inputs.get("pixel_values")
    return tuple(pixels.shape) if isinstance(pixels, Tensor) and pixels.ndim == dims else None


def _vision(config: PretrainedConfig) -> Any:
    return cast("Any", config).vision_config


def _patches(config: PretrainedConfig, inputs: Inputs, dims: int = 4, scale: float = 1.0) -> Section | None:
    """The grid of one picture or tile: its patches, `scale` tokens for each along both sides."""
    shape, patch = _shape(inputs, dims), _vision(config).patch_size
    tall, wide = patch if isinstance(patch, (tuple, list)) else (patch, patch)
    return None if shape is None else Section(int(shape[-2] // tall * scale), int(shape[-1] // wide * scale))


def _each(config: PretrainedConfig, inputs: Inputs, scale: float = 1.0) -> list[Picture] | None:
    """One grid of patches for each picture or tile (picture, channel, height, width)."""
    section, shape = _patches(config, inputs, scale=scale), _shape(inputs, 4)
    return None if section is None or shape is None else [(section,)] * shape[0]


def _llava(config: PretrainedConfig, inputs: Inputs) -> list[Picture] | None:
    tower = str(_vision(config).model_type)
    if tower == "pixtral":
        return _by_size(config, inputs)
    classed = {"clip_vision_model": True, "siglip_vision_model": False}.get(tower)
    drops = cast("Any", config).vision_feature_select_strategy == "default"
    if classed is None or (drops and not classed):  # a tower that is not known, or whose first patch is dropped
        return None
    first = (Section(1, 1, view="class"),) if classed and not drops else ()
    blocks = _each(config, inputs)
    return None if blocks is None else [(*first, *block) for block in blocks]


def _anyres(config: PretrainedConfig, inputs: Inputs) -> list[Picture] | None:
    sizes, vision = _numbers(inputs, "image_sizes"), _vision(config)
    if sizes is None:
        return None
    side, shapes = vision.image_size // vision.patch_size, cast("Any", config).image_grid_pinpoints
    limit = re.search(r"anyres_max_(\d+)", getattr(config, "vision_aspect_ratio", ""))
    # OneVision cuts only the picture that is alone in its prompt.
    alone = [count == 1 for count in _numbers(inputs, "batch_num_images") or [1] * len(sizes) for _ in range(count)]
    if len(alone) != len(sizes):
        raise InputError(f"batch_num_images counts {len(alone)} pictures, but image_sizes has {len(sizes)}.")
    out: list[Picture] = []
    for (height, width), tiled in zip(sizes, alone, strict=True):
        if not tiled:
            out.append((Section(side, side, squared(width, height), "end"),))
            continue
        most = int(limit[1]) if limit else None
        rows, cols, box = unpadded_grid(width, height, shapes, vision.image_size, side, most)
        out.append((Section(side, side), Section(rows, cols, box, "row", "tiles")))
    return out


def _qwen(config: PretrainedConfig, inputs: Inputs) -> list[Picture] | None:
    grids, merge = _numbers(inputs, "image_grid_thw"), _vision(config).spatial_merge_size
    return None if grids is None else [(Section(h // merge, w // merge),) * t for t, h, w in grids]


def _by_size(config: PretrainedConfig, inputs: Inputs) -> list[Picture] | None:
    """Pixtral's tower: (height, width) in pixels tell the grid; a rest smaller than a token is not seen."""
    sizes, cell = _numbers(inputs, "image_sizes"), _vision(config).patch_size * getattr(config, "spatial_merge_size", 1)
    if sizes is None:
        return None
    grids = [(h, w, h // cell, w // cell) for h, w in sizes]
    return [(Section(rows, cols, (0.0, 0.0, cols * cell / w, rows * cell / h)),) for h, w, rows, cols in grids]


def _gemma3(config: PretrainedConfig, inputs: Inputs) -> list[Picture] | None:
    side, shape = math.isqrt(cast("Any", config).mm_tokens_per_image), _shape(inputs, 4)
    return None if shape is None else [(Section(side, side),)] * shape[0]


def _idefics3(config: PretrainedConfig, inputs: Inputs) -> list[Picture] | None:
    section, pixels = _patches(config, inputs, 5, 1 / cast("Any", config).scale_factor), inputs.get("pixel_values")
    if section is None or not isinstance(pixels, Tensor):
        return None
    # (row, tile, channel, height, width): rows with fewer tiles end in zeros, and the model drops these.
    return [(section,)] * int((pixels != 0).flatten(2).any(-1).sum())


def _internvl(config: PretrainedConfig, inputs: Inputs) -> list[Picture] | None:
    return _each(config, inputs, cast("Any", config).downsample_ratio)


def _mllama(config: PretrainedConfig, inputs: Inputs) -> list[Picture] | None:
    ratios = inputs.get("aspect_ratio_ids")  # 0 where a row has no such picture
    return [(Section(1, 1),)] * int((ratios > 0).sum()) if isinstance(ratios, Tensor) else None


def _as_they_are(prompt: Prompt, blocks: list[Picture]) -> list[Picture]:
    return blocks


def _viewed(prompt: Prompt, blocks: list[Picture]) -> list[Picture]:
    """LLaVA's processor shows the model the centre of a picture: place the grid there once the size is known."""
    if prompt.sizes is None:
        return blocks
    prompt.expect(len(blocks))
    boxes = [_seen(prompt, *size) for size in prompt.sizes]
    return [tuple(replace(one, box=box) for one in block) for block, box in zip(blocks, boxes, strict=True)]


def _seen(prompt: Prompt, width: int, height: int) -> Box:
    """The part of a picture that is left after padding to a square, resizing and cropping, each where it is done."""
    outer, size = WHOLE, prompt.option("size")
    if prompt.option("do_pad") and prompt.option("pad_to_square"):
        outer = squared(width, height)
        width = height = max(width, height)
    if not prompt.option("do_center_crop"):
        return outer
    shortest = size["shortest_edge"] if prompt.option("do_resize") and size.get("shortest_edge") else None
    if prompt.option("do_resize") and shortest is None:
        width, height = size["width"], size["height"]
    crop = prompt.option("crop_size")
    return inside(outer, cropped(width, height, shortest, (crop["height"], crop["width"])))


def _cropping(prompt: Prompt, blocks: list[Picture]) -> list[Picture]:
    """Gemma 3's pan and scan: a picture, then its crops; without pictures every block stands for itself."""
    if prompt.sizes is None or len(prompt.sizes) == len(blocks):
        return blocks
    published = {"min_crop_size": 256, "max_num_crops": 4, "min_ratio_to_activate": 1.2}
    rule = [prompt.option(f"pan_and_scan_{name}", default) for name, default in published.items()]
    crops = [pan_and_scan(*size, *rule) for size in prompt.sizes]
    if sum(1 + len(boxes) for boxes in crops) != len(blocks):
        prompt.expect(len(blocks))
    rest = iter(blocks)
    return [(*next(rest), *(replace(next(rest)[0], box=box, view="tiles") for box in boxes)) for boxes in crops]


def _tagged(prompt: Prompt, blocks: list[Picture]) -> list[Picture]:
    """Idefics3 and SmolVLM name each tile in the prompt, as in <row_1_col_2>, and then the whole picture."""
    if prompt.processor is None:
        raise InputError("how Idefics3 and SmolVLM cut a picture stands in the prompt's tokens; pass processor=.")
    block, tokenizer = blocks[0][0], cast("Any", prompt.processor).tokenizer
    tags = [prompt.ids[start - 1] for start, count in prompt.runs(block.tokens) for _ in range(count)]
    out: list[Picture] = []
    tiles: list[tuple[int, int]] = []
    for tag in cast("list[str]", tokenizer.convert_ids_to_tokens(tags)):
        if place := _TILE_TAG.fullmatch(tag):
            tiles.append((int(place[1]), int(place[2])))
            continue
        rows, cols = max(tiles, default=(0, 0))
        if tiles != [(r + 1, c + 1) for r in range(rows) for c in range(cols)]:
            raise InputError(f"row {prompt.number} has tiles {tiles} before {tag!r}, which make up no whole picture.")
        out.append((*(replace(block, box=box, view="tiles") for box in tile_boxes(rows, cols)), block))
        tiles.clear()
    if tiles:
        raise InputError(f"row {prompt.number} ends in tiles {tiles} without the whole picture behind them.")
    return out


def _tiled(prompt: Prompt, blocks: list[Picture]) -> list[Picture]:
    """InternVL: tiles, then the whole picture; their number stands in the prompt, their arrangement does not."""
    out: list[Picture] = []
    section = blocks[0][0]
    runs = prompt.runs(section.tokens)
    prompt.expect(len(runs))
    for number, (_, count) in enumerate(runs):
        if count == 1:
            out.append((section,))
            continue
        if prompt.sizes is None:
            raise InputError(
                f"picture {number} of row {prompt.number} has {count - 1} tiles, and how they lie depends on its size; "
                "pass pictures= and processor=."
            )
        size = prompt.option("size")
        rows, cols = canvas(
            *prompt.sizes[number], (size["height"], size["width"]), prompt.option("min_patches"),
            prompt.option("max_patches"),
        )  # fmt: skip
        if rows * cols != count - 1:
            raise InputError(
                f"picture {number} of row {prompt.number} has {count - 1} tiles, but this processor cuts one of its "
                f"size into {rows} x {cols}; give the picture and the processor that the inputs were made from."
            )
        out.append((*(replace(section, box=box, view="tiles") for box in tile_boxes(rows, cols)), section))
    return out


@dataclass(frozen=True)
class Rule:
    """How a family's image tokens lie: see the module's first lines. `blocks` gives None where it cannot tell."""

    blocks: Callable[[PretrainedConfig, Inputs], list[Picture] | None]
    arrange: Callable[[Prompt, list[Picture]], list[Picture]] = _as_they_are


RULES: dict[str, Rule] = {
    "llava": Rule(_llava, _viewed),
    "llava_next": Rule(_anyres),
    "llava_onevision": Rule(_anyres),
    "qwen2_vl": Rule(_qwen),
    "qwen2_5_vl": Rule(_qwen),
    "qwen3_vl": Rule(_qwen),
    "gemma3": Rule(_gemma3, _cropping),
    "paligemma": Rule(_each),
    "idefics3": Rule(_idefics3, _tagged),
    "smolvlm": Rule(_idefics3, _tagged),
    "internvl": Rule(_internvl, _tiled),
    "mllama": Rule(_mllama),
    "mistral3": Rule(_by_size),
}
