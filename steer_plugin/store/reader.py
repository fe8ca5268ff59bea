"""Reading rows back: tensor(name)[k] belongs to ids[k] and rows[k], whatever the shards; a selection is a store again.

    store[10:20]                                        some samples: slices, numbers, a mask, ids
    store.tensor("resid_post.14", positions=-1)         of one site the last position: nothing else is read
    store.ragged("resid_post.14"), store.padded(...)    rows that have their own number of tokens

Shards are memory-mapped, and verified (size, sha256) once, when first read: opening a store of any size is quick. That
reads a shard whole, once; with `verify=False` only its size is looked at, and a slice reads its own bytes alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from numpy.typing import NDArray
from torch import Tensor

from steer_plugin.atomic import JSON
from steer_plugin.errors import InputError, JobError, SiteError, nearest
from steer_plugin.sites import Site
from steer_plugin.store._rows import OFFSETS
from steer_plugin.store._selection import Selection, chosen
from steer_plugin.store._slices import OpenFile, Pick, Positions, opened, picks_of, put, shape_of, taken
from steer_plugin.store.manifest import Manifest, read_manifest
from steer_plugin.store.shard import Damage, Kind, Layout, Shard, damages

if TYPE_CHECKING:
    from datasets import Dataset
else:
    Dataset = object  # optional; run-time type checkers look the name up

Numbers: TypeAlias = "NDArray[np.int64]"


class ShardStore:
    """The rows that ShardWriters wrote, in the job's order, else in that of writing: `ShardStore.open(out)`.

    Attributes:
        folder: where it lies.
        manifest: what is listed there.
        numbers: (row,) the number of each row among the rows of all shards.
        verifies: whether the sha256 of a shard is taken before it is first read.
    """

    def __init__(self, folder: Path, manifest: Manifest, numbers: Numbers, verifies: bool = True) -> None:
        self.folder, self.manifest, self.numbers, self.verifies = folder, manifest, numbers, verifies
        self._verified: set[str] = set()

    @classmethod
    def open(cls, out: Path, partial_ok: bool = False, *, verify: bool = True) -> ShardStore:
        """Open a store, without reading its shards.

        `verify` takes the sha256 of a shard before it is first read. Raises ArtefactError when there is no store or its
        manifest is damaged; JobError when the job has not come to its end, unless `partial_ok`.
        """
        out = Path(out)
        manifest = read_manifest(out)
        if not manifest.complete and not partial_ok:
            wanted = f" of {len(manifest.order.ids)}" if manifest.order is not None else ""
            raise JobError(
                f"The job in {out} is not finished ({manifest.rows}{wanted} rows so far). Run the same command again: "
                "it goes on where it stopped; or open it with partial_ok=True."
            )
        numbers = np.arange(manifest.rows, dtype=np.int64)
        if manifest.order is not None:
            places = [place for shard in manifest.shards for place in shard.places or ()]
            numbers = np.argsort(np.array(places, dtype=np.int64), kind="stable")
        return cls(out, manifest, numbers, verify)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def complete(self) -> bool:
        """Whether the job came to its end."""
        return self.manifest.complete

    @property
    def job(self) -> dict[str, JSON]:
        """The job description."""
        return dict(self.manifest.job)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The files, as they are listed: names, sizes, sha256."""
        return self.manifest.shards

    @property
    def layout(self) -> Layout:
        """The kind of each tensor by name: dtype, shape behind the row (and token) axis, whether it is ragged."""
        return dict(sorted(self.shards[0].layout.items())) if self.shards else {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors, sorted."""
        return tuple(self.layout)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites among the names, in the order of execution: `tensor(str(site))` is what was read there."""
        found: list[Site] = []
        for name in self.names:
            try:
                found.append(Site.parse(name))
            except SiteError:
                continue
        return tuple(sorted(found, key=lambda site: site.order))

    @property
    def ids(self) -> list[str]:
        """The ids of the rows."""
        return list(self._ids)

    @cached_property
    def _ids(self) -> tuple[str, ...]:
        every = [row for shard in self.shards for row in shard.ids]
        return tuple(every[k] for k in self.numbers)

    @property
    def rows(self) -> list[dict[str, JSON]]:
        """The metadata of the rows; raises ArtefactError naming a damaged shard."""
        found: list[dict[str, JSON]] = [{} for _ in self.numbers]
        for places, rows in self.scan():
            for place, row in zip(places, rows, strict=True):
                found[place] = row
        return found

    def scan(self) -> Iterator[tuple[list[int], list[dict[str, JSON]]]]:
        """Yield the metadata shard by shard, each with the places of its rows: all of it need not be in memory."""
        for shard, local, places in self._visits():
            with self._opened(shard) as file:
                rows = cast("list[dict[str, JSON]]", json.loads(file.metadata()["rows"]))
            yield places.tolist(), [rows[k] for k in local]

    def tensor(
        self,
        name: str,
        rows: slice | Selection | None = None,
        *,
        positions: Positions = None,
        dtype: torch.dtype | None = None,
    ) -> Shaped[Tensor, "row ..."]:
        """Read one tensor: (row, ...), in the order of `ids`, with its dtype as it was written or in `dtype`.

        `positions` index the axis behind the row as in NumPy: an integer, which drops the axis, a slice or a list; a
        tuple of them for several axes. Where the tensor is ragged, they are integers, and count in each row's tokens:
        -1 is its last. Raises InputError for an unknown name, a row or position out of range, or a ragged tensor
        without positions; ArtefactError naming a damaged shard.
        """
        if rows is not None:
            return self[rows].tensor(name, positions=positions, dtype=dtype)
        kind = self._kind(name)
        if kind.ragged:
            return self._tokens(name, kind, positions, dtype)
        picks = picks_of(positions, kind.shape, f"tensor {name!r}")
        result = torch.empty((len(self), *shape_of(picks)), dtype=dtype or kind.torch_dtype)
        for shard, local, places in self._visits():
            with self._opened(shard) as file:
                put(result, places, taken(file, name, (Pick.numbers(local), *picks)))
        return result

    def ragged(
        self, name: str, rows: slice | Selection | None = None, *, positions: Positions = None
    ) -> list[Shaped[Tensor, "token ..."]]:
        """Read one ragged tensor: for each row (token, ...), all of its tokens or the slice `positions` of them.

        Raises InputError for an unknown name or one that is not ragged; ArtefactError naming a damaged shard.
        """
        if rows is not None:
            return self[rows].ragged(name, positions=positions)
        kind = self._kind(name, ragged=True)
        found: list[Tensor] = [torch.empty(0)] * len(self)
        for place, start, stop, file in self._spans(name):
            what = f"tensor {name!r} of row {self._ids[place]!r}"
            first, *rest = picks_of(positions, (stop - start, *kind.shape), what)
            found[place] = taken(file, name, (first.moved(start), *rest)).clone()
        return found

    def padded(
        self, name: str, rows: slice | Selection | None = None, *, side: Literal["right", "left"] = "right"
    ) -> tuple[Shaped[Tensor, "row pos ..."], Bool[Tensor, "row pos"]]:
        """Read one ragged tensor as (row, pos, ...) with zeros on one side, and the mask (row, pos) of its tokens.

        Raises as `ragged`, and InputError for another side.
        """
        if side not in ("right", "left"):
            raise InputError(f"side is {side!r}, expected 'right' or 'left'.{nearest(side, ('right', 'left'))}")
        if rows is not None:
            return self[rows].padded(name, side=side)
        kind = self._kind(name, ragged=True)
        lengths, picks = self.lengths(name), picks_of(None, kind.shape, name)
        width = int(lengths.max()) if len(lengths) else 0
        result = torch.zeros((len(self), width, *kind.shape), dtype=kind.torch_dtype)
        for place, start, stop, file in self._spans(name):
            left = width - (stop - start) if side == "left" else 0
            result[place, left : left + stop - start] = taken(file, name, (Pick(start, stop), *picks))
        places = torch.arange(width).expand(len(self), width)
        mask = places < lengths[:, None] if side == "right" else places >= width - lengths[:, None]
        return result, mask

    def lengths(self, name: str) -> Int[Tensor, " row"]:
        """Return the number of tokens of each row of a ragged tensor; raises as `ragged`."""
        self._kind(name, ragged=True)
        result = torch.zeros(len(self), dtype=torch.int64)
        for place, start, stop, _ in self._spans(name):
            result[place] = stop - start
        return result

    def __getitem__(self, which: slice | Selection) -> ShardStore:
        """Return the store of some rows, as `select`; a slice of them, too."""
        return self._some(self.numbers[which]) if isinstance(which, slice) else self.select(which)

    def select(self, which: Selection) -> ShardStore:
        """Return the store of some rows: a mask of len(self) booleans, row numbers in any order, or ids.

        Negative numbers count from the end. Raises InputError for a mask of another length, a number out of range or an
        unknown id.
        """
        return self._some(self.numbers[chosen(which, len(self), lambda: self._ids, self.folder)])

    def verify(self, progress: bool = True) -> tuple[Damage, ...]:
        """Read all shards, and return those that are damaged: file, reason, ids of the rows."""
        found = damages(self.folder, self.shards, progress)
        self._verified.update({shard.file for shard in self.shards} - {damage.file for damage in found})
        return found

    def to_dataset(self, names: Sequence[str] | None = None, cache_dir: Path | str | None = None) -> Dataset:
        """Return a `datasets.Dataset`: "id", a column per key of the metadata, and per tensor (all, or `names`).

        It is streamed into the cache of `datasets`, so memory stays flat. bfloat16 becomes float32, nested metadata
        JSON text. Raises InputError for an unknown name, columns of one name or a tensor that has no column type;
        FrameworkError without `datasets`.
        """
        from steer_plugin.store.dataset import to_dataset

        return to_dataset(self, self.names if names is None else names, cache_dir)

    def _some(self, numbers: Numbers) -> ShardStore:
        store = ShardStore(self.folder, self.manifest, numbers, self.verifies)
        store._verified = self._verified  # shared: a shard is verified once
        return store

    def _kind(self, name: str, ragged: bool = False) -> Kind:
        if name not in self.names:
            known = ", ".join(self.names) or "nothing: it has no rows"
            raise InputError(f"{self.folder} holds no tensor {name!r}, it holds {known}.{nearest(name, self.names)}")
        kind = self.layout[name]
        if ragged and not kind.ragged:
            raise InputError(f"Tensor {name!r} is not ragged: its rows are {kind.shape}. Read it with tensor().")
        return kind

    def _tokens(
        self, name: str, kind: Kind, positions: Positions, dtype: torch.dtype | None
    ) -> Shaped[Tensor, "row ..."]:
        first, *rest = (positions or (None,)) if isinstance(positions, tuple) else (positions,)
        if first is None or isinstance(first, slice):
            raise InputError(
                f"Tensor {name!r} is ragged: its rows have their own number of tokens. Read it with ragged() or "
                "padded(), or give integers as positions."
            )
        picks = picks_of(tuple(rest), kind.shape, f"tensor {name!r}")
        count = (len(first),) if isinstance(first, list) else ()
        result = torch.empty((len(self), *count, *shape_of(picks)), dtype=dtype or kind.torch_dtype)
        for place, start, stop, file in self._spans(name):
            token = Pick.of(first, stop - start, f"tensor {name!r} of row {self._ids[place]!r}").moved(start)
            result[place] = taken(file, name, (token, *picks))
        return result

    def _spans(self, name: str) -> Iterator[tuple[int, int, int, OpenFile]]:
        """Yield, for each row, its place, where its tokens start and stop, and the file that has them."""
        for shard, local, places in self._visits():
            with self._opened(shard) as file:
                offsets = taken(file, name + OFFSETS, (Pick(0, len(shard.ids) + 1),)).tolist()
                for k, place in zip(local.tolist(), places.tolist(), strict=True):
                    yield place, offsets[k], offsets[k + 1], file

    def _visits(self) -> Iterator[tuple[Shard, Numbers, Numbers]]:
        """Yield each shard that is needed, with the rows to take from it and the places where they go."""
        starts = np.cumsum([0, *(len(shard.ids) for shard in self.shards)])
        which = np.searchsorted(starts, self.numbers, side="right") - 1
        by_shard = np.argsort(which, kind="stable")
        edges = np.searchsorted(which[by_shard], np.arange(len(self.shards) + 1))
        for k, shard in enumerate(self.shards):
            places = by_shard[edges[k] : edges[k + 1]]
            if len(places):
                yield shard, self.numbers[places] - starts[k], places

    def _opened(self, shard: Shard) -> AbstractContextManager[OpenFile]:
        if shard.file not in self._verified:
            shard.check(self.folder, content=self.verifies)
            self._verified.add(shard.file)
        return opened(self.folder, shard)
