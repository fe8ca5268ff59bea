"""A job that the tests kill: appends rows k = 0..n-1, one at a time, with a pause before and after each.

Run as `python slow_job.py OUT ROWS SHARD_ROWS PAUSE`; prints "ready" when it starts to append and "done" at its end.
"""

from __future__ import annotations

import sys
import time
import types
from pathlib import Path

# The store alone: what imports the whole package imports transformers, which takes seconds.
bare = types.ModuleType("steer_plugin")
bare.__path__ = [str(Path(__file__).resolve().parents[2] / "steer_plugin")]
sys.modules["steer_plugin"] = bare

import torch  # noqa: E402

from steer_plugin.store import ShardWriter  # noqa: E402

JOB = {"model": "slow", "seed": 3}


def main(out: str, rows: str, shard_rows: str, pause: str) -> None:
    with ShardWriter(Path(out), JOB, shard_rows=int(shard_rows)) as writer:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        for k in range(int(rows)):
            if f"row-{k}" in writer.done:
                continue
            time.sleep(float(pause))
            writer.append([f"row-{k}"], {"z": torch.full((1, 700), float(k)), "k": torch.tensor([k])}, [{"k": k}])
    sys.stdout.write("done\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
