"""Writers that really die: forked from one process that has torch loaded, so that each costs milliseconds.

Each line of stdin is a JSON list of tasks, run side by side in a process each; the answer is the list of their exit
codes, -9 for SIGKILL. A task writes its share of the job's rows and kills itself where it is told:

    {"out", "rank", "ranks", "rows", "order": bool, "die": [where, n]}       the n-th time, counted from 1
    where: shard-before, shard-after, manifest-before, manifest-after (their renames), append, encode, none
    {"out", "read": true, "name", "rows", "positions", "keep": bytes}        reads, the file's end cut off meanwhile
"""

from __future__ import annotations

import json
import os
import signal
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The store alone: what imports the whole package imports transformers, which takes seconds.
if __name__ == "__main__":
    bare = types.ModuleType("steer_plugin")
    bare.__path__ = [str(ROOT / "steer_plugin")]
    sys.modules["steer_plugin"] = bare

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from steer_plugin.store import ShardStore, ShardWriter, _rows, reader  # noqa: E402

JOB = {"model": "mortal", "seed": 3}
SHARD_ROWS, BATCH = 4, 3


def order(count: int) -> list[str]:
    return [f"row-{k}" for k in range(count)]


def row(k: int) -> tuple[dict[str, Tensor | list[Tensor]], dict[str, int]]:
    """What belongs to row k: a dense tensor, and one token more for each next of four rows."""
    tokens = torch.arange(k % 4)[:, None].expand(-1, 2) + 10.0 * k
    return {"z": torch.full((1, 6), float(k)), "t": [tokens]}, {"k": k}


def batches(count: int) -> list[list[int]]:
    """The rows grouped by length, as a job does that wants little padding: not in their order."""
    numbers = sorted(range(count), key=lambda k: (k % 4, -k))
    return [numbers[i : i + BATCH] for i in range(0, count, BATCH)]


def die_at(where: str, nth: int) -> None:
    """Have this process killed the nth time that it comes to a place."""
    seen = dict.fromkeys(("shard-before", "shard-after", "manifest-before", "manifest-after", "append", "encode"), 0)
    replace, encode, rows_of = Path.replace, _rows.Rows.encode, _rows.rows_of

    def here(place: str) -> None:
        seen[place] += 1
        if place == where and seen[place] == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    def replacing(self: Path, target: Path) -> Path:
        kind = "manifest" if target.name == "manifest.json" else "shard" if target.name.startswith("shard") else ""
        if kind:
            here(f"{kind}-before")
        result = replace(self, target)
        if kind:
            here(f"{kind}-after")
        return result

    def encoding(self: _rows.Rows) -> bytes:
        here("encode")
        return encode(self)

    def appending(*arguments: object) -> _rows.Rows:
        here("append")
        return rows_of(*arguments)  # type: ignore[arg-type]

    Path.replace = replacing  # type: ignore[method-assign]
    _rows.Rows.encode = encoding  # type: ignore[method-assign]
    sys.modules["steer_plugin.store.writer"].rows_of = appending  # type: ignore[attr-defined]


def write(task: dict[str, object]) -> None:
    count, rank, ranks = int(str(task["rows"])), int(str(task["rank"])), int(str(task["ranks"]))
    where, nth = task["die"]  # type: ignore[misc]
    die_at(where, nth)
    asked = order(count) if task["order"] else None
    with ShardWriter(Path(str(task["out"])), JOB, SHARD_ROWS, order=asked, rank=rank, ranks=ranks) as writer:
        for batch in batches(count)[rank::ranks]:
            for k in batch:
                if f"row-{k}" not in writer.done:
                    tensors, metadata = row(k)
                    writer.append([f"row-{k}"], tensors, [metadata])


def read(task: dict[str, object]) -> None:
    """Read with everything behind the first `keep` bytes gone: touching it is SIGBUS."""
    store = ShardStore.open(Path(str(task["out"])), verify=False)
    opened = reader.opened

    def cut(folder: Path, shard: object) -> object:
        file = opened(folder, shard)  # type: ignore[arg-type]
        os.truncate(folder / shard.file, int(str(task["keep"])))  # type: ignore[attr-defined]
        return file

    reader.opened = cut  # type: ignore[assignment]
    name, positions = str(task["name"]), task.get("positions")
    some = store[0 : int(str(task["rows"]))]
    if store.layout[name].ragged:
        some.ragged(name)
    else:
        some.tensor(name, positions=tuple(positions) if isinstance(positions, list) else None)


def run(task: dict[str, object]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        read(task) if task.get("read") else write(task)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    os.fsync = lambda handle: None  # a killed process leaves to the kernel what it wrote; only a power cut does not
    for line in sys.stdin:
        children = [run(task) for task in json.loads(line)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        sys.stdout.write(json.dumps(codes) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
