"""From pictures and words to a left-padded batch, and the checks that spare a user a late failure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import ProcessorMixin

from steer_plugin.adapters._chat import chat_text, special_tokens
from steer_plugin.adapters._parts import ModelParts
from steer_plugin.errors import InputError
from steer_plugin.pictures import picture_tokens

Inputs = Mapping[str, Tensor]


def encode(
    processor: ProcessorMixin, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]], device: torch.device
) -> dict[str, Tensor]:
    """Turn prompts and pictures into one left-padded batch, (row, pos) ids with the image tokens expanded.

    Raises:
        InputError: as many prompts as picture lists are needed, and at least one.
    """
    if not prompts or len(prompts) != len(images):
        raise InputError(
            f"got {len(prompts)} prompts and {len(images)} lists of images; give one list for each prompt."
        )
    texts = [chat_text(processor, prompt, len(row)) for prompt, row in zip(prompts, images, strict=True)]
    # The processors' call signatures differ by family; all take these. Pictures go row by row: a flat list would be
    # read as one picture per prompt by some.
    call, more = cast("Any", processor), special_tokens(processor, texts[0])
    given = [list(row) for row in images] if any(images) else None
    try:
        encoded = call(images=given, text=texts, padding=True, padding_side="left", return_tensors="pt", **more)
    except ValueError as error:
        raise InputError(
            f"{type(processor).__name__} refuses these prompts and pictures: {error} Prompts with and without pictures "
            "may have to go apart."
        ) from error
    # PaliGemma's processor adds labels, for training.
    return {key: value.to(device) for key, value in encoded.items() if isinstance(value, Tensor) and key != "labels"}


def collate(rows: Sequence[Inputs], pad_token_id: int) -> dict[str, Tensor]:
    """Stack encodings of single prompts into one left-padded batch.

    Raises:
        InputError: no rows, or rows whose keys differ.
    """
    if not rows:
        raise InputError("a batch needs at least one row, got none.")
    keys = set(rows[0])
    for number, row in enumerate(rows):
        if set(row) != keys:
            odd = sorted(keys ^ set(row))
            raise InputError(
                f"row {number} of the batch has other keys than row 0 (differing: {', '.join(odd)}); encode all rows "
                "the same way, or run prompts with and without images apart."
            )
    width = max(row["input_ids"].shape[1] for row in rows)
    fill = {"input_ids": pad_token_id, "attention_mask": 0}
    out: dict[str, Tensor] = {}
    for key in rows[0]:
        parts = [row[key] for row in rows]
        if all(p.ndim > 1 and p.shape[:2] == r["input_ids"].shape for p, r in zip(parts, rows, strict=True)):
            front = [(0, 0) * (p.ndim - 2) + (width - p.shape[1], 0) for p in parts]
            parts = [pad(p, room, value=fill.get(key, 0)) for p, room in zip(parts, front, strict=True)]
        if len({p.shape[1:] for p in parts}) > 1:
            raise InputError(
                f"the rows' {key!r} have shapes {[tuple(p.shape) for p in parts]}, which do not stack (pictures of "
                "different sizes?); encode all rows together: vlm.inputs(prompts, images)."
            )
        out[key] = torch.cat(parts)
    return out


def check_inputs(parts: ModelParts, inputs: Mapping[str, object]) -> None:
    """Compare pictures with image tokens before any work.

    Raises:
        InputError: no image for an image prompt, or another number of pictures than the prompt has room for.
    """
    ids, pixels = inputs.get("input_ids"), inputs.get("pixel_values")
    if not isinstance(ids, Tensor) or parts.image_token_id is None or inputs.get("past_key_values") is not None:
        return
    parts.check_pictures(ids, inputs)
    asked = picture_tokens(parts.root.config, cast("Inputs", inputs)) if isinstance(pixels, Tensor) else None
    given = int((ids == parts.image_token_id).sum())
    if asked is not None and asked != given:
        raise InputError(
            f"the pictures need {asked} image tokens, but the prompt has {given}; put one image placeholder into the "
            "text for each picture, and pass the processor's whole output."
        )


def with_positions(parts: ModelParts, inputs: Inputs) -> dict[str, Tensor]:
    """Add the position_ids that `generate` would use to left-padded inputs, so that a plain forward agrees with it."""
    out, first = dict(inputs), {"mask": 0, "mask+1": 1, "own": None}[parts.family.positions]
    mask = out.get("attention_mask")
    if mask is not None and first is not None and "position_ids" not in out and not bool(mask.all()):
        out["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0) + first
    return out


def image_rows(images: Any, rows: int) -> list[list[Image.Image]]:
    """One list of pictures per prompt from whatever the user gave."""
    if images is None:
        return [[] for _ in range(rows)]
    given: list[Any] = [images] if isinstance(images, (Image.Image, str, Path)) else list(images)
    if len(given) != rows:
        raise InputError(
            f"got {rows} prompts and images for {len(given)}; give one image, or one list of images, for each prompt."
        )
    return [[open_image(one) for one in (row if isinstance(row, (list, tuple)) else [row])] for row in given]


def open_image(source: Image.Image | Path | str) -> Image.Image:
    """Return an RGB picture from a picture or a path.

    Raises:
        InputError: the file is missing or is no picture.
    """
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    try:
        with Image.open(source) as opened:
            return opened.convert("RGB")
    except OSError as error:
        raise InputError(f"cannot read an image from {str(source)!r}: {error}.") from error
