"""Writing rows, resumably: buffer -> shard file -> manifest, each step whole or not at all.

A shard is renamed into place before the manifest that lists it. Killed before the manifest's rename, the rows were
never written; killed after it, they are in `done`: at no moment is a row lost that was on disk, or on disk twice.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import cast

from jaxtyping import Shaped
from torch import Tensor

from steer_plugin.artefact import sha256
from steer_plugin.atomic import JSON, atomic_write_bytes, json_bytes, make_folder
from steer_plugin.errors import InputError, JobError, SteeringError
from steer_plugin.store._background import Background
from steer_plugin.store._folder import refuse_foreign
from steer_plugin.store._listing import Listing
from steer_plugin.store._locks import Locks
from steer_plugin.store._rows import Buffer, Rows, rows_of
from steer_plugin.store.order import Order
from steer_plugin.store.shard import Layout, Shard, number_of, shard_name

WAITING = 2  # shards in memory besides the one that fills: one is being written, one waits


class ShardWriter:
    """Appends rows to a folder, or goes on where a killed run of the same job stopped.

    `job` describes everything that decides the numbers (model, site, positions, data set, dtype ...): a folder that
    holds another job is refused. `order`, the ids of the whole job, is the order of reading, whatever that of writing.
    Several processes may write one job, each as its `rank` of `ranks` and each with other ids of the order; locks see
    to it (where a file system has none, see `_locks`), and a later run may have any other number of ranks.

    Use it as a context manager: an exception or Ctrl-C writes what is buffered and leaves the folder resumable; leaving
    normally completes the store; with an order, once all of its ids are there. Shards are cut at `shard_rows` rows or
    `shard_bytes` bytes and, in the `background`, written by one thread, at most two of them in memory besides the one
    that fills. At the start all listed shards are verified: a damaged one is named in a warning and dropped.

    Attributes:
        out: the folder.
        done: the ids that need no more computing: on disk, by whichever rank, or handed over for it.

    Raises:
        InputError: an order whose ids repeat; ranks without an order; a rank or size out of range.
        JobError: another job or order, a folder without a manifest that is not empty, another writer, a full disk.
    """

    def __init__(
        self,
        out: Path,
        job: Mapping[str, JSON],
        shard_rows: int = 256,
        *,
        order: Sequence[str] | None = None,
        rank: int = 0,
        ranks: int = 1,
        background: bool = True,
        shard_bytes: int = 2**28,
    ) -> None:
        _check_arguments(shard_rows, shard_bytes, rank, ranks, order is not None)
        self.out = Path(out)
        self.done: set[str] = set()
        self._job = cast("dict[str, JSON]", json.loads(json_bytes(job, "the job description")))
        self._order = None if order is None else Order(tuple(order))
        self._rank, self._ranks = rank, ranks
        self._buffer = Buffer(shard_rows, shard_bytes)
        self._layout: Layout | None = None
        self._number = 0
        make_folder(self.out)
        refuse_foreign(self.out)
        self._locks = Locks(self.out, rank, ranks)
        self._listing = Listing(self.out, self._job, self._order, self._locks)
        try:
            self._resume()
        except BaseException:
            self._locks.release()
            raise
        self._background = Background(self._write, WAITING if background else 0)

    def append(
        self,
        ids: Sequence[str],
        tensors: Mapping[str, Shaped[Tensor, "row ..."] | Sequence[Tensor]],
        rows: Sequence[Mapping[str, JSON]] | None = None,
    ) -> None:
        """Buffer rows, and hand over a shard whenever there are enough.

        Each tensor is (row, ...), or ragged: a sequence of (token, ...), one per row. Names, dtypes and trailing shapes
        are the same in every call; `rows` is one JSON object per row. The tensors are copied to the CPU. Raises
        InputError for a duplicate id, an id outside the order or a tensor that does not fit: nothing of the call is
        taken; JobError when the writer is closed or a shard, of now or before, cannot be written: its rows are buffered
        again and not in `done`.
        """
        if not self._locks.held:
            raise JobError(f"The writer of {self.out} is closed. Open a new ShardWriter to go on.")
        self._refuse_known(ids)
        new = rows_of(ids, tensors, rows)
        if new.ids:
            self._refuse_other_layout(new.layout)
            self._buffer.add(new)
        with self._recovering():
            self._background.check()
            while self._buffer.full:
                self._hand_over()

    @property
    def buffered(self) -> int:
        """The number of rows that were not handed over yet."""
        return len(self._buffer)

    def flush(self) -> None:
        """Write what is buffered, however little, and wait for it; raises JobError when it cannot be written."""
        with self._recovering():
            while len(self._buffer):
                self._hand_over()
            self._background.wait()

    def close(self) -> None:
        """Write what is buffered, complete the store and let go of the folder; closing twice does nothing.

        With an order, the store is complete once all its ids are listed: the last of several ranks completes it.
        Raises JobError when something cannot be written: then the writer is still open.
        """
        if self._locks.held:
            self.flush()
            self._listing.complete()
            self._release()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self.close()
            except BaseException:
                self._rescue()
                raise
        else:
            self._rescue()

    def _rescue(self) -> None:
        try:
            # The exception under way tells more than a disk that is still full; rows not written are asked for again.
            with contextlib.suppress(SteeringError):
                self._recover()
                self.flush()
        finally:
            self._release()

    def _release(self) -> None:
        try:
            self._background.stop()
        finally:
            self._locks.release()

    def _resume(self) -> None:
        listed, found = self._listing.begin(self._rank, self._ranks)
        self.done.update(self._listing.ids)
        series = self._rank if self._ranks > 1 else None
        self._number = max((number_of(shard.file, series) for shard in listed), default=-1) + 1
        if self._listing.shards:
            self._layout = self._listing.shards[0].layout
        if found:
            warnings.warn(
                f"{self.out} has {len(found)} damaged shards, which were dropped: {'; '.join(map(str, found))}. Their "
                "rows are computed anew.",
                stacklevel=3,
            )

    def _refuse_known(self, ids: Sequence[str]) -> None:
        seen: set[str] = set()
        for row in ids:
            if row in self.done or row in self._buffer.ids or row in seen:
                raise InputError(f"Row {row!r} is already in {self.out}: ids are unique. Skip those in `writer.done`.")
            seen.add(row)
        if self._order is not None:
            self._order.places_of(ids)

    def _refuse_other_layout(self, layout: Layout) -> None:
        self._layout = layout if self._layout is None else self._layout
        if layout != self._layout:
            raise InputError(
                f"The tensors are {layout}, but {self.out} holds {self._layout} (name: dtype, trailing shape). "
                "Convert them, or write to another folder."
            )

    def _hand_over(self) -> None:
        self._background.make_room()
        rows = self._buffer.first()
        self._background.put(rows)
        self.done.update(rows.ids)
        self._buffer.drop(len(rows.ids))

    @contextlib.contextmanager
    def _recovering(self) -> Generator[None, None, None]:
        try:
            yield
        except BaseException:
            self._recover()
            raise

    def _recover(self) -> None:
        """Believe the disk, not the memory: an error or Ctrl-C may strike on either side of the manifest's rename."""
        waiting = self._background.take_back()
        self._listing.reload()
        listed = self._listing.ids
        self.done.intersection_update(listed)
        self.done.update(listed)
        self._buffer.refill(waiting, without=listed)

    def _write(self, rows: Rows) -> None:
        """Write one shard: in the background's thread, or in the caller's while nothing is under way there."""
        data = rows.encode()
        file = shard_name(self._number, self._rank if self._ranks > 1 else None)
        self._number += 1
        places = None if self._order is None else self._order.places_of(rows.ids)
        atomic_write_bytes(self.out / file, data)
        try:
            self._listing.add(Shard(file, len(data), sha256(data), tuple(rows.ids), rows.layout, places))
        except SteeringError:
            (self.out / file).unlink(missing_ok=True)
            raise


def _check_arguments(shard_rows: int, shard_bytes: int, rank: int, ranks: int, ordered: bool) -> None:
    if shard_rows < 1:
        raise InputError(f"shard_rows is {shard_rows}: expected at least 1 row per shard, 256 is a good start.")
    if shard_bytes < 1:
        raise InputError(f"shard_bytes is {shard_bytes}: expected at least 1, {2**28} is a good start.")
    if not 0 <= rank < ranks:
        raise InputError(f"The writer is rank {rank} of {ranks}: expected 0 to {ranks - 1}.")
    if ranks > 1 and not ordered:
        raise InputError(f"{ranks} ranks write one store: give order=, the ids of the whole job, to each of them.")
