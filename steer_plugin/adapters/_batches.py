"""Batches of prompts that cost little: the same picture together, like lengths together, padding bounded.

    a batch = at most `size` prompts, sorted by length, with longest <= SLACK * shortest + ROOM

Prompts about one picture stay neighbours, whatever their lengths: the picture is run once for all of them in a batch.
The batches follow from the whole job alone, so that a resumed run, or one of several processes, forms the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from PIL import Image
from transformers import ProcessorMixin

SLACK, ROOM = 1.25, 16  # padding that is accepted: a quarter, and what short texts differ by anyway

A = TypeVar("A")
B = TypeVar("B")
Picture = Image.Image | Path


@dataclass(frozen=True)
class Size:
    """What is known of a prompt before it is encoded: which pictures, and about how many tokens."""

    pictures: str
    tokens: int


def batches(sizes: Sequence[Size], most: int) -> list[list[int]]:
    """Deal prompts out to batches; return their numbers, each once."""
    groups: dict[str, list[int]] = {}
    for number, size in enumerate(sizes):
        groups.setdefault(size.pictures, []).append(number)
    for group in groups.values():
        group.sort(key=lambda number: (sizes[number].tokens, number))
    ordered = sorted(groups.values(), key=lambda group: (sizes[group[-1]].tokens, group[0]))
    out: list[list[int]] = []
    for group in ordered:
        for number in group:
            if out and len(out[-1]) < most and _fits(sizes, out[-1], number):
                out[-1].append(number)
            else:
                out.append([number])
    return out


def _fits(sizes: Sequence[Size], batch: Sequence[int], number: int) -> bool:
    if any(sizes[one].pictures == sizes[number].pictures for one in batch):
        return True
    lengths = [sizes[one].tokens for one in (*batch, number)]
    return max(lengths) <= SLACK * min(lengths) + ROOM


class Sizes:
    """Sizes of a job's prompts; pictures are told apart by path, or by content where they are in memory."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor
        self._tokens: dict[str, int] = {}
        self._names: dict[int, str] = {}

    def of(self, text: str, pictures: Sequence[Picture]) -> Size:
        """Size of one prompt."""
        tokenizer, name = cast("Any", self.processor).tokenizer, self.pictures(pictures)
        if name not in self._tokens:
            self._tokens[name] = _image_tokens(self.processor, [_shape(one) for one in pictures])
        return Size(name, self._tokens[name] + len(tokenizer(text)["input_ids"]))

    def pictures(self, pictures: Sequence[Picture]) -> str:
        """One name for these pictures: theirs in turn."""
        return "\n".join(map(self._name, pictures))

    def _name(self, picture: Picture) -> str:
        if isinstance(picture, Path):
            return str(picture)
        if id(picture) not in self._names:
            digest = hashlib.sha256(f"{picture.mode}{picture.size}".encode())
            digest.update(picture.tobytes())
            self._names[id(picture)] = digest.hexdigest()
        return self._names[id(picture)]


def _shape(picture: Picture) -> tuple[int, int]:
    """(height, width); a file's header is enough."""
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    try:
        with Image.open(picture) as opened:
            return opened.height, opened.width
    except OSError:  # it is named, with the mend, when its batch comes
        return 1, 1


def _image_tokens(processor: ProcessorMixin, shapes: Sequence[tuple[int, int]]) -> int:
    """About how many image tokens these pictures become; 0 where the processor cannot tell: it only orders."""
    # What vLLM asks the processors for; some of them lack it, some count only with settings of a real checkpoint.
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    if count is None or not shapes:
        return 0
    try:
        return int(sum(count(image_sizes=list(shapes))["num_image_tokens"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        return 0


def ahead(items: Sequence[A], make: Callable[[A], B]) -> Generator[tuple[A, B], None, None]:
    """Make each item's value in a thread, one item ahead of its use: pictures are read while the model runs."""
    with ThreadPoolExecutor(1, "steer-plugin-reading") as pool:
        coming = pool.submit(make, items[0]) if items else None
        for number, item in enumerate(items):
            made = coming
            coming = pool.submit(make, items[number + 1]) if number + 1 < len(items) else None
            if made is not None:
                yield item, made.result()
