"""Parts of a tensor in a memory-mapped file: what is not asked for is not read."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, SupportsIndex, TypeAlias, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Shaped
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steer_plugin.errors import ArtefactError, InputError
from steer_plugin.store.shard import Shard

Index: TypeAlias = "SupportsIndex | slice | list[int]"
Positions: TypeAlias = "Index | tuple[Index, ...] | None"


@runtime_checkable
class _Slice(Protocol):
    def __getitem__(self, where: tuple[slice, ...]) -> Tensor: ...


@runtime_checkable
class OpenFile(Protocol):
    """What safetensors leaves untyped."""

    def metadata(self) -> dict[str, str]: ...
    def get_slice(self, name: str) -> _Slice: ...


def opened(folder: Path, shard: Shard) -> AbstractContextManager[OpenFile]:
    """Map a shard's file; raises ArtefactError when it is none of safetensors."""
    try:
        return cast("AbstractContextManager[OpenFile]", safe_open(folder / shard.file, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"Shard {folder / shard.file} cannot be read: {error}. {shard.mend}") from error


@dataclass(frozen=True)
class Pick:
    """What to take along one axis: `start` to `stop`, of that what `index` says, and the axis itself if `keep`."""

    start: int
    stop: int
    index: Shaped[NDArray[np.int64], " any"] | None = None
    keep: bool = True

    @property
    def size(self) -> int:
        """The number of entries."""
        return self.stop - self.start if self.index is None else len(self.index)

    def moved(self, by: int) -> Pick:
        """The same, counted from another start."""
        return replace(self, start=self.start + by, stop=self.stop + by)

    @classmethod
    def of(cls, index: Index, size: int, what: str) -> Pick:
        """Read an index into an axis of `size` entries; raises InputError, naming `what`, for one out of range."""
        if isinstance(index, slice):
            start, stop, step = index.indices(size)
            if step < 1:
                raise InputError(f"{what}: the slice {index} goes backwards, expected a positive step.")
            return cls(start, max(start, stop)) if step == 1 else cls.numbers(np.arange(start, stop, step))
        if isinstance(index, list):
            return cls.numbers(np.array([_place(one, size, what) for one in index], dtype=np.int64))
        place = _place(index, size, what)
        return cls(place, place + 1, keep=False)

    @classmethod
    def numbers(cls, numbers: Shaped[NDArray[np.int64], " any"]) -> Pick:
        """Take entries by their number, in any order; a run of them without gaps is taken as one piece."""
        if not len(numbers):
            return cls(0, 0)
        start, stop = int(numbers.min()), int(numbers.max()) + 1
        if len(numbers) == stop - start and bool((numbers[1:] > numbers[:-1]).all()):
            return cls(start, stop)
        return cls(start, stop, numbers - start)


def picks_of(positions: Positions, shape: Sequence[int], what: str) -> tuple[Pick, ...]:
    """Read `positions` into axes of these sizes; axes that it does not reach are taken whole."""
    given = positions if isinstance(positions, tuple) else () if positions is None else (positions,)
    if len(given) > len(shape):
        raise InputError(f"{what}: {len(given)} positions for {len(shape)} axes behind the row. Give at most one each.")
    rest = [slice(None)] * (len(shape) - len(given))
    return tuple(Pick.of(index, size, what) for index, size in zip((*given, *rest), shape, strict=True))


def shape_of(picks: Iterable[Pick]) -> tuple[int, ...]:
    """Return the shape of what the picks take."""
    return tuple(pick.size for pick in picks if pick.keep)


def taken(file: OpenFile, name: str, picks: Sequence[Pick]) -> Shaped[Tensor, "..."]:
    """Take a part of one tensor: a view of the file where it can be, so that only what is then copied is read."""
    part = file.get_slice(name)[tuple(slice(pick.start, pick.stop) for pick in picks)]
    # The last axis first: numbers of rows, which come first, then copy the least.
    for axis, pick in reversed(list(enumerate(picks))):
        if pick.index is not None:
            part = part.index_select(axis, torch.as_tensor(pick.index))
        elif not pick.keep:
            part = part.squeeze(axis)
    return part


def put(
    result: Shaped[Tensor, "row ..."], places: Shaped[NDArray[np.int64], " some"], values: Shaped[Tensor, "..."]
) -> None:
    """Copy `values` to rising places of the result; only now is a view of a file read."""
    if int(places[-1]) - int(places[0]) + 1 == len(places):
        result[int(places[0]) : int(places[-1]) + 1] = values
    else:
        result[torch.as_tensor(places)] = values.to(result.dtype)


def _place(index: SupportsIndex, size: int, what: str) -> int:
    try:
        place = operator.index(index)
    except TypeError as error:
        raise InputError(f"{what}: {index!r} is no position, expected an integer, a slice or integers.") from error
    if not -size <= place < size:
        raise InputError(f"{what}: position {place} is out of range, there are {size}.")
    return place % size
