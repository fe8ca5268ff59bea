"""A real extraction, killed with SIGKILL several times, ends as one that was never killed."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import _forked
import pytest
import torch

from steer_plugin import Shifts

JOB = """
import sys, time
from pathlib import Path
import steer_plugin as sp
from steer_plugin.adapters import _bulk, _extract
from steer_plugin.contrast import pocket_pairs

original = _extract.Extraction.shifts
def slow(self, pairs):
    time.sleep(0.15)
    return original(self, pairs)
_extract.Extraction.shifts = slow
_bulk.ShardWriter.__init__.__defaults__ = (8,)
vlm = sp.attach(*sp.pocket.load())
pairs = pocket_pairs(sp.pocket.World(0).questions(10, "train"))
print("started", flush=True)
vlm.extract(pairs, "resid_post.1", out=Path(sys.argv[1]), batch_size=4, progress=False)
"""


@pytest.mark.slow
def test_killed_extraction_resumes_with_nothing_lost_or_doubled(tmp_path: Path):
    script = tmp_path / "job.py"
    script.write_text(JOB)
    _forked.start(script, tmp_path / "whole").finish()
    for pause in (0.5, 1.0):
        with _forked.start(script, tmp_path / "killed") as job:
            job.stdout.readline()
            time.sleep(pause)
            job.send_signal(signal.SIGKILL)
            assert job.wait(timeout=60) == -signal.SIGKILL
    _forked.start(script, tmp_path / "killed").finish()
    one, two = Shifts.load(tmp_path / "whole"), Shifts.load(tmp_path / "killed")
    assert sorted(one.ids) == sorted(two.ids)
    order = [two.ids.index(i) for i in one.ids]
    assert torch.equal(one.vectors, two.vectors[order])
    assert torch.equal(one.contexts, two.contexts[order])
