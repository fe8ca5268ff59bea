"""The manifest as one writer keeps it: read, changed and written in one step between those of other ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from steer_plugin.artefact import versions
from steer_plugin.atomic import JSON
from steer_plugin.errors import InputError, JobError
from steer_plugin.store._folder import remove_unlisted, signature
from steer_plugin.store._locks import Locks
from steer_plugin.store.manifest import (
    MANIFEST,
    Manifest,
    differences,
    order_difference,
    read_manifest,
    with_places,
    write_manifest,
)
from steer_plugin.store.order import Order
from steer_plugin.store.shard import Damage, Shard, damages

VERIFY_BAR = 2**30  # bytes to verify from which on a bar shows progress


class Listing:
    """What is listed in a folder, by this writer and by other ranks; for one thread at a time."""

    def __init__(self, out: Path, job: Mapping[str, JSON], order: Order | None, locks: Locks) -> None:
        self._out, self._job, self._order, self._locks = out, job, order, locks
        self._now = Manifest(job, False, ())
        self._seen: tuple[int, ...] = ()
        self._own: list[Shard] = []  # what this writer added
        self._elsewhere: set[str] = set()  # ids that other ranks listed since it began

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The listed shards, as last seen."""
        return self._now.shards

    @property
    def ids(self) -> set[str]:
        """The ids of the listed rows, as last seen."""
        return {row for shard in self._now.shards for row in shard.ids}

    def begin(self, rank: int, ranks: int) -> tuple[tuple[Shard, ...], tuple[Damage, ...]]:
        """Start a manifest or take up the one that is there; return the shards it listed and the damage among them.

        Damaged shards are dropped. Raises JobError for another job or order.
        """
        with self._locks.updating():
            if (self._out / MANIFEST).exists():
                self.reload()
                self._refuse_other_job()
            if self._order is not None:
                self._order.write(self._out)
            if not self._seen:
                self._save(Manifest(self._job, self._finished((), asked=False), (), self._order, _versions()))
        listed = self._now.shards
        # Not under the lock: it reads every byte.
        found = damages(self._out, listed, progress=rank == 0 and sum(one.bytes for one in listed) >= VERIFY_BAR)
        lost = {damage.file for damage in found}
        self._change(drop=[shard for shard in listed if shard.file in lost], complete=self._now.complete)
        self._elsewhere.clear()
        with self._locks.updating():
            self.reload()
            remove_unlisted(self._out, self._now.shards, rank, ranks)
        return listed, found

    def add(self, shard: Shard) -> None:
        """List one more shard; raises JobError when it cannot be written or another process has written its rows."""
        self._change(add=shard)

    def complete(self) -> None:
        """Mark the job as done; with an order, if all of its ids are listed."""
        self._change(complete=True)

    def reload(self) -> None:
        """Read the manifest again if it is another than the one last seen."""
        seen = signature(self._out / MANIFEST)
        if seen == self._seen:
            return
        there = read_manifest(self._out, self._order, self._now.shards)
        known = {shard.key for shard in (*self._now.shards, *self._own)}
        self._elsewhere.update(row for shard in there.shards if shard.key not in known for row in shard.ids)
        self._now, self._seen = there, seen

    def _change(self, add: Shard | None = None, drop: Sequence[Shard] = (), complete: bool = False) -> None:
        with self._locks.updating():
            self.reload()
            if add is not None and not self._elsewhere.isdisjoint(add.ids):
                row = next(row for row in add.ids if row in self._elsewhere)
                raise JobError(
                    f"Row {row!r} was meanwhile written to {self._out} by another process: ranks must not share ids. "
                    "End the other run, or give each rank its own part of the order."
                )
            if add is not None and self.shards and self.shards[0].layout != add.layout:
                raise InputError(
                    f"The tensors are {add.layout}, but another process wrote {self.shards[0].layout} to {self._out} "
                    "(name: dtype, trailing shape). Give all ranks the same model and dtype."
                )
            gone = {shard.key for shard in drop}
            shards = [shard for shard in self._now.shards if shard.key not in gone]
            keys = {shard.key for shard in shards}
            # Where locks do not hold, another rank's update may have lost some.
            shards += [shard for shard in self._own if shard.key not in keys]
            shards += [add] if add is not None else []
            if self._order is not None:
                shards = [with_places(shard, self._order) for shard in shards]
            finished = self._finished(shards, asked=complete and not drop)
            new = Manifest(self._now.job, finished, tuple(shards), self._order, self._now.versions)
            if new != self._now:
                self._save(new)
            if add is not None:
                self._own.append(add)

    def _finished(self, shards: Sequence[Shard], asked: bool) -> bool:
        return asked if self._order is None else sum(len(shard.ids) for shard in shards) == len(self._order.ids)

    def _refuse_other_job(self) -> None:
        differing = list(differences(self._now.job, self._job))
        other = order_difference(self._now, self._order)
        differing += [other] if other is not None else []
        if differing:
            raise JobError(
                f"{self._out} holds another job: {'; '.join(differing)}. Choose another output folder (--out), or "
                "delete this one to start anew."
            )

    def _save(self, manifest: Manifest) -> None:
        write_manifest(self._out, manifest)
        self._now, self._seen = manifest, signature(self._out / MANIFEST)


@cache
def _versions() -> dict[str, str]:
    # Looked up on disk, package by package; they do not change while the process lives.
    return versions()
