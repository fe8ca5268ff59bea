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

from steer_plugin.adapters._parts import ModelParts
from steer_plugin.errors import InputError

Inputs = Mapping[str, Tensor]


def chat_text(processor: ProcessorMixin, prompt: str, pictures: int) -> str:
    """Render one user turn with its pictures and the open assistant turn through the processor's chat template."""
    content: list[dict[str, str]] = [{"type": "image"} for _ in range(pictures)]
    content.append({"type": "text", "text": prompt})
    message = [{"role": "user", "content": content}]
    # Declared for plain strings only; every processor takes the list of parts.
    rendered = cast("Any", processor).apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return str(rendered)


def completion_ids(processor: ProcessorMixin, prompt: str, completion: str, what: str) -> list[int]:
    """Token ids of a forced completion as they stand behind the chat prompt.

    Raises:
        InputError: the tokenizer merges the completion into the prompt; names `what`.
    """
    tokenizer = cast("Any", processor).tokenizer
    rendered = chat_text(processor, prompt, 0).rstrip()
    before = tokenizer(rendered)["input_ids"]
    after = tokenizer(f"{rendered} {completion}")["input_ids"]
    eos = tokenizer.eos_token_id
    before, after = (ids[:-1] if ids and ids[-1] == eos else ids for ids in (before, after))
    if after[: len(before)] != before or len(after) == len(before):
        raise InputError(
            f"{what}: the completion {completion[:40]!r} does not stand apart from the prompt's tokens; begin it with "
            "a word."
        )
    return list(after[len(before) :])


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
    flat = [image for row in images for image in row]
    # The processors' call signatures differ by family; all take these.
    call = cast("Any", processor)
    encoded = call(images=flat or None, text=texts, padding=True, padding_side="left", return_tensors="pt")
    return {key: value.to(device) for key, value in encoded.items() if isinstance(value, Tensor)}


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
        if parts[0].ndim == 2 and all(p.shape[:2] == r["input_ids"].shape for p, r in zip(parts, rows, strict=True)):
            parts = [pad(p, (width - p.shape[1], 0), value=fill.get(key, 0)) for p in parts]
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
    per_picture = getattr(parts.root.config, "image_seq_length", None)
    if not isinstance(pixels, Tensor) or not per_picture or not parts.family.fixed_image_tokens:
        return
    tokens = int((ids == parts.image_token_id).sum())
    if tokens != pixels.shape[0] * per_picture:
        raise InputError(
            f"{pixels.shape[0]} images need {pixels.shape[0] * per_picture} image tokens ({per_picture} each), but the "
            f"prompt has {tokens}; put one image placeholder into the text for each image."
        )


def with_positions(inputs: Inputs) -> dict[str, Tensor]:
    """Add the position_ids that `generate` would use to left-padded inputs, so that a plain forward agrees with it."""
    out = dict(inputs)
    mask = out.get("attention_mask")
    if mask is not None and "position_ids" not in out and not bool(mask.all()):
        out["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
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
