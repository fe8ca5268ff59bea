"""The order of a job: the ids of all its rows, written once beside the manifest, so that a row has its place.

order.json: {format, ids}; the manifest records its sha256, and shards list places in it instead of ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

from steer_plugin.artefact import sha256
from steer_plugin.atomic import JSON, atomic_write_bytes
from steer_plugin.errors import ArtefactError, InputError, nearest

ORDER = "order.json"
FORMAT = 1


@dataclass(frozen=True)
class Order:
    """The ids of a job, each once, in the order in which they are read.

    Raises:
        InputError: an id that occurs more than once.
    """

    ids: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse ids that repeat."""
        if len(self.places) != len(self.ids):
            twice = next(row for k, row in enumerate(self.ids) if self.places[row] != k)
            raise InputError(f"Row {twice!r} occurs more than once in the order: ids are unique. Give each once.")

    @cached_property
    def places(self) -> dict[str, int]:
        """The place of each id."""
        return {row: place for place, row in enumerate(self.ids)}

    @cached_property
    def sha256(self) -> str:
        """The sha256 of order.json."""
        return sha256(self._text())

    def places_of(self, ids: Sequence[str]) -> tuple[int, ...]:
        """Return the places of some ids; raises InputError for an id that the order lacks."""
        for row in ids:
            if row not in self.places:
                raise InputError(
                    f"Row {row!r} is not in the order of this job, which has {len(self.ids)} ids."
                    f"{nearest(row, self.ids[:1000])} Give every id of the job as order=, in its order."
                )
        return tuple(self.places[row] for row in ids)

    def write(self, folder: Path) -> None:
        """Write order.json, unless it stands there unharmed; raises JobError when it cannot be written."""
        if not self.stands(folder):
            atomic_write_bytes(folder / ORDER, self._text())

    def stands(self, folder: Path) -> bool:
        """Whether the folder holds this very order."""
        path = folder / ORDER
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256

    @classmethod
    def read(cls, folder: Path, digest: str) -> Order:
        """Read order.json; raises ArtefactError when it is missing or its sha256 is not the recorded one."""
        path = folder / ORDER
        mend = "Run the same job again: it is written anew."
        if not path.is_file():
            raise ArtefactError(f"{path} is missing, which says the order of the rows. {mend}")
        data = path.read_bytes()
        if sha256(data) != digest:
            raise ArtefactError(f"{path} does not match its recorded sha256: it was altered. {mend}")
        return cls(tuple(cast("dict[str, list[str]]", json.loads(data))["ids"]))

    def _text(self) -> bytes:
        value: dict[str, JSON] = {"format": FORMAT, "ids": self.ids}
        return (json.dumps(value, indent=0, ensure_ascii=False) + "\n").encode()
