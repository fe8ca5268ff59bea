"""Writers killed at chosen moments, alone or beside another: resumed, every row is there once, as if none had died."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mortal
import pytest
import torch

from steer_plugin.store import ShardStore

if sys.platform == "win32":
    pytest.skip("signals as on POSIX", allow_module_level=True)

ROWS = 22
NONE = ("none", 1)
Run = Callable[..., list[int]]


@pytest.fixture(scope="module")
def server() -> Iterator[Run]:
    script = str(Path(mortal.__file__))
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def run(*tasks: dict[str, object]) -> list[int]:
            process.stdin.write(json.dumps(tasks) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


def ranks(out: Path, *deaths: tuple[str, int], order: bool = True) -> list[dict[str, object]]:
    """One task for each rank, each with its death."""
    shared = {"out": str(out), "rows": ROWS, "order": order, "ranks": len(deaths)}
    return [{**shared, "rank": rank, "die": list(death)} for rank, death in enumerate(deaths)]


def listed(out: Path) -> set[str]:
    """The rows that are on disk; a row that is there twice fails."""
    store = ShardStore.open(out, partial_ok=True)
    assert len(set(store.ids)) == len(store.ids)
    check_rows(store)
    return set(store.ids)


def check_rows(store: ShardStore) -> None:
    numbers = [int(one.removeprefix("row-")) for one in store.ids]
    assert store.rows == [{"k": k} for k in numbers]
    if numbers:
        expected = [mortal.row(k)[0] for k in numbers]
        assert torch.equal(store.tensor("z"), torch.cat([one["z"] for one in expected]))
        for found, one in zip(store.ragged("t"), expected, strict=True):
            assert torch.equal(found, one["t"][0])


def check_whole(out: Path, order: bool = True) -> None:
    store = ShardStore.open(out)
    assert store.ids == mortal.order(ROWS) if order else sorted(store.ids) == sorted(mortal.order(ROWS))
    check_rows(store)
    assert {p.name for p in out.glob("*.safetensors")} == {shard.file for shard in store.shards}
    assert not list(out.glob(".*.tmp"))


DEATHS = [
    ("append", 9), ("encode", 1), ("encode", 3), ("shard-before", 2), ("shard-after", 1), ("shard-after", 6),
    ("manifest-before", 1), ("manifest-before", 3), ("manifest-after", 1), ("manifest-after", 4),
]  # fmt: skip


@pytest.mark.parametrize(
    ("death", "order"), [*((one, True) for one in DEATHS), *((one, False) for one in DEATHS[2:9:3])]
)
def test_one_writer(tmp_path: Path, server: Run, death: tuple[str, int], order: bool) -> None:
    out = tmp_path / "out"
    assert server(*ranks(out, death, order=order)) == [-9]
    before = listed(out) if (out / "manifest.json").exists() else set()
    assert len(before) < ROWS
    # Killed once more where a run that resumes does other things than a first one.
    server(*ranks(out, ("manifest-before", 2), order=order))
    assert listed(out) >= before
    assert server(*ranks(out, NONE, order=order)) == [0]
    check_whole(out, order)


@pytest.mark.parametrize("again", [1, 2])
@pytest.mark.parametrize(
    "death", [("append", 4), ("encode", 2), ("shard-after", 1), ("manifest-before", 1), ("manifest-after", 2)]
)
def test_one_of_two_ranks(tmp_path: Path, server: Run, death: tuple[str, int], again: int) -> None:
    out = tmp_path / "out"
    assert server(*ranks(out, NONE, death)) == [0, -9]
    before = listed(out)
    other = {f"row-{k}" for batch in mortal.batches(ROWS)[0::2] for k in batch}
    assert other <= before < set(mortal.order(ROWS))
    assert not ShardStore.open(out, partial_ok=True).complete
    assert server(*ranks(out, *[NONE] * again)) == [0] * again
    check_whole(out)


def test_both_of_two_ranks_again_and_again(tmp_path: Path, server: Run) -> None:
    out, reached = tmp_path / "out", 0
    for deaths in ((("encode", 2), ("manifest-before", 2)), (("shard-after", 1), ("manifest-after", 2))):
        assert server(*ranks(out, *deaths)) == [-9, -9]
        assert len(listed(out)) >= reached
        reached = len(listed(out))
    assert server(*ranks(out, NONE, NONE, NONE)) == [0, 0, 0]
    check_whole(out)


def test_many_ranks_make_what_one_makes(tmp_path: Path, server: Run) -> None:
    for count in (1, 2, 4):
        out = tmp_path / str(count)
        assert server(*ranks(out, *[NONE] * count)) == [0] * count
        check_whole(out)
    one, four = ShardStore.open(tmp_path / "1"), ShardStore.open(tmp_path / "4")
    assert one.ids == four.ids and one.rows == four.rows and one.job == four.job
    assert torch.equal(one.tensor("z"), four.tensor("z"))
    writers = {re.sub(r"-\d+\.safetensors", "", shard.file) for shard in four.shards}
    assert writers == {"shard-0", "shard-1", "shard-2", "shard-3"}


@pytest.mark.skipif(sys.platform != "linux", reason="pages behind a file's end as on Linux")
def test_slices_touch_only_their_bytes(tmp_path: Path, server: Run) -> None:
    """The file is cut off behind the page that is asked for, once it is mapped: what reads on dies of SIGBUS."""
    from steer_plugin.store import ShardWriter

    out, page = tmp_path / "out", 4096
    wide = torch.arange(4 * 3 * 5 * 2048.0).reshape(4, 3, 5, 2048)
    with ShardWriter(out, {"model": "m"}) as writer:
        writer.append([str(k) for k in range(4)], {"x": wide, "y": [torch.ones(k + 1, 2048) for k in range(4)]})
    (path,) = out.glob("*.safetensors")
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    starts = {
        name: header + entry["data_offsets"][0]
        for name, entry in json.loads(data[8:header]).items()
        if name != "__metadata__"
    }
    token = 2048 * 4

    def end(name: str, size: int) -> int:
        return -(-(starts[name] + size) // page) * page

    for name, rows, positions, size in (
        ("x", 1, [0, 0], token),
        ("x", 1, [1, 2], (5 + 3) * token),
        ("x", 2, [0, 0], 16 * token),
        ("y", 1, None, token),
        ("y", 3, None, 6 * token),
    ):
        for keep, code in ((end(name, size), 0), (end(name, size) - page, -7)):
            task = {"out": str(out), "read": True, "name": name, "rows": rows, "positions": positions, "keep": keep}
            assert server(task) == [code], (name, rows, positions)
            path.write_bytes(data)
