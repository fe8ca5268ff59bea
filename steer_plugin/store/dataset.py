"""A store as a `datasets.Dataset`: id, a column per key of the metadata, a column per tensor.

(row,)                     Value                   (row, d)                Sequence of length d
(row, a, b) and so on      Array2D to Array5D      ragged (row, token, d)  Array2D with a free first axis
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch

from steer_plugin.artefact import sha256
from steer_plugin.atomic import JSON
from steer_plugin.errors import FrameworkError, InputError, nearest
from steer_plugin.store.manifest import MANIFEST, read_manifest
from steer_plugin.store.reader import ShardStore
from steer_plugin.store.shard import Kind

# `datasets` is an optional package that writes no types down.
Table: TypeAlias = Any

BLOCK_BYTES = 2**26  # read at once
ARROW = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
ARROW_FLOATS = ("float16", "float32", "float64")
WIDENED = {"bfloat16": "float32"}  # Arrow lacks it, and float32 holds all of its numbers
DEEPEST = 5  # Array5D


@dataclass(frozen=True)
class _Source:
    """What is streamed; `datasets` names its cache file after a hash of this, so it tells the content."""

    folder: str
    manifest_sha256: str
    numbers: bytes
    verify: bool
    tensors: tuple[str, ...]
    metadata: tuple[str, ...]
    as_text: frozenset[str]  # the metadata that becomes JSON text


def to_dataset(store: ShardStore, names: Sequence[str], cache_dir: Path | str | None) -> Table:
    """Stream rows into a Dataset; see `ShardStore.to_dataset`."""
    library = _datasets()
    for name in names:
        if name not in store.names:
            raise InputError(f"{store.folder} holds no tensor {name!r}.{nearest(name, store.names)}")
    metadata = _metadata_types(store)
    columns = ["id", *metadata, *names]
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"Two columns would be called {twice!r}: id, metadata and tensors share a table. Give names=.")
    values = {name: "string" if dtype == "json" else dtype for name, dtype in metadata.items()}
    features = library.Features({
        "id": library.Value("string"),
        **{name: library.Value(dtype) for name, dtype in values.items()},
        **{name: _feature(library, name, store.layout[name]) for name in names},
    })  # fmt: skip
    source = _Source(
        str(store.folder),
        sha256((store.folder / MANIFEST).read_bytes()),
        store.numbers.tobytes(),
        store.verifies,
        tuple(names),
        tuple(metadata),
        frozenset(name for name, dtype in metadata.items() if dtype == "json"),
    )
    cache = None if cache_dir is None else str(cache_dir)
    return library.Dataset.from_generator(_stream, features=features, gen_kwargs={"source": source}, cache_dir=cache)


def _stream(source: _Source) -> Iterator[dict[str, object]]:
    """Yield rows, reading a block of them at a time."""
    manifest = read_manifest(Path(source.folder))
    store = ShardStore(Path(source.folder), manifest, np.frombuffer(source.numbers, dtype=np.int64), source.verify)
    row_bytes = sum(shard.bytes for shard in manifest.shards) // max(1, manifest.rows) + 1
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, len(store), step):
        block = store[start : start + step]
        tensors = {name: _values(block, name) for name in source.tensors}
        for k, (row, metadata) in enumerate(zip(block.ids, block.rows, strict=True)):
            told = {name: metadata.get(name) for name in source.metadata}
            told |= {name: json.dumps(told[name], ensure_ascii=False) for name in source.as_text if name in metadata}
            yield {"id": row, **told, **{name: values[k] for name, values in tensors.items()}}


def _values(block: ShardStore, name: str) -> list[object]:
    kind = block.layout[name]
    dtype = getattr(torch, WIDENED.get(kind.dtype, kind.dtype))
    if kind.ragged:
        return [one.to(dtype).numpy() for one in block.ragged(name)]
    values = block.tensor(name, dtype=dtype)
    return list(values.numpy()) if kind.shape else cast("list[object]", values.tolist())


def _feature(library: Table, name: str, kind: Kind) -> Table:
    dtype = WIDENED.get(kind.dtype, kind.dtype)
    shape = (None, *kind.shape) if kind.ragged else kind.shape
    if dtype not in (*ARROW, *ARROW_FLOATS) or len(shape) > DEEPEST:
        raise InputError(
            f"Tensor {name!r} is {kind.dtype} of shape {kind.shape}: a column holds integers, booleans or floats of "
            f"16 to 64 bits in at most {DEEPEST} axes. Leave it out with names=."
        )
    if len(shape) > 1:
        return getattr(library, f"Array{len(shape)}D")(shape=shape, dtype=dtype)
    if not shape:
        return library.Value(dtype)
    return library.Sequence(library.Value(dtype), length=-1 if shape[0] is None else shape[0])


def _metadata_types(store: ShardStore) -> dict[str, str]:
    """Return the column type of each key of the metadata; "json" where its values are of several or nested types."""
    found: dict[str, set[str]] = {}
    for _, rows in store.scan():
        for row in rows:
            for name, value in row.items():
                found.setdefault(name, set()).update(() if value is None else (_type(value),))
    return {name: _common(types) for name, types in found.items()}


def _type(value: JSON) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if -(2**63) <= value < 2**63 else "json"
    if isinstance(value, float):
        return "float64"
    return "string" if isinstance(value, str) else "json"


def _common(types: set[str]) -> str:
    if len(types) < 2:
        return next(iter(types), "string")
    return "float64" if types == {"int64", "float64"} else "json"


def _datasets() -> Table:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise FrameworkError("tables need the datasets package: pip install 'steer-plugin[data]'.") from error
