"""The store: rows come back in order, jobs are told apart, damage is named, failures leave it resumable."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import steer_plugin.store._listing
from steer_plugin.artefact import atomic_write_json
from steer_plugin.errors import ArtefactError, InputError, JobError
from steer_plugin.store import ShardStore, ShardWriter
from steer_plugin.store.manifest import Manifest, differences

JOB = {"model": "m", "site": {"name": "resid_post", "layer": 14}, "dtype": "float32"}


def rows(*numbers: int) -> tuple[list[str], dict[str, Tensor], list[dict[str, int]]]:
    """Rows that tell their number in every part."""
    z = torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, 4)
    return (
        [f"r{k}" for k in numbers],
        {"z": z, "k": torch.tensor(numbers, dtype=torch.int64)},
        [{"k": k} for k in numbers],
    )


def fill(out: Path, count: int = 10, shard_rows: int = 4) -> ShardStore:
    with ShardWriter(out, JOB, shard_rows) as writer:
        writer.append(*rows(*range(count)))
    return ShardStore.open(out)


def files(out: Path) -> list[str]:
    return sorted(p.name for p in out.iterdir() if p.name != ".lock")


def test_round_trip(tmp_path: Path) -> None:
    store = fill(tmp_path)
    assert files(tmp_path) == ["manifest.json", *(f"shard-00000{k}.safetensors" for k in range(3))]
    assert len(store) == 10 and store.complete and store.job == JOB and store.names == ("k", "z")
    assert store.ids == [f"r{k}" for k in range(10)]
    assert store.rows == [{"k": k} for k in range(10)]
    assert store.tensor("k").tolist() == list(range(10))
    assert store.tensor("z").shape == (10, 4) and store.tensor("z").dtype == torch.float32
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [shard["rows"] for shard in manifest["shards"]] == [4, 4, 2]
    assert manifest["shards"][0]["tensors"] == {
        "k": {"dtype": "int64", "shape": []},
        "z": {"dtype": "float32", "shape": [4]},
    }


@given(sizes=st.lists(st.integers(0, 9), max_size=6), shard_rows=st.integers(1, 7), stop=st.integers(0, 6))
def test_any_batching_gives_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], shard_rows: int, stop: int
) -> None:
    out, number = tmp_path_factory.mktemp("out"), 0
    for part in (sizes[:stop], sizes[stop:]):
        with ShardWriter(out, JOB, shard_rows) as writer:
            assert writer.done == {f"r{k}" for k in range(number)}
            for size in part:
                writer.append(*rows(*range(number, number + size)))
                assert writer.buffered < shard_rows
                number += size
    store = ShardStore.open(out)
    assert store.ids == [f"r{k}" for k in range(number)]
    if number:
        assert store.tensor("k").tolist() == list(range(number))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.uint8])
def test_dtypes_survive(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([[0, 1], [1, 0]]).to(dtype)
    with ShardWriter(tmp_path, JOB) as writer:
        writer.append(["a", "b"], {"z": values})
    store = ShardStore.open(tmp_path)
    assert store.tensor("z").dtype == dtype and torch.equal(store.tensor("z"), values)
    assert store.rows == [{}, {}]


def test_the_callers_buffer_may_be_reused(tmp_path: Path) -> None:
    buffer = torch.zeros(1, 2)
    with ShardWriter(tmp_path, JOB) as writer:
        for k in range(3):
            buffer.fill_(k)
            writer.append([str(k)], {"z": buffer})
    assert ShardStore.open(tmp_path).tensor("z")[:, 0].tolist() == [0, 1, 2]


def test_select(tmp_path: Path) -> None:
    store = fill(tmp_path)
    picked = store.select([9, 0, 0, -2])
    assert picked.ids == ["r9", "r0", "r0", "r8"] and len(picked) == 4
    assert picked.tensor("k").tolist() == [9, 0, 0, 8]
    assert picked.rows == [{"k": 9}, {"k": 0}, {"k": 0}, {"k": 8}]
    mask = np.arange(10) % 3 == 0
    for same in (mask, mask.tolist(), torch.as_tensor(mask), torch.tensor([0, 3, 6, 9]), np.array([0, 3, 6, 9])):
        assert store.select(same).tensor("k").tolist() == [0, 3, 6, 9]
    assert store.select(mask).select([1, -1]).ids == ["r3", "r9"]
    empty = store.select([])
    assert empty.ids == [] and empty.rows == [] and empty.tensor("z").shape == (0, 4)
    with pytest.raises(InputError, match="3 entries for 10 rows"):
        store.select([True, False, True])
    with pytest.raises(InputError, match="from 0 to 10: expected 0 to 9"):
        store.select([0, 10])
    with pytest.raises(InputError, match="dtype float64"):
        store.select(np.array([0.5]))


def test_unknown_tensor(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tensor 'zz', it holds k, z\. Did you mean 'z'"):
        fill(tmp_path).tensor("zz")


def test_empty_store(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, JOB):
        pass
    store = ShardStore.open(tmp_path)
    assert len(store) == 0 and store.ids == [] and store.rows == [] and store.names == ()
    with pytest.raises(InputError, match="nothing: it has no rows"):
        store.tensor("z")


def test_another_job_is_refused_by_key(tmp_path: Path) -> None:
    fill(tmp_path)
    other = {"model": "m", "site": {"name": "resid_post", "layer": 15}, "alpha": 1}
    with pytest.raises(JobError) as caught:
        ShardWriter(tmp_path, other)
    message = str(caught.value)
    assert "alpha: there '<missing>', asked for 1" in message
    assert "dtype: there 'float32', asked for '<missing>'" in message
    assert "site.layer: there 14, asked for 15" in message
    assert "model" not in message and "site.name" not in message
    assert "--out" in message and "delete" in message
    with ShardWriter(tmp_path, dict(reversed(JOB.items()))) as writer:
        assert len(writer.done) == 10
    assert ShardStore.open(tmp_path).complete


def test_tuples_and_lists_are_the_same_job() -> None:
    assert list(differences({"a": [1, 2], "b": True}, {"a": (1, 2), "b": True})) == []
    assert list(differences({"b": True}, {"b": 1})) == ["b: there True, asked for 1"]


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(JobError, match=r"not empty \(thesis\.tex"):
        ShardWriter(tmp_path, JOB)
    assert files(tmp_path) == ["thesis.tex"]
    with pytest.raises(JobError, match="File exists"):
        ShardWriter(tmp_path / "thesis.tex", JOB)
    with pytest.raises(ArtefactError, match=r"holds no manifest\.json"):
        ShardStore.open(tmp_path)


def test_a_folder_with_only_leftovers_is_empty(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".manifest.json.12345678.tmp").write_text("{")
    fill(tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))


def test_bad_rows_are_refused_and_change_nothing(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, JOB, shard_rows=2) as writer:
        writer.append(*rows(0, 1, 2))
        ids, tensors, metadata = rows(3)
        for bad, message in (
            (rows(0), "Row 'r0' is already"),
            (rows(2), "Row 'r2' is already"),
            ((["a", "a"], *rows(3, 4)[1:]), "Row 'a' is already"),
            ((ids, tensors, []), "0 rows of metadata for 1 ids"),
            ((["a", "b"], tensors, [{}, {}]), "shape \\(1, 4\\) for 2 ids"),
            ((ids, {"z": tensors["z"]}, metadata), "name: dtype, trailing shape"),
            ((ids, {**tensors, "z": tensors["z"].double()}, metadata), "float64"),
            ((ids, {**tensors, "z": tensors["z"][:, :3]}, metadata), "\\(3,\\)"),
            ((ids, tensors, [{"x": float("nan")}]), "JSON cannot hold"),
        ):
            with pytest.raises(InputError, match=message):
                writer.append(*bad)
        writer.append(ids, tensors, metadata)
    assert ShardStore.open(tmp_path).ids == ["r0", "r1", "r2", "r3"]
    with pytest.raises(JobError, match="is closed"):
        writer.append(*rows(9))
    with pytest.raises(InputError, match="shard_rows is 0"):
        ShardWriter(tmp_path / "x", JOB, shard_rows=0)


def test_an_exception_keeps_what_was_buffered(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path, JOB, shard_rows=4) as writer:
        writer.append(*rows(*range(6)))
        assert writer.done == {"r0", "r1", "r2", "r3"} and writer.buffered == 2
        raise ZeroDivisionError
    with pytest.raises(JobError, match=r"6 rows so far.*partial_ok=True"):
        ShardStore.open(tmp_path)
    assert ShardStore.open(tmp_path, partial_ok=True).tensor("k").tolist() == list(range(6))
    with ShardWriter(tmp_path, JOB) as writer:
        writer.append(*rows(6))
    assert ShardStore.open(tmp_path).tensor("k").tolist() == list(range(7))


@pytest.mark.parametrize("after", [False, True])
def test_interrupt_at_the_manifest_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    real = steer_plugin.store._listing.write_manifest

    def interrupted(folder: Path, manifest: Manifest) -> None:
        if after:
            real(folder, manifest)
        monkeypatch.setattr(steer_plugin.store._listing, "write_manifest", real)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, JOB, shard_rows=4) as writer:
        monkeypatch.setattr(steer_plugin.store._listing, "write_manifest", interrupted)
        writer.append(*rows(*range(6)))
    assert ShardStore.open(tmp_path, partial_ok=True).ids == [f"r{k}" for k in range(6)]


@pytest.mark.parametrize("sync", range(1, 5))
def test_full_disk_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: int) -> None:
    real, calls = os.fsync, []
    out = tmp_path / "out"

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) >= sync:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with ShardWriter(out, JOB):
        pass
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        # One sync for each file and one for its folder: shard, folder, manifest, folder.
        full = pytest.raises(JobError, match=r"disk is full: \d+ bytes were wanted .*out")
        with full, ShardWriter(out, JOB, shard_rows=4) as writer:
            writer.append(*rows(*range(9)))
    listed = [shard["file"] for shard in json.loads((out / "manifest.json").read_text())["shards"]]
    assert files(out) == ["manifest.json", *listed]
    with ShardWriter(out, JOB) as writer:
        for k in range(9):
            if f"r{k}" not in writer.done:
                writer.append(*rows(k))
    assert ShardStore.open(out).tensor("k").tolist() == list(range(9))


def test_unlisted_shards_are_ignored_and_overwritten(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, JOB):
        pass
    (tmp_path / "shard-000000.safetensors").write_bytes(b"left by a killed writer")
    assert len(ShardStore.open(tmp_path)) == 0
    assert fill(tmp_path).tensor("k").tolist() == list(range(10))


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_damaged_shards_are_named(tmp_path: Path, damage: str) -> None:
    fill(tmp_path)
    path = tmp_path / "shard-000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[:-9] if damage == "truncated" else data)
    store = ShardStore.open(tmp_path)
    assert store.select([0, 9]).tensor("k").tolist() == [0, 9]  # the other shards can still be read
    for read in (lambda: store.tensor("k"), lambda: store.rows):
        with pytest.raises(ArtefactError, match=r"shard-000001\.safetensors .*run the same job again.* 4 rows"):
            read()
    path.unlink(missing_ok=True)  # the mend
    with pytest.warns(UserWarning, match=r"1 damaged shards, which were dropped: shard-000001\.safetensors"):
        writer = ShardWriter(tmp_path, JOB)
    with writer:
        assert writer.done == {"r0", "r1", "r2", "r3", "r8", "r9"}
        writer.append(*rows(4, 5, 6, 7))
    mended = ShardStore.open(tmp_path)
    assert sorted(mended.tensor("k").tolist()) == list(range(10)) and len(set(mended.ids)) == 10


def test_a_lost_shard_makes_a_complete_store_unfinished(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "shard-000002.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"shard-000002\.safetensors is missing"):
        writer = ShardWriter(tmp_path, JOB)
    with pytest.raises(ZeroDivisionError), writer:
        raise ZeroDivisionError
    with pytest.raises(JobError, match="not finished"):
        ShardStore.open(tmp_path)


def test_damaged_manifests_are_refused(tmp_path: Path) -> None:
    fill(tmp_path)
    path = tmp_path / "manifest.json"
    value = json.loads(path.read_text())
    for change, message in (
        ({"format": 9}, "format 9"),
        ({"job": {"model": "other"}}, "edited by hand"),
        ({"shards": [{"file": "../../secrets"}]}, "lists the file"),
        ({"shards": 3}, "is not a manifest"),
    ):
        atomic_write_json(path, {**value, **change})
        for opened in (lambda: ShardStore.open(tmp_path), lambda: ShardWriter(tmp_path, JOB)):
            with pytest.raises(ArtefactError, match=message):
                opened()
    path.write_text("{")
    with pytest.raises(ArtefactError, match="truncated or altered"):
        ShardStore.open(tmp_path)
