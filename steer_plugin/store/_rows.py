"""Rows in memory on their way to a shard: they are cut and merged so that each is copied once.

A tensor of a shard is (row, ...). A ragged one, whose rows have their own number of tokens, is (token, ...) with the
rows behind each other; beside it stands "<name>#offsets" (row + 1): row k is tokens offsets[k] to offsets[k + 1].
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import safetensors.torch
import torch
from jaxtyping import Shaped
from torch import Tensor

from steer_plugin.atomic import JSON, json_bytes
from steer_plugin.errors import InputError
from steer_plugin.store.shard import Kind, Layout

OFFSETS = "#offsets"


@dataclass(frozen=True)
class Column:
    """One tensor of some rows: (row, ...); or (token, ...) with offsets, row k being tokens offsets[k] to [k + 1]."""

    values: Shaped[Tensor, "token ..."]
    offsets: Sequence[int] | None = None

    @property
    def kind(self) -> Kind:
        """Its dtype and trailing shape."""
        dtype = str(self.values.dtype).removeprefix("torch.")
        return Kind(dtype, tuple(self.values.shape[1:]), self.offsets is not None)

    @property
    def item_bytes(self) -> int:
        """Bytes of one row, or of one token where ragged."""
        return self.values.element_size() * self.values.shape[1:].numel()

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each row where ragged; else nothing."""
        return [stop - start for start, stop in pairwise(self.offsets or ())]

    def part(self, start: int, stop: int) -> Column:
        """Return rows start to stop, sharing memory."""
        if self.offsets is None:
            return Column(self.values[start:stop])
        first = self.offsets[start]
        offsets = [place - first for place in self.offsets[start : stop + 1]]
        return Column(self.values[first : first + offsets[-1]], offsets)

    @staticmethod
    def merge(columns: Sequence[Column]) -> Column:
        """Put columns of one kind behind each other."""
        values = torch.cat([column.values for column in columns])
        if columns[0].offsets is None:
            return Column(values)
        return Column(values, _offsets(length for column in columns for length in column.lengths))


@dataclass(frozen=True)
class Rows:
    """Some rows: their ids, their metadata and their tensors."""

    ids: Sequence[str]
    metadata: Sequence[Mapping[str, JSON]]
    columns: Mapping[str, Column]

    @property
    def layout(self) -> Layout:
        """The kind of each tensor, by name."""
        return {name: column.kind for name, column in sorted(self.columns.items())}

    @property
    def sizes(self) -> list[int]:
        """The bytes of each row."""
        sizes = [sum(column.item_bytes for column in self.columns.values() if column.offsets is None)] * len(self.ids)
        for column in self.columns.values():
            for k, length in enumerate(column.lengths):
                sizes[k] += length * column.item_bytes
        return sizes

    def part(self, start: int, stop: int) -> Rows:
        """Return rows start to stop, sharing memory."""
        columns = {name: column.part(start, stop) for name, column in self.columns.items()}
        return Rows(self.ids[start:stop], self.metadata[start:stop], columns)

    def without(self, ids: Container[str]) -> list[Rows]:
        """Return the rows that are not among `ids`, in runs that share memory."""
        keep = [row not in ids for row in self.ids]
        edges = [k for k in range(len(keep) + 1) if (k > 0 and keep[k - 1]) != (k < len(keep) and keep[k])]
        return [self.part(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]

    def encode(self) -> bytes:
        """Encode the rows as safetensors, the metadata in its header."""
        tensors: dict[str, Tensor] = {}
        for name, column in self.columns.items():
            tensors[name] = column.values.contiguous()
            if column.offsets is not None:
                tensors[name + OFFSETS] = torch.tensor(column.offsets, dtype=torch.int64)
        header = json.dumps(list(self.metadata), ensure_ascii=False, separators=(",", ":"))
        return safetensors.torch.save(tensors, {"rows": header})

    @staticmethod
    def merge(parts: Sequence[Rows]) -> Rows:
        """Put rows of one layout behind each other."""
        ids = [row for part in parts for row in part.ids]
        metadata = [row for part in parts for row in part.metadata]
        columns = {name: Column.merge([part.columns[name] for part in parts]) for name in parts[0].columns}
        return Rows(ids, metadata, columns)


class Buffer:
    """Rows that wait for a shard of theirs: `full` once they are `rows` or have `size` bytes."""

    def __init__(self, rows: int, size: int) -> None:
        self._rows, self._size = rows, size
        self._parts: deque[Rows] = deque()
        self._sizes: deque[int] = deque()
        self._gone = 0  # rows of the first part that were dropped: cutting it anew each time would copy it each time
        self._bytes = 0
        self.ids: set[str] = set()

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def full(self) -> bool:
        """Whether there is enough for a shard."""
        return len(self._sizes) >= self._rows or self._bytes >= self._size

    def add(self, rows: Rows) -> None:
        """Put rows behind those that are there."""
        sizes = rows.sizes
        self._parts.append(rows)
        self._sizes.extend(sizes)
        self._bytes += sum(sizes)
        self.ids.update(rows.ids)

    def first(self) -> Rows:
        """Return a copy of the rows of the next shard; they stay here until they are dropped."""
        count, size = 0, 0
        for one in self._sizes:
            if count >= self._rows or size >= self._size:
                break
            count, size = count + 1, size + one
        taken: list[Rows] = []
        start = self._gone
        for part in self._parts:
            if count == 0:
                break
            taken.append(part.part(start, min(start + count, len(part.ids))))
            count, start = count - len(taken[-1].ids), 0
        return Rows.merge(taken)

    def drop(self, count: int) -> None:
        """Forget the first rows."""
        for _ in range(count):
            self._bytes -= self._sizes.popleft()
            part = self._parts[0]
            self.ids.discard(part.ids[self._gone])
            self._gone += 1
            if self._gone == len(part.ids):
                self._parts.popleft()
                self._gone = 0

    def refill(self, before: Iterable[Rows], without: Container[str]) -> None:
        """Put rows in front of those that are there; each id stays once, those in `without` go."""
        rest = [part.part(self._gone if k == 0 else 0, len(part.ids)) for k, part in enumerate(self._parts)]
        parts = [*before, *rest]
        fresh = Buffer(self._rows, self._size)
        for part in parts:
            for new in part.without(without):
                for once in new.without(fresh.ids):
                    fresh.add(once)
        self._parts, self._sizes, self._gone = fresh._parts, fresh._sizes, 0
        self._bytes, self.ids = fresh._bytes, fresh.ids


def rows_of(
    ids: Sequence[str],
    tensors: Mapping[str, Shaped[Tensor, "row ..."] | Sequence[Tensor]],
    metadata: Sequence[Mapping[str, JSON]] | None,
) -> Rows:
    """Check what a caller appends and copy it to the CPU; a sequence of tensors (token, ...), one per row, is ragged.

    Raises InputError, naming it, for what does not fit.
    """
    ids = list(ids)
    given = [{} for _ in ids] if metadata is None else [dict(row) for row in metadata]
    if len(given) != len(ids):
        raise InputError(f"Got {len(given)} rows of metadata for {len(ids)} ids: expected one per id.")
    json_bytes(given, "the metadata of the rows")
    for name, value in tensors.items():
        _check(name, value, ids)
    return Rows(ids, given, {name: _column(value) for name, value in tensors.items()} if ids else {})


def _check(name: str, value: Tensor | Sequence[Tensor], ids: Sequence[str]) -> None:
    if not name or name == "__metadata__" or name.endswith(OFFSETS):
        raise InputError(f"A tensor cannot be called {name!r}: files keep that name. Choose another.")
    if isinstance(value, Tensor):
        if value.ndim == 0 or value.shape[0] != len(ids):
            raise InputError(
                f"Tensor {name!r} has shape {tuple(value.shape)} for {len(ids)} ids: expected one row each."
            )
    elif len(value) != len(ids):
        raise InputError(f"Ragged tensor {name!r} has {len(value)} entries for {len(ids)} ids: expected one each.")
    for row, one in zip(ids, [value] * len(ids) if isinstance(value, Tensor) else value, strict=True):
        if one.layout is not torch.strided or one.is_quantized or one.is_meta:
            raise InputError(
                f"Tensor {name!r} of row {row!r} is {one.layout}, quantised: {one.is_quantized}, device {one.device}: "
                "expected a dense tensor with data. Call .to_dense() or .dequantize() on it first."
            )
        if isinstance(value, Tensor):
            return
        if one.ndim == 0 or (one.dtype, one.shape[1:]) != (value[0].dtype, value[0].shape[1:]):
            raise InputError(
                f"Ragged tensor {name!r} has {one.dtype} {tuple(one.shape)} for row {row!r} and {value[0].dtype} "
                f"{tuple(value[0].shape)} for row {ids[0]!r}: expected (token, ...) alike but for the tokens."
            )


def _column(value: Tensor | Sequence[Tensor]) -> Column:
    if isinstance(value, Tensor):
        # A copy in any case: the caller may use the memory again.
        return Column(value.detach().to("cpu", copy=True))
    return Column(torch.cat([one.detach() for one in value]).cpu(), _offsets(len(one) for one in value))


def _offsets(lengths: Iterable[int]) -> list[int]:
    return list(accumulate(lengths, initial=0))
