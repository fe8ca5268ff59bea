"""A job's order, several ranks, ragged tensors and slices: compared with the tensors that were put in, indexed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steer_plugin.errors import ArtefactError, InputError, JobError
from steer_plugin.sites import Site
from steer_plugin.store import ShardStore, ShardWriter, drop_damaged

if sys.platform != "win32":
    import fcntl

JOB = {"model": "m"}
ORDER = [f"r{k}" for k in range(11)]
MIXED = [7, 2, 9, 0, 10, 4, 1, 8, 3, 6, 5]

X = torch.arange(11 * 3 * 4 * 2.0).reshape(11, 3, 4, 2)
TOKENS = [torch.arange(k % 4 * 2.0).reshape(-1, 2) + 100 * k for k in range(11)]


def put(writer: ShardWriter, *numbers: int) -> None:
    writer.append(
        [f"r{k}" for k in numbers],
        {"x": X[list(numbers)], "t": [TOKENS[k] for k in numbers]},
        [{"k": k} for k in numbers],
    )


def fill(out: Path, shard_rows: int = 3, batch: int = 2) -> ShardStore:
    """All rows, written in another order than theirs."""
    with ShardWriter(out, JOB, shard_rows, order=ORDER) as writer:
        for start in range(0, 11, batch):
            put(writer, *MIXED[start : start + batch])
    return ShardStore.open(out)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("shard_rows", "batch"), [(1, 11), (3, 2), (4, 5), (256, 1)])
def test_rows_come_in_the_jobs_order(tmp_path: Path, shard_rows: int, batch: int) -> None:
    store = fill(tmp_path, shard_rows, batch)
    assert store.ids == ORDER and store.rows == [{"k": k} for k in range(11)]
    assert torch.equal(store.tensor("x"), X) and same(store.ragged("t"), TOKENS)
    entry = json.loads((tmp_path / "manifest.json").read_text())["shards"][0]
    assert entry["places"] == MIXED[:shard_rows] and "ids" not in entry


def test_what_is_there_comes_in_order_before_the_rest(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, JOB, order=ORDER) as writer:
        put(writer, 9, 3, 5)
    with pytest.raises(JobError, match="3 of 11 rows so far"):
        ShardStore.open(tmp_path)
    store = ShardStore.open(tmp_path, partial_ok=True)
    assert store.ids == ["r3", "r5", "r9"] and torch.equal(store.tensor("x"), X[[3, 5, 9]])
    with ShardWriter(tmp_path, JOB, order=ORDER) as writer:
        assert writer.done == {"r3", "r5", "r9"}
        put(writer, *(k for k in MIXED if k not in (9, 3, 5)))
    assert torch.equal(ShardStore.open(tmp_path).tensor("x"), X)


def test_ids_outside_the_order_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a", JOB, order=ORDER) as writer:
        with pytest.raises(InputError, match=r"Row 'r77' is not in the order of this job, which has 11 ids.*'r7'"):
            writer.append(["r1", "r77"], {"x": X[:2], "t": TOKENS[:2]})
        assert writer.buffered == 0
        put(writer, 1)
    with pytest.raises(InputError, match="'b' occurs more than once in the order"):
        ShardWriter(tmp_path / "b", JOB, order=["a", "b", "b"])
    with pytest.raises(InputError, match="2 ranks write one store: give order="):
        ShardWriter(tmp_path / "b", JOB, ranks=2)
    with pytest.raises(InputError, match="rank 2 of 2: expected 0 to 1"):
        ShardWriter(tmp_path / "b", JOB, order=ORDER, rank=2, ranks=2)
    with pytest.raises(InputError, match="shard_bytes is 0"):
        ShardWriter(tmp_path / "b", JOB, shard_bytes=0)
    assert not (tmp_path / "b").exists()


def test_another_order_is_another_job(tmp_path: Path) -> None:
    fill(tmp_path)
    for other, asked in ((ORDER[::-1], "11 ids"), (ORDER[1:], "10 ids"), (None, "none")):
        with pytest.raises(JobError, match=f"another job: order: there 11 ids, asked for {asked}"):
            ShardWriter(tmp_path, JOB, order=other)
    assert torch.equal(ShardStore.open(tmp_path).tensor("x"), X)


def test_a_lost_order_is_named_and_written_again(tmp_path: Path) -> None:
    fill(tmp_path)
    path = tmp_path / "order.json"
    text = path.read_text()
    for damage in (lambda: path.write_text(text.replace("r1", "r2")), path.unlink):
        damage()
        with pytest.raises(ArtefactError, match=r"order\.json .*Run the same job again"):
            ShardStore.open(tmp_path)
        with ShardWriter(tmp_path, JOB, order=ORDER) as writer:
            assert len(writer.done) == 11
        assert torch.equal(ShardStore.open(tmp_path).tensor("x"), X)


def test_a_store_of_the_first_format_is_read_and_given_an_order(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, JOB, 4) as writer:
        writer.append([f"r{k}" for k in MIXED[:8]], {"x": X[MIXED[:8]]})
    path = tmp_path / "manifest.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**{k: value[k] for k in value if k not in ("order", "versions")}, "format": 1}))
    assert torch.equal(ShardStore.open(tmp_path).tensor("x"), X[MIXED[:8]])
    with pytest.raises(JobError, match="order: there row 'r7', asked for 3 ids without it"):
        ShardWriter(tmp_path, JOB, order=ORDER[:3])
    with ShardWriter(tmp_path, JOB, order=ORDER) as writer:
        assert writer.done == {f"r{k}" for k in MIXED[:8]}
        writer.append([f"r{k}" for k in MIXED[8:]], {"x": X[MIXED[8:]]})
    assert torch.equal(ShardStore.open(tmp_path).tensor("x"), X)


def test_shards_are_cut_by_bytes(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, JOB, order=ORDER, shard_bytes=3 * 96) as writer:
        writer.append(ORDER, {"x": X})
    assert [len(shard.ids) for shard in ShardStore.open(tmp_path).shards] == [3, 3, 3, 2]
    with ShardWriter(tmp_path / "ragged", JOB, order=ORDER, shard_bytes=40) as writer:
        writer.append(ORDER, {"t": TOKENS})  # of 0, 8, 16, 24, 0, 8 ... bytes
    assert [len(shard.ids) for shard in ShardStore.open(tmp_path / "ragged").shards] == [4, 4, 3]


INDICES = [
    1, -1, slice(1, 3), slice(None, None, 2), slice(5, 2), [2, 0, 0], [], (slice(None), 3), (0, -1), (-2, [3, 1]),
    ([2, 0], slice(1, None, 2)), (slice(0, 2), slice(1, 3), 1), (1, 2, 0),
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_positions_are_those_of_the_tensor(tmp_path: Path, index: object) -> None:
    store = fill(tmp_path)
    expected = X
    for axis, one in reversed(list(enumerate(index if isinstance(index, tuple) else (index,), 1))):
        expected = expected[(*[slice(None)] * axis, one)]
    assert torch.equal(store.tensor("x", positions=index), expected)
    rows = [8, 1, 1, 3]
    assert torch.equal(store.tensor("x", rows, positions=index), expected[rows])
    assert torch.equal(store.tensor("x", slice(2, 9, 3), positions=index), expected[2:9:3])


def test_rows_are_taken_by_slice_number_mask_and_id(tmp_path: Path) -> None:
    store = fill(tmp_path)
    mask = torch.arange(11) % 4 == 1
    for asked in (slice(1, None, 4), [1, 5, 9], [-10, 5, -2], ["r1", "r5", "r9"], mask):
        part = store[asked]
        assert part.ids == ["r1", "r5", "r9"] and part.rows == [{"k": 1}, {"k": 5}, {"k": 9}]
        assert torch.equal(part.tensor("x"), X[1::4]) and same(part.ragged("t"), TOKENS[1::4])
    assert store[::-1].ids == ORDER[::-1] and len(store[5:5]) == 0
    assert store[2:8][1:3].ids == ["r3", "r4"]
    half = store.tensor("x", [3], dtype=torch.float64)
    assert half.dtype == torch.float64 and torch.equal(half, X[[3]].double())
    with pytest.raises(InputError, match="has no row 'r12'"):
        store[["r1", "r12"]]
    for positions, message in ((3, "position 3 is out of range, there are 3"), ((0, 0, 0, 0), "4 positions for 3 axes"),
                               (slice(2, 0, -1), "backwards")):  # fmt: skip
        with pytest.raises(InputError, match=f"tensor 'x': .*{message}"):
            store.tensor("x", positions=positions)


def test_ragged_tensors(tmp_path: Path) -> None:
    store = fill(tmp_path)
    assert store.layout["t"] == ("float32", (2,), True)
    assert store.lengths("t").tolist() == [len(one) for one in TOKENS]
    for side in ("right", "left"):
        values, mask = store.padded("t", side=side)
        assert values.shape == (11, 3, 2) and mask.sum(-1).tolist() == [len(one) for one in TOKENS]
        assert same([row[here] for row, here in zip(values, mask, strict=True)], TOKENS)
        assert not values[~mask].any()
        assert bool(mask[1, 0]) == (side == "right") and bool(mask[1, -1]) == (side == "left")
    full = [k for k in range(11) if len(TOKENS[k])]
    assert torch.equal(store.tensor("t", full, positions=-1), torch.stack([TOKENS[k][-1] for k in full]))
    assert torch.equal(store.tensor("t", full, positions=(-1, 0)), torch.stack([TOKENS[k][-1, 0] for k in full]))
    assert torch.equal(store.tensor("t", full, positions=[0, -1]), torch.stack([TOKENS[k][[0, -1]] for k in full]))
    assert same(store.ragged("t", positions=slice(1, None)), [one[1:] for one in TOKENS])
    assert same(store.ragged("t", slice(2, 4), positions=(slice(1), 1)), [one[:1, 1] for one in TOKENS[2:4]])
    with pytest.raises(InputError, match="'t' of row 'r0': position 0 is out of range, there are 0"):
        store.tensor("t", positions=0)
    for positions in (None, slice(0, 1), ()):
        with pytest.raises(InputError, match=r"'t' is ragged.*ragged\(\) or padded\(\)"):
            store.tensor("t", positions=positions)
    with pytest.raises(InputError, match=r"'x' is not ragged: its rows are \(3, 4, 2\)"):
        store.ragged("x")


def test_bad_ragged_rows_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, JOB) as writer:
        good = torch.zeros(2, 2)
        for tensors, message in (
            ({"t": [good]}, "Ragged tensor 't' has 1 entries for 2 ids"),
            ({"t": [good, good[:, :1]]}, r"\(2, 1\) for row 'b' and torch.float32 \(2, 2\) for row 'a'"),
            ({"t": [good, good.double()]}, "float64"),
            ({"t": [good, torch.tensor(1.0)]}, r"torch.float32 \(\) for row 'b'"),
            ({"t": [good, good.to_sparse()]}, "'t' of row 'b' is torch.sparse_coo"),
            ({"t#offsets": good}, "cannot be called 't#offsets'"),
            ({"__metadata__": good}, "cannot be called '__metadata__'"),
        ):
            with pytest.raises(InputError, match=message):
                writer.append(["a", "b"], tensors)
        writer.append(["a", "b"], {"t": [good, good[:0]]})
        with pytest.raises(InputError, match="name: dtype, trailing shape"):
            writer.append(["c"], {"t": good[None]})
    assert same(ShardStore.open(tmp_path).ragged("t"), [good, good[:0]])


def test_sites_are_found_among_the_names(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, JOB) as writer:
        writer.append(["a"], {name: torch.zeros(1, 2) for name in ("resid_post.3", "projector", "attn_out.3", "y.z")})
    assert ShardStore.open(tmp_path).sites == tuple(map(Site.parse, ("projector", "attn_out.3", "resid_post.3")))


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
@pytest.mark.parametrize("dropped_by", ["writer", "command"])
def test_only_a_damaged_shards_rows_are_computed_again(tmp_path: Path, damage: str, dropped_by: str) -> None:
    store = fill(tmp_path)
    name, path = store.shards[1].file, tmp_path / store.shards[1].file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink() if damage == "missing" else path.write_bytes(data[:-9] if damage == "truncated" else data)
    (found,) = store.verify(progress=False)
    lost = {f"r{k}" for k in MIXED[3:6]}
    assert found.file == name and set(found.ids) == lost
    assert {"missing": "is missing", "truncated": "bytes, expected", "altered": "sha256"}[damage] in found.reason
    if dropped_by == "command":
        assert drop_damaged(tmp_path, progress=False) == (found,)
        assert ShardStore.open(tmp_path, partial_ok=True).verify(progress=False) == ()
        writer = ShardWriter(tmp_path, JOB, 3, order=ORDER)
    else:
        with pytest.warns(UserWarning, match=rf"1 damaged shards, which were dropped: {name} .* \(3 rows\)"):
            writer = ShardWriter(tmp_path, JOB, 3, order=ORDER)
    with writer:
        assert writer.done == set(ORDER) - lost
        assert not path.exists()
        put(writer, *MIXED[3:6])
    mended = ShardStore.open(tmp_path)
    assert torch.equal(mended.tensor("x"), X) and same(mended.ragged("t"), TOKENS) and mended.verify(False) == ()


def test_without_verifying_a_slice_is_read_beside_damage(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, JOB) as writer:
        writer.append(ORDER, {"x": X})
    (path,) = tmp_path.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of the last row
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match="sha256"):
        ShardStore.open(tmp_path).tensor("x", slice(0, 10))
    store = ShardStore.open(tmp_path, verify=False)
    assert torch.equal(store.tensor("x", slice(0, 10)), X[:10])
    assert [damage.file for damage in store.verify(progress=False)] == [path.name]
    path.write_bytes(data[:-1])
    with pytest.raises(ArtefactError, match="bytes, expected"):
        ShardStore.open(tmp_path, verify=False).tensor("x", slice(0, 10))


def two(out: Path) -> tuple[ShardWriter, ShardWriter]:
    return tuple(ShardWriter(out, JOB, 4, order=ORDER, rank=rank, ranks=2) for rank in (0, 1))  # type: ignore[return-value]


def test_two_ranks_take_turns(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    for batch, writer in zip((MIXED[0:3], MIXED[3:6], MIXED[6:9], MIXED[9:]), (one, other, other, one), strict=True):
        put(writer, *batch)
    one.close()
    assert not ShardStore.open(tmp_path, partial_ok=True).complete
    other.close()
    store = ShardStore.open(tmp_path)
    assert torch.equal(store.tensor("x"), X) and same(store.ragged("t"), TOKENS)
    assert {shard.file[:8] for shard in store.shards} == {"shard-0-", "shard-1-"}


@pytest.mark.skipif(sys.platform == "win32", reason="locks as on POSIX")
def test_who_may_write(tmp_path: Path) -> None:
    def alone() -> ShardWriter:
        return ShardWriter(tmp_path, JOB, order=ORDER)

    def rank(number: int, ranks: int) -> ShardWriter:
        return ShardWriter(tmp_path, JOB, order=ORDER, rank=number, ranks=ranks)

    with alone():
        for refused in (alone, lambda: rank(0, 2), lambda: drop_damaged(tmp_path)):
            with pytest.raises(JobError, match="Another process is writing"):
                refused()
    with rank(2, 3):
        for refused, who in (
            (alone, ""),
            (lambda: rank(2, 3), " as rank 2:"),
            (lambda: rank(0, 2), " as rank 2, of a run with more of them"),
        ):
            with pytest.raises(JobError, match=re.escape(f"Another process is writing to {tmp_path}{who}")):
                refused()
        with rank(0, 3):
            pass
    with (tmp_path / ".lock-rank-2").open("a+b") as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_SH)  # as rank 1 does at its start
        with rank(0, 2):
            pass
    with alone():
        pass


def test_ranks_that_share_a_row_are_refused(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    put(one, 0, 1)
    one.flush()
    with pytest.raises(JobError, match=r"Row 'r1' was meanwhile written to .* by another process"):
        put(other, 2, 1)
        other.flush()
    assert "r2" not in other.done and "r1" in other.done
    other.flush()
    one.close(), other.close()
    assert ShardStore.open(tmp_path, partial_ok=True).ids == ["r0", "r1", "r2"]


def test_ranks_with_other_tensors_are_refused(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    put(one, 0, 1)
    one.flush()
    with pytest.raises(InputError, match=r"float64.*another process wrote .*float32"), other:
        other.append(["r2", "r3"], {"x": X[2:4].double(), "t": TOKENS[2:4]})
    one.close()


def test_a_rank_lists_again_what_was_lost_without_locks(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    path = tmp_path / "manifest.json"
    put(one, *MIXED[:4])
    one.flush()
    put(other, *MIXED[4:8])
    old = path.read_text()
    other.flush()
    path.write_text(old)  # as if another node had not seen that update
    put(one, *MIXED[8:])
    one.close(), other.close()
    assert torch.equal(ShardStore.open(tmp_path).tensor("x"), X)
