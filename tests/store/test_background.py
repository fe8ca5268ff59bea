"""Writing in the background: bounded, errors come up, Ctrl-C loses nothing, no thread stays."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

from steer_plugin.errors import JobError
from steer_plugin.store import ShardStore, ShardWriter
from steer_plugin.store._background import Background
from steer_plugin.store._rows import Rows
from steer_plugin.store.writer import WAITING

JOB = {"model": "m"}


def put(writer: ShardWriter, *numbers: int) -> None:
    writer.append([f"r{k}" for k in numbers], {"k": torch.tensor(numbers)})


def threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("steer-plugin-store")]


@pytest.fixture(autouse=True)
def none_before() -> None:
    if threads():
        gc.collect()  # a test that failed left a writer
    assert threads() == []


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """A disk that is full as long as it is told to be."""
    state, real = {"full": False}, os.fsync

    def fsync(handle: int) -> None:
        if state["full"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    return state


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("shown_by", ["append", "flush", "close"])
def test_an_error_comes_up_and_its_rows_are_asked_for_again(
    tmp_path: Path, disk: dict[str, bool], background: bool, shown_by: str
) -> None:
    writer = ShardWriter(tmp_path, JOB, 2, background=background)
    put(writer, 0, 1)
    writer.flush()
    disk["full"] = True
    with pytest.raises(JobError, match=r"disk is full: \d+ bytes were wanted"):
        put(writer, 2, 3)
        if shown_by == "append":
            for k in itertools.count(100):  # one of them waits for the shard that cannot be written
                put(writer, k)
        writer.flush() if shown_by == "flush" else writer.close()
    assert writer.done == {"r0", "r1"} and writer.buffered >= 2
    disk["full"] = False
    writer.close()
    found = ShardStore.open(tmp_path).tensor("k").tolist()
    assert found[:4] == [0, 1, 2, 3] and len(set(found)) == len(found)
    assert threads() == []


def test_an_error_does_not_wait_for_the_next_shard(tmp_path: Path, disk: dict[str, bool]) -> None:
    with pytest.raises(JobError, match="disk is full"), ShardWriter(tmp_path, JOB, 2) as writer:
        disk["full"] = True
        put(writer, 0, 1)
        for k in range(2, 2000, 2):  # never enough for a shard beside those that wait
            time.sleep(0.005)
            put(writer, k)
            writer._buffer.drop(1)
        pytest.fail("nothing was raised")


def test_an_error_in_the_background_ends_the_block(tmp_path: Path, disk: dict[str, bool]) -> None:
    with pytest.raises(JobError, match="disk is full"), ShardWriter(tmp_path, JOB, 2) as writer:
        put(writer, 0, 1)
        writer.flush()
        disk["full"] = True
        put(writer, 2, 3)
    assert threads() == []
    disk["full"] = False
    with ShardWriter(tmp_path, JOB, 2) as writer:
        assert writer.done == {"r0", "r1"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_block_that_is_left_early_keeps_all_rows(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), ShardWriter(tmp_path, JOB, 2) as writer:
        put(writer, *range(7))
        raise error
    assert threads() == []
    store = ShardStore.open(tmp_path, partial_ok=True)
    assert not store.complete and store.tensor("k").tolist() == list(range(7))


def test_ctrl_c_while_waiting_for_room_keeps_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Background[Rows]) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, JOB, 2) as writer:
        put(writer, *range(5))
        monkeypatch.setattr(Background, "_settle", interrupted)
        put(writer, *range(5, 20))
    assert ShardStore.open(tmp_path, partial_ok=True).tensor("k").tolist() == list(range(20))


def test_no_thread_outlives_the_writer(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, JOB, 2) as writer:
        assert threads() == []
        put(writer, *range(7))
        assert len(threads()) == 1
    assert threads() == []
    with ShardWriter(tmp_path / "own", JOB, 2, background=False) as writer:
        put(writer, *range(7))
        assert threads() == []
    assert ShardStore.open(tmp_path / "own").tensor("k").tolist() == list(range(7))


@pytest.mark.parametrize("rows", [20, 80])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """While the disk stands still, at most WAITING shards wait; at no time are more in memory, whatever the rows."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most, encode, merge = [0], Rows.encode, Rows.merge
    gate = threading.Event()

    def merged(parts: list[Rows]) -> Rows:
        made = merge(parts)
        alive.add(made.columns["k"].values)
        most[0] = max(most[0], len(alive))
        return made

    def encoded(self: Rows) -> bytes:
        gate.wait(0.005)  # slower than what is appended
        return encode(self)

    monkeypatch.setattr(Rows, "merge", staticmethod(merged))
    monkeypatch.setattr(Rows, "encode", encoded)
    with ShardWriter(tmp_path, JOB, 4) as writer:
        for k in range(rows):
            put(writer, k)
            assert writer.buffered < 4
    # One more than wait: the shard that was written last goes when the next is taken up.
    assert WAITING <= most[0] <= WAITING + 1
    assert ShardStore.open(tmp_path).tensor("k").tolist() == list(range(rows))


def test_the_queue_is_bounded() -> None:
    gate, done = threading.Event(), []

    def work(item: int) -> None:
        gate.wait()
        done.append(item)

    queue = Background(work, 2)
    queue.put(1), queue.put(2)
    third = threading.Thread(target=queue.put, args=(3,))
    third.start()
    third.join(0.1)
    assert third.is_alive() and done == []
    gate.set()
    third.join()
    queue.wait()
    queue.stop()
    assert done == [1, 2, 3]


def test_cutting_copies_each_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One append of many rows: what is concatenated for the shards is the rows, not what is left of them each time."""
    copied, cat = [0], torch.cat

    def counted(tensors: list[torch.Tensor]) -> torch.Tensor:
        made = cat(tensors)
        copied[0] += len(made)
        return made

    monkeypatch.setattr(torch, "cat", counted)
    with ShardWriter(tmp_path, JOB, 4, background=False) as writer:
        put(writer, *range(83))
    assert copied[0] == 83
