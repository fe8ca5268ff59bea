"""What lies in a store's folder besides what the manifest lists: leftovers of a killed writer, or somebody's files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from steer_plugin.atomic import remove_leftovers
from steer_plugin.errors import JobError
from steer_plugin.store._locks import LOCK
from steer_plugin.store.manifest import MANIFEST
from steer_plugin.store.order import ORDER
from steer_plugin.store.shard import Shard, writer_of


def refuse_foreign(out: Path) -> None:
    """Raise JobError when the folder holds no manifest but something that no writer leaves before its manifest."""
    # Looked at in this order: what another rank writes between the two comes after its manifest.
    entries = sorted(entry.name for entry in out.iterdir())
    if (out / MANIFEST).exists():
        return
    for name in entries:
        if name != ORDER and not name.startswith(LOCK) and not (name.startswith(".") and name.endswith(".tmp")):
            raise JobError(
                f"{out} is not empty ({name}, ...) and holds no {MANIFEST}, so it was not made by this program: "
                "nothing was written. Choose a new or an empty folder."
            )


def remove_unlisted(out: Path, listed: Sequence[Shard], rank: int, ranks: int) -> None:
    """Remove what killed writers left: temporary files, and shards that no manifest lists.

    Only what no other living rank can be writing: one's own; and for rank 0 that of runs with other numbers of ranks.
    To be called while other ranks are kept from the manifest.
    """
    remove_leftovers(out, f".{MANIFEST}.*.tmp", f".{ORDER}.*.tmp")
    files = {shard.file for shard in listed}
    for path in out.iterdir():
        writer = writer_of(path.name)
        if writer is not None and path.name not in files and (writer if writer < ranks else 0) == rank:
            path.unlink(missing_ok=True)


def signature(path: Path) -> tuple[int, ...]:
    """Return what tells one version of a file from another that was renamed over it; () when there is none."""
    try:
        # Opened, not looked up: network file systems ask their server only then.
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
    except FileNotFoundError:
        return ()
    return (found.st_ino, found.st_mtime_ns, found.st_size)
