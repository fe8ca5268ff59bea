"""A file of JSON lines that belongs to one job, appended and synced: a killed writer loses at most what it was in.

{"job": {...}}
{...}
{...}
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from steer_plugin.atomic import JSON, make_folder
from steer_plugin.errors import InputError, JobError


class JsonLines:
    """Rows on disk behind a first line that describes the job.

    Attributes:
        rows: what was there when it was opened, and what was added since.

    Raises:
        JobError: the file belongs to another job, is no such file, or cannot be written.
    """

    def __init__(self, path: Path, job: Mapping[str, JSON], what: str) -> None:
        self.path, self.what = Path(path), what
        self.rows: list[dict[str, JSON]] = []
        # As JSON gives it back: a tuple of settings must not differ from the list that it is stored as.
        self.job = cast("dict[str, JSON]", json.loads(json.dumps(job, sort_keys=True)))
        if self.path.exists():
            self._resume()
        else:
            make_folder(self.path.parent)
            self._append([{"job": self.job}])

    def add(self, rows: Sequence[Mapping[str, JSON]]) -> None:
        """Append rows; they are on disk when this returns."""
        self._append(rows)
        self.rows.extend(dict(row) for row in rows)

    def _resume(self) -> None:
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise JobError(f"cannot read {self.path}: {error}. Choose another file.") from error
        whole = data[: data.rfind(b"\n") + 1]
        if not whole and not self._first().startswith(data):
            raise self.broken(ValueError("no line of it is whole"))
        try:
            found = [cast("dict[str, JSON]", json.loads(line)) for line in whole.split(b"\n")[:-1]]
            job = cast("dict[str, JSON]", found[0]["job"]) if found else self.job
            if not all(isinstance(one, dict) for one in (job, *found)):
                raise TypeError("a line is no object")
        except (ValueError, KeyError, TypeError) as error:
            raise self.broken(error) from error
        if job != self.job:
            raise JobError(
                f"{self.path} holds {self.what} of another job: {_difference(job, self.job)}. Choose another place, or "
                "delete it."
            )
        # A killed writer may leave half a line; it is cut off, and its work done again. Last: it may be no log of ours.
        if len(whole) != len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        if not found:
            self._append([{"job": self.job}])
        self.rows = found[1:]

    def _first(self) -> bytes:
        return f"{json.dumps({'job': self.job}, allow_nan=False)}\n".encode()

    def broken(self, error: Exception) -> JobError:
        """The error for a row that this kind of file cannot hold."""
        return JobError(f"{self.path} is no log of {self.what} ({error!r}); choose another file, or delete it.")

    def _append(self, rows: Sequence[Mapping[str, JSON]]) -> None:
        try:
            data = "".join(f"{json.dumps(row, allow_nan=False)}\n" for row in rows).encode()
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{self.path} cannot hold {rows[0].get('id', 'the job')!r}: {error}; use plain JSON."
            ) from error
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            # Half a line in the middle of a log could never be read again.
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise JobError(f"cannot write {self.path}: {error}. Free some space and run again; it resumes.") from error


def _difference(found: Mapping[str, JSON], wanted: Mapping[str, JSON], name: str = "") -> str:
    """Name what differs between two job descriptions, with both values cut short."""
    parts: list[str] = []
    for key in sorted({*found, *wanted}):
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            parts += [_difference(old, new, f"{name}{key}.")] if old != new else []
        elif old != new:
            parts.append(f"{name}{key} is {str(old)[:60]!r} there and {str(new)[:60]!r} here")
    return "; ".join(parts)
