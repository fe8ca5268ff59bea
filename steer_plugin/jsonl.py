"""A file of JSON lines that belongs to one job, appended and synced: a killed writer loses at most what it was in.

{"job": {...}}
{...}
{...}

Of several processes each appends to a file of its own beside it ({path}, {path}.p1, {path}.p2 ...) and reads all of
them; `gather` makes them one again. A process cuts half a line off its own file alone: of another's it may be the line
that is being written.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, cast

from steer_plugin.atomic import JSON, atomic_write_bytes, make_folder, remove_leftovers
from steer_plugin.errors import InputError, JobError
from steer_plugin.processes import Processes

Row: TypeAlias = "dict[str, JSON]"


class JsonLines:
    """Rows on disk behind a first line that describes the job.

    Attributes:
        rows: what was there when it was opened, by whichever process, and what this one added since.

    Raises:
        JobError: the file belongs to another job, is no such file, or cannot be written.
    """

    def __init__(self, path: Path, job: Mapping[str, JSON], what: str) -> None:
        self.path, self.what = Path(path), what
        self._processes = Processes.current()
        self._own = self.path if self._processes.main else self.path.with_name(_name(self.path, self._processes.index))
        self._added: list[Row] = []
        # As JSON gives it back: a tuple of settings must not differ from the list that it is stored as.
        self.job = cast("dict[str, JSON]", json.loads(json.dumps(job, sort_keys=True)))
        # All files are read, and may be refused, before any is touched.
        self.rows = self._union()
        if self._own.exists():
            self._mend()
        elif self._processes.main:
            make_folder(self.path.parent)
            self._append([{"job": self.job}])
        if self._processes.main:
            remove_leftovers(self.path.parent, f".{glob.escape(self.path.name)}.*.tmp")

    def add(self, rows: Sequence[Mapping[str, JSON]]) -> None:
        """Append rows; they are on disk when this returns."""
        # Other processes' files begin with their first row: one that had nothing to do leaves none.
        first = [] if self._size() else [{"job": self.job}]
        make_folder(self._own.parent)
        self._append([*first, *rows])
        self.rows.extend(dict(row) for row in rows)
        self._added.extend(dict(row) for row in rows)

    def gather(self, order: Callable[[Row], float]) -> None:
        """Wait for all processes, and make their files one, sorted by `order` (stable): `rows` are those of all.

        Every process must call it. Files that processes of a killed run left are taken in too.

        Raises:
            JobError: another process has ended, or does not write into the same folder.
        """
        self._processes.wait()
        others = self._others() if self._processes.main else []
        if others:
            self.rows = sorted(self._union(), key=order)
            atomic_write_bytes(self.path, b"".join(_line(row) for row in ({"job": self.job}, *self.rows)))
            for place in others:
                place.unlink(missing_ok=True)
        # Until here nobody writes: the others wait.
        self._processes.wait()
        if not self._processes.main:
            self.rows = self._read(self.path) or []
            found = {_line(row) for row in self.rows}
            if any(_line(row) not in found for row in self._added):
                raise JobError(
                    f"{self.path} lacks {self.what} that process {self._processes.index} wrote: do all processes see "
                    "the same folder? Give one that every machine shares."
                )
        self._added.clear()

    def _others(self) -> list[Path]:
        """Files of processes other than the first, this run's or a killed one's, in order."""
        numbered = re.compile(rf"{re.escape(self.path.name)}\.p([1-9]\d*)")
        found = [(numbered.fullmatch(place.name), place) for place in self.path.parent.glob("*.p*")]
        return [place for _, place in sorted((int(match[1]), place) for match, place in found if match)]

    def _union(self) -> list[Row]:
        """Rows of all files; one that is in two (a run killed while it gathered) once."""
        # The others first: a file that is gathered meanwhile is in the main one by then.
        others = [row for place in self._others() for row in self._read(place) or []]
        rows = self._read(self.path) or []
        known = {_line(row) for row in rows} if others else set[bytes]()
        for row in others:
            if (line := _line(row)) not in known:
                known.add(line)
                rows.append(row)
        return rows

    def _read(self, place: Path) -> list[Row] | None:
        """Whole rows of a file of this job; None where there is no such file."""
        try:
            data = place.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise JobError(f"cannot read {place}: {error}. Choose another file.") from error
        whole = data[: data.rfind(b"\n") + 1]
        if not whole and not _line({"job": self.job}).startswith(data):
            raise self.broken(ValueError("no line of it is whole"), place)
        try:
            found = [cast("Row", json.loads(line)) for line in whole.split(b"\n")[:-1]]
            job = cast("dict[str, JSON]", found[0]["job"]) if found else self.job
            if not all(isinstance(one, dict) for one in (job, *found)):
                raise TypeError("a line is no object")
        except (ValueError, KeyError, TypeError) as error:
            raise self.broken(error, place) from error
        if job != self.job:
            raise JobError(
                f"{place} holds {self.what} of another job: {_difference(job, self.job)}. Choose another place, or "
                "delete it."
            )
        return found[1:]

    def _size(self) -> int:
        return self._own.stat().st_size if self._own.exists() else 0

    def _mend(self) -> None:
        """Cut off half a line that a killed writer left in this process's own file; its work is done again."""
        data = self._own.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            with self._own.open("r+b") as file:
                file.truncate(whole)
        if not whole:
            self._append([{"job": self.job}])

    def broken(self, error: Exception, place: Path | None = None) -> JobError:
        """The error for a row that this kind of file cannot hold."""
        return JobError(
            f"{place or self.path} is no log of {self.what} ({error!r}); choose another file, or delete it."
        )

    def _append(self, rows: Sequence[Mapping[str, JSON]]) -> None:
        data = b""
        for row in rows:
            try:
                data += _line(row)
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"{self.path} cannot hold {row.get('id', 'the job')!r}: {error}; use plain JSON."
                ) from error
        size = self._size()
        try:
            with self._own.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            # Half a line in the middle of a log could never be read again.
            with contextlib.suppress(OSError):
                os.truncate(self._own, size)
            raise JobError(f"cannot write {self._own}: {error}. Free some space and run again; it resumes.") from error


def _name(path: Path, index: int) -> str:
    # Behind the ending, so that no other log can be called so.
    return f"{path.name}.p{index}"


def _line(row: Mapping[str, JSON]) -> bytes:
    return f"{json.dumps(row, allow_nan=False)}\n".encode()


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
