"""Mending a store: damaged shards are no longer listed, so the same job computes their rows again, and no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from steer_plugin.store._locks import Locks
from steer_plugin.store.manifest import read_manifest, write_manifest
from steer_plugin.store.shard import Damage, damages


def drop_damaged(out: Path, progress: bool = True) -> tuple[Damage, ...]:
    """Take damaged shards off the manifest, and return what was wrong; the next run of the job removes their files.

    Raises ArtefactError when there is no store, JobError while another process writes to it.
    """
    read_manifest(out)
    locks = Locks(out, 0, 1)
    try:
        manifest = read_manifest(out)
        found = damages(out, manifest.shards, progress)
        lost = {damage.file for damage in found}
        if lost:
            kept = tuple(shard for shard in manifest.shards if shard.file not in lost)
            write_manifest(out, replace(manifest, complete=False, shards=kept))
    finally:
        locks.release()
    return found
