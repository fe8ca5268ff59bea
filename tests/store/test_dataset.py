"""Exports: a `datasets.Dataset` has the rows and the numbers that the store has."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from steer_plugin.errors import FrameworkError, InputError
from steer_plugin.store import ShardStore, ShardWriter, dataset

COUNT = 9
X = torch.arange(COUNT * 6.0).reshape(COUNT, 6)
TOKENS = [torch.arange(k % 3 * 2.0).reshape(-1, 2) + k for k in range(COUNT)]


@pytest.fixture
def store(tmp_path: Path) -> ShardStore:
    order = [f"r{k}" for k in range(COUNT)]
    with ShardWriter(tmp_path / "store", {"model": "m"}, 2, order=order) as writer:
        for k in (4, 1, 8, 0, 2, 7, 3, 6, 5):
            tensors = {
                "x": X[[k]], "m": X[[k]].reshape(1, 2, 3).half(), "b": X[[k], 0].bfloat16(), "n": torch.tensor([k]),
                "flag": torch.tensor([[k > 4]]), "t": [TOKENS[k]], "ids": [torch.arange(k % 3)],
            }  # fmt: skip
            told = {"behaviour": "yes" if k % 2 else None, "share": k / 2 if k % 2 else k, "at": [k], "mixed": k or "0"}
            writer.append([f"r{k}"], tensors, [told if k else {}])
    return ShardStore.open(tmp_path / "store")


def test_rows_and_numbers_are_the_stores(store: ShardStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr(dataset, "BLOCK_BYTES", 1000)  # several blocks
    table = store.to_dataset(cache_dir=tmp_path / "cache")
    assert table["id"][:] == store.ids
    assert table["behaviour"][:] == [None, "yes"] * 4 + [None]
    assert table["share"][:] == [None, 0.5, 2.0, 1.5, 4.0, 2.5, 6.0, 3.5, 8.0]
    assert table["at"][:] == [None, *(f"[{k}]" for k in range(1, 9))]
    assert table.features["b"].dtype == "float32" and table.features["m"].shape == (2, 3)
    table = table.with_format("torch")
    for name in ("x", "m", "n", "flag"):
        assert torch.equal(torch.stack(list(table[name])), store.tensor(name))
    assert torch.equal(torch.stack(list(table["b"])), store.tensor("b").float())
    for k in range(COUNT):
        assert torch.equal(table[k]["t"].reshape(-1, 2), TOKENS[k])
        assert table[k]["ids"].tolist() == list(range(k % 3))
    some = store[5:1:-2].to_dataset(["x"], cache_dir=tmp_path / "cache").with_format("torch")
    assert some.column_names == ["id", "behaviour", "share", "at", "mixed", "x"] and some["id"][:] == ["r5", "r3"]
    assert torch.equal(torch.stack(list(some["x"])), X[[5, 3]])


def test_what_no_column_can_hold_is_refused(store: ShardStore, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(InputError, match=r"no tensor 'xx'.*'x'"):
        store.to_dataset(["xx"])
    with ShardWriter(tmp_path / "other", {"model": "m"}) as writer:
        writer.append(["a"], {"x": X[:1], "c": X[:1].to(torch.complex64), "n": X[:1]}, [{"n": 1}])
    other = ShardStore.open(tmp_path / "other")
    with pytest.raises(InputError, match="Two columns would be called 'n'"):
        other.to_dataset()
    with pytest.raises(InputError, match=r"'c' is complex64 of shape \(6,\)"):
        other.to_dataset(["c"])


def test_without_datasets_the_mend_is_named(store: ShardStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FrameworkError, match=r"pip install 'steer-plugin\[data\]'"):
        store.to_dataset()
