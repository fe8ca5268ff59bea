"""What is evaluated at many strengths, and how: items, behaviour, bound, what steers, and the settings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from steer_plugin.adapters import AttachedModel
from steer_plugin.atomic import JSON
from steer_plugin.errors import InputError
from steer_plugin.evaluation.asking import Asked, distinct
from steer_plugin.evaluation.bounds import Behaviour, Bound, Steered, check_number, identity

Groups: TypeAlias = Sequence[str] | Sequence[int] | None

KEEP_BYTES = 2 << 30


@dataclass(frozen=True)
class Task:
    """What is evaluated, and how.

    Attributes:
        steerings: what steers, by name (layer, choice).
        groups: the picture of each item, for clustered intervals.
        level: of all intervals.
        keep_bytes: memory for kept prompts; what does not fit is run again.
        out: a JSONL file of rows, so that a killed run resumes.
        job: what decides the answers besides, where a callable steers.

    Raises:
        InputError: no items, no processor, unusable numbers.
    """

    vlm: AttachedModel
    items: Sequence[Asked]
    behaviour: Behaviour
    bound: Bound
    steerings: Mapping[str, Steered]
    groups: Groups = None
    seed: int = 0
    level: float | int = 0.95
    batch_size: int = 32
    max_new_tokens: int = 12
    keep_bytes: int = KEEP_BYTES
    out: Path | None = None
    job: Mapping[str, JSON] | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuse, before any work, what cannot be evaluated."""
        if not self.items or self.vlm.processor is None:
            raise InputError("evaluating needs at least one item, and a model attached with its processor.")
        if self.groups is not None and len(self.groups) != len(self.items):
            raise InputError(
                f"got {len(self.groups)} groups for {len(self.items)} items; give the picture of each item."
            )
        for name, value, least in (("batch_size", self.batch_size, 1), ("max_new_tokens", self.max_new_tokens, 1)):
            check_number(name, value, f"a whole number from {least} up", value >= least)
        check_number("keep_bytes", self.keep_bytes, "bytes, 0 to keep nothing", self.keep_bytes >= 0)
        check_number("level", self.level, "a share between 0 and 1, as 0.95", 0 < self.level < 1)

    @property
    def described(self) -> dict[str, JSON]:
        """What the answers and their damage follow from; strengths, bound and seed only choose among them."""
        asked = "\n".join(f"{one.key}\t{one.text}" for one in distinct(self.items))
        return {
            "weights": self.vlm.parts.fingerprint(),
            "items": hashlib.sha256(asked.encode()).hexdigest(),
            "steering": {name: identity(one) for name, one in self.steerings.items()},
            "damage": self.bound.kind,
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
            "job": dict(self.job or {}),
        }
