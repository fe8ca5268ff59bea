"""The manifest of a store: what the job is, and which shard files hold which rows. A row exists only if it is listed.

manifest.json: {format, complete, rows, job, job_sha256, versions, order: {file, sha256, rows} or null, shards: [shard]}
shard:         {file, bytes, sha256, rows, ids or places, tensors: {name: {dtype, shape, ragged?}}}

`shape` leaves out the row axis, and the token axis where `ragged`. With an order, shards list places in it, not ids.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from steer_plugin.artefact import sha256
from steer_plugin.atomic import JSON, atomic_write_bytes
from steer_plugin.errors import ArtefactError
from steer_plugin.store.order import ORDER, Order
from steer_plugin.store.shard import Kind, Shard, is_shard, shard_name

FORMAT = 2
READABLE = (1, 2)  # 1 knew neither orders nor ragged tensors
MANIFEST = "manifest.json"

_MISSING = "<missing>"


@dataclass(frozen=True)
class Manifest:
    """The job description, whether the job came to its end, the shards as they were written, the order of the rows."""

    job: Mapping[str, JSON]
    complete: bool
    shards: tuple[Shard, ...]
    order: Order | None = None
    versions: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def rows(self) -> int:
        """The number of rows that are listed."""
        return sum(len(shard.ids) for shard in self.shards)


def job_digest(job: Mapping[str, JSON]) -> str:
    """Return the sha256 of a job description, whatever the order of its keys."""
    return sha256(json.dumps(job, sort_keys=True).encode())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically; raises JobError when the disk is full or the folder cannot be written."""
    order = manifest.order
    value: dict[str, JSON] = {
        "format": FORMAT,
        "complete": manifest.complete,
        "rows": manifest.rows,
        "job": manifest.job,
        "job_sha256": job_digest(manifest.job),
        "versions": manifest.versions,
        "order": None if order is None else {"file": ORDER, "sha256": order.sha256, "rows": len(order.ids)},
    }
    # A line per shard, which the shard keeps: with thousands of them, encoding all again for each new one is slow.
    head = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    text = f'{head},\n "shards": [\n  ' + ",\n  ".join(shard.line for shard in manifest.shards) + "\n ]\n}\n"
    atomic_write_bytes(folder / MANIFEST, text.encode())


def read_manifest(folder: Path, order: Order | None = None, known: Collection[Shard] = ()) -> Manifest:
    """Read the manifest of a store; `order` and `known` shards, where they are the listed ones, need not be read again.

    Raises ArtefactError when it or the order is missing, altered or of a newer format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtefactError(f"{folder} holds no {MANIFEST}: no store was written there. Give the --out of the job.")
    try:
        value = cast("dict[str, JSON]", json.loads(path.read_bytes()))
        number = value["format"]
        if number not in READABLE:
            raise ArtefactError(f"{path} has format {number!r}, this version reads up to {FORMAT}. Upgrade it.")
        job = cast("Mapping[str, JSON]", value["job"])
        if job_digest(job) != value["job_sha256"]:
            raise ArtefactError(f"{path}: the job was edited by hand. Undo the edit, or write to a new folder.")
        entry = cast("Mapping[str, JSON] | None", value.get("order"))
        found = None if entry is None else _order(folder, str(entry["sha256"]), order)
        same = {(shard.file, shard.sha256): shard for shard in known}
        shards = tuple(_shard(one, path, found, same) for one in cast("list[dict[str, JSON]]", value["shards"]))
        versions = cast("Mapping[str, str]", value.get("versions") or {})
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(
            f"{path} is not a manifest of steer_plugin ({error!r}): truncated or altered. "
            "Delete the folder and run the job again."
        ) from error
    return Manifest(job, value.get("complete") is True, shards, found, versions)


def differences(old: Mapping[str, JSON], new: Mapping[str, JSON], above: str = "") -> Iterator[str]:
    """Yield "key: there old, asked for new" for every key, nested ones dotted, whose values differ."""
    for key in sorted({*old, *new}):
        there, asked = old.get(key, _MISSING), new.get(key, _MISSING)
        if isinstance(there, Mapping) and isinstance(asked, Mapping):
            yield from differences(there, asked, f"{above}{key}.")
        elif json.dumps(there, sort_keys=True) != json.dumps(asked, sort_keys=True):
            yield f"{above}{key}: there {there!r}, asked for {asked!r}"


def order_difference(there: Manifest, asked: Order | None) -> str | None:
    """Say how the order that is asked for differs from the one that is there; rows without an order may get one."""
    if there.order is None:
        if asked is not None:
            strange = next((row for shard in there.shards for row in shard.ids if row not in asked.places), None)
            if strange is not None:
                return f"order: there row {strange!r}, asked for {len(asked.ids)} ids without it"
        return None
    if asked is None or there.order.ids != asked.ids:
        wanted = "none" if asked is None else f"{len(asked.ids)} ids"
        return f"order: there {len(there.order.ids)} ids, asked for {wanted}, which are others or in another order"
    return None


def _order(folder: Path, digest: str, known: Order | None) -> Order:
    return known if known is not None and known.sha256 == digest else Order.read(folder, digest)


def _shard(entry: Mapping[str, JSON], path: Path, order: Order | None, known: Mapping[tuple[str, str], Shard]) -> Shard:
    file, digest = str(entry["file"]), str(entry["sha256"]) if "sha256" in entry else ""
    if (file, digest) in known:
        return known[file, digest]
    if not is_shard(file):
        raise ArtefactError(f"{path} lists the file {file!r}, expected names such as {shard_name(0)}. It was altered.")
    layout = {
        name: Kind(str(one["dtype"]), tuple(cast("list[int]", one["shape"])), one.get("ragged") is True)
        for name, one in cast("Mapping[str, Mapping[str, JSON]]", entry["tensors"]).items()
    }
    if order is None:
        ids, places = tuple(cast("list[str]", entry["ids"])), None
    else:
        places = tuple(cast("list[int]", entry["places"]))
        ids = tuple(order.ids[place] for place in places)
    return Shard(file, cast("int", entry["bytes"]), digest, ids, layout, places)


def with_places(shard: Shard, order: Order) -> Shard:
    """Return a shard that was written without an order, with the places of its rows; raises InputError for others."""
    if shard.places is not None:
        return shard
    return Shard(shard.file, shard.bytes, shard.sha256, shard.ids, shard.layout, order.places_of(shard.ids))
