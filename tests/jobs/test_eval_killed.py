"""A real evaluation, killed with SIGKILL while it asks, judges, takes costs and writes, ends as one never killed."""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from pathlib import Path

import _forked
import pytest

JOB = Path(__file__).with_name("_eval_job.py")
# Stage, and how many of them have begun when the process dies; each process goes on where the last one died.
MOMENTS = (("asking", 2), ("judging", 1), ("costs", 1), ("writing", 9))
FILES = ["mine-random-seed0", "mine-random-seed1", "mine-swapped", "mine", "none"]


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


@pytest.mark.skipif(sys.platform == "win32", reason="signals as on POSIX")
@pytest.mark.slow
def test_killed_again_and_again_nothing_is_lost_or_doubled(tmp_path: Path):
    whole, killed, moments = tmp_path / "whole", tmp_path / "killed", random.Random(3)
    _forked.start(JOB, whole, 0).finish()
    reached = 0
    for stage, count in MOMENTS:
        with _forked.start(JOB, killed, 0.02) as job:
            for line in job.stdout:
                count -= line.strip() == stage
                if not count:
                    break
            else:
                pytest.fail(f"no {stage} was left: {job.errors}")
            time.sleep(moments.uniform(0, 0.03))
            job.send_signal(signal.SIGKILL)
            assert job.wait(timeout=60) == -signal.SIGKILL
        assert not (killed / "metrics.json").exists()
        size = sum(path.stat().st_size for path in killed.rglob("*.jsonl"))
        assert size >= reached
        reached = size
    said = _forked.start(JOB, killed, 0).finish()
    # What was done before is not done again.
    assert said.count("asking") < 3 * len(FILES)
    for folder, name, count in (("answers", "", 12), ("verdicts", "lengths-", 12), ("costs", "", 9)):
        logs = sorted(path.stem for path in (killed / folder).iterdir())
        assert logs == sorted(name + file for file in FILES if folder != "costs" or file != "mine-random-seed1")
        for log in logs:
            ids = [row["id"] for row in rows(killed / folder / f"{log}.jsonl")]
            assert len(ids) == len(set(ids)) == count
            assert rows(killed / folder / f"{log}.jsonl") == rows(whole / folder / f"{log}.jsonl")
    assert (killed / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()
    assert (killed / "table.md").read_bytes() == (whole / "table.md").read_bytes()
    assert not list(killed.rglob("*.tmp"))
