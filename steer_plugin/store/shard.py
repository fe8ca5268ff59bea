"""One file of rows, as the manifest lists it, and how it can be damaged: missing, of another size, altered."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from tqdm import tqdm

from steer_plugin.atomic import JSON
from steer_plugin.errors import ArtefactError

_NAME = re.compile(r"(?P<left>\.)?shard-(?:(?P<rank>\d+)-)?(?P<number>\d{6,})\.safetensors(?(left)\.\w+\.tmp)")


class Kind(NamedTuple):
    """What the rows of a tensor are: dtype, shape without row axis (and without token axis where ragged)."""

    dtype: str
    shape: tuple[int, ...]
    ragged: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype; raises ArtefactError for one that torch does not know."""
        found: object = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype):
            raise ArtefactError(
                f"The manifest names the dtype {self.dtype!r}, which torch does not know. It was altered."
            )
        return found


Layout: TypeAlias = "dict[str, Kind]"


@dataclass(frozen=True)
class Damage:
    """A shard that cannot be trusted: its file, what is wrong with it, and the ids of the rows that it held."""

    file: str
    reason: str
    ids: tuple[str, ...]

    def __str__(self) -> str:
        """Name the file, the reason and the number of rows."""
        return f"{self.file} {self.reason} ({len(self.ids)} rows)"


@dataclass(frozen=True)
class Shard:
    """One file of rows; `layout` maps a tensor's name to its kind; `places` are those of `ids` in the job's order."""

    file: str
    bytes: int
    sha256: str
    ids: tuple[str, ...]
    layout: Layout
    places: tuple[int, ...] | None = None

    @cached_property
    def line(self) -> str:
        """Its entry in the manifest."""
        tensors: dict[str, JSON] = {
            name: {"dtype": kind.dtype, "shape": kind.shape} | ({"ragged": True} if kind.ragged else {})
            for name, kind in self.layout.items()
        }
        entry: dict[str, JSON] = {
            "file": self.file,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "rows": len(self.ids),
            **({"ids": self.ids} if self.places is None else {"places": self.places}),
            "tensors": tensors,
        }
        return json.dumps(entry, ensure_ascii=False)

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from every other file of the folder, also of the same name."""
        return (self.file, self.sha256)

    def resized(self, folder: Path) -> str | None:
        """Say what is wrong when the file is missing or of another size; its content is not read."""
        path = folder / self.file
        found = path.stat().st_size if path.is_file() else None
        if found == self.bytes:
            return None
        return "is missing" if found is None else f"has {found} bytes, expected {self.bytes}"

    def damage(self, folder: Path) -> Damage | None:
        """Return what is wrong with the file, if anything; reads all of it for its sha256."""
        reason = self.resized(folder)
        if reason is None:
            with (folder / self.file).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != self.sha256:
                    reason = "does not match its recorded sha256: it was altered"
        return None if reason is None else Damage(self.file, reason, self.ids)

    def check(self, folder: Path, content: bool = True) -> None:
        """Raise ArtefactError, naming the file, when it is damaged; `content` says whether its sha256 is taken."""
        damage = self.damage(folder) if content else None
        reason = damage.reason if damage is not None else None if content else self.resized(folder)
        if reason is not None:
            raise ArtefactError(f"Shard {folder / self.file} {reason}. {self.mend}")

    @property
    def mend(self) -> str:
        """What to do about damage."""
        return (
            f"To mend it, run the same job again: it is dropped, and only its {len(self.ids)} rows are computed anew."
        )


def shard_name(number: int, rank: int | None = None) -> str:
    """Return the file name of a shard; `rank` where several processes write."""
    return f"shard-{number:06d}.safetensors" if rank is None else f"shard-{rank}-{number:06d}.safetensors"


def is_shard(file: str) -> bool:
    """Whether a file may be called that."""
    return not file.startswith(".") and _NAME.fullmatch(file) is not None


def writer_of(file: str) -> int | None:
    """Return the rank that wrote a shard, or a temporary file of one; None for other files."""
    found = _NAME.fullmatch(file)
    return None if found is None else int(found["rank"] or 0)


def number_of(file: str, rank: int | None) -> int:
    """Return the number of a shard in the series of `rank`; -1 for one of another series."""
    found = _NAME.fullmatch(file)
    return int(found["number"]) if found and found["rank"] == (None if rank is None else str(rank)) else -1


def damages(folder: Path, shards: Iterable[Shard], progress: bool) -> tuple[Damage, ...]:
    """Read shards, and return what is wrong with those that are damaged."""
    shards = list(shards)
    total = sum(shard.bytes for shard in shards)
    bar = tqdm(total=total, desc="verify", unit="B", unit_scale=True, disable=not progress)
    found: list[Damage] = []
    for shard in shards:
        damage = shard.damage(folder)
        found += [damage] if damage is not None else []
        bar.update(shard.bytes)
    bar.close()
    return tuple(found)
