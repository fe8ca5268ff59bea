"""A real evaluation, killed with SIGKILL while it asks, judges, takes costs and writes, ends as one never killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

JOB = Path(__file__).with_name("_eval_job.py")
PACKAGE = JOB.parents[2]
# Stage, and how many of them have begun when the process dies; each process goes on where the last one died.
MOMENTS = (("asking", 2), ("judging", 1), ("costs", 1), ("writing", 9))
FILES = ["mine-random-seed0", "mine-random-seed1", "mine-swapped", "mine", "none"]


def start(out: Path, pause: float) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(JOB), str(out), str(pause)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


@pytest.mark.skipif(sys.platform == "win32", reason="signals as on POSIX")
@pytest.mark.slow
def test_killed_again_and_again_nothing_is_lost_or_doubled(tmp_path: Path):
    whole, killed, moments = tmp_path / "whole", tmp_path / "killed", random.Random(3)
    with start(whole, 0) as job:
        assert job.wait(timeout=300) == 0, job.communicate()[1]
    reached = 0
    for stage, count in MOMENTS:
        with start(killed, 0.02) as job:
            assert job.stdout is not None
            for line in job.stdout:
                count -= line.strip() == stage
                if not count:
                    break
            else:
                pytest.fail(f"no {stage} was left: {job.communicate()[1]}")
            time.sleep(moments.uniform(0, 0.03))
            job.send_signal(signal.SIGKILL)
            assert job.wait(timeout=60) == -signal.SIGKILL
        assert not (killed / "metrics.json").exists()
        size = sum(path.stat().st_size for path in killed.rglob("*.jsonl"))
        assert size >= reached
        reached = size
    with start(killed, 0) as job:
        said = job.communicate(timeout=300)
        assert job.returncode == 0, said[1]
    # What was done before is not done again.
    assert said[0].count("asking") < 3 * len(FILES)
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
