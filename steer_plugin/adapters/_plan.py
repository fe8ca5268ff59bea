"""What an extraction is asked for: pairs, sites, and what of a completion becomes the vector's target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from PIL import Image

from steer_plugin.errors import InputError, nearest
from steer_plugin.positions import Positions
from steer_plugin.sites import Site

Target = Literal["last", "average_forced", "average_sampled"]
TARGETS: tuple[Target, ...] = ("last", "average_forced", "average_sampled")
# The authors' POPE script samples up to 100 new tokens, the first of which ends the forced ones.
SAMPLED_TOKENS = 99
# Where batch_size="auto" begins; it is halved whenever memory runs out.
MOST = 64


def parse_target(name: str) -> Target:
    """Return the target convention of that name.

    Raises:
        InputError: no such convention; the nearest is proposed.
    """
    for target in TARGETS:
        if target == name:
            return target
    raise InputError(f"unknown target {name!r}.{nearest(name, TARGETS)} Known: {', '.join(TARGETS)}.")


@runtime_checkable
class Prompted(Protocol):
    """A named prompt with its pictures: `sp.Prompt`, or a contrastive pair, whose own prompt is run."""

    @property
    def id(self) -> str: ...
    @property
    def images(self) -> Sequence[Image.Image | Path]: ...
    @property
    def prompt(self) -> str: ...
    def load_images(self) -> tuple[Image.Image, ...]: ...


@runtime_checkable
class Pair(Prompted, Protocol):
    """What extraction needs of a contrastive pair (see `steer_plugin.contrast.ContrastivePair`)."""

    @property
    def positive(self) -> str: ...
    @property
    def negative(self) -> str: ...
    @property
    def suffix(self) -> str: ...
    @property
    def behaviour(self) -> str: ...
    @property
    def user_text(self) -> str: ...


def parse_batch_size(size: int | str) -> int | None:
    """Return a number of rows, or None for "auto".

    Raises:
        InputError: neither.
    """
    if size == "auto":
        return None
    if not isinstance(size, int) or size < 1:
        raise InputError(f'batch_size must be a whole number from 1 up, or "auto", got {size!r}.')
    return size


@dataclass(frozen=True)
class Plan:
    """Where to read, what to pool, and how much at a time (None: what fits into memory)."""

    write: Site
    read: Site
    context: Positions
    target: Target
    batch_size: int | None
    seed: int
    sampled_tokens: int = SAMPLED_TOKENS
