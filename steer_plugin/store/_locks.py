"""Who may write: the kernel's locks on files of the folder, which it lets go when their process dies, however it dies.

    .lock            held as long as a writer lives; by one process alone, or by all ranks of a job together
    .lock-rank-K     held as long as the writer of rank K lives
    .lock-manifest   held by one of several ranks while it reads, changes and writes the manifest

Some network file systems know no locks, or know them on one node only. Writers work there as well, unguarded: a rank
lists its own shards again when another's update has lost them; at worst some rows are asked for again by the next run.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from steer_plugin.errors import JobError

if sys.platform != "win32":
    import fcntl

LOCK = ".lock"


class Locks:
    """The locks of one writer; raises JobError, naming the folder, when another process holds one of them."""

    def __init__(self, out: Path, rank: int, ranks: int) -> None:
        self._out, self._ranks = out, ranks
        self._held: list[IO[bytes]] = []
        who = f"Another process is writing to {out}"
        try:
            self._hold(LOCK, who, shared=ranks > 1)
            if ranks > 1:
                self._hold(f"{LOCK}-rank-{rank}", f"{who} as rank {rank}")
                for path in sorted(out.glob(f"{LOCK}-rank-*")):
                    number = path.name.rpartition("-")[2]
                    if number.isdecimal() and int(number) >= ranks:
                        # Shared: the other ranks look as well, perhaps right now.
                        self._hold(path.name, f"{who} as rank {number}, of a run with more of them", shared=True)
                        self._held.pop().close()
        except BaseException:
            self.release()
            raise

    @property
    def held(self) -> bool:
        """Whether they are held."""
        return bool(self._held)

    @contextmanager
    def updating(self) -> Generator[None, None, None]:
        """Keep other ranks from the manifest for the length of a block."""
        if self._ranks == 1:
            yield
            return
        with self._open(f"{LOCK}-manifest") as file:
            _flock(file, shared=False, wait=True)
            yield

    def release(self) -> None:
        """Let go of all."""
        while self._held:
            self._held.pop().close()

    def _hold(self, name: str, refusal: str, shared: bool = False) -> None:
        file = self._open(name)
        self._held.append(file)
        if not _flock(file, shared, wait=False):
            raise JobError(
                f"{refusal}: two writers would double its rows. Wait for it, end it, or choose another output folder."
            )

    def _open(self, name: str) -> IO[bytes]:
        try:
            return (self._out / name).open("a+b")  # for both: NFS gives shared locks on what may be read only
        except OSError as error:
            raise JobError(
                f"Cannot write to {self._out} ({error.strerror}). Choose a folder that you may write to."
            ) from error


def _flock(file: IO[bytes], shared: bool, wait: bool) -> bool:
    """Lock a file; False when another process holds it. Where there are no locks, it counts as locked."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
