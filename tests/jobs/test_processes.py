"""Two processes under `accelerate launch`: what one process finds, also when one of them was killed in the middle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import steer_plugin as sp

sys.path.insert(0, str(Path(__file__).parent))

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="signals as on POSIX")]

JOB = Path(__file__).with_name("_processes_job.py")
# --multi_gpu is what makes accelerate start several processes; without GPUs they talk by gloo. Port 0: any free one.
LAUNCH = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--main_process_port=0")
LAUNCH += ("--mixed_precision=no", "--dynamo_backend=no")


def launched(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(JOB.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *LAUNCH, str(JOB), str(folder), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


def files(folder: Path) -> dict[str, bytes]:
    """Everything that an evaluation and a calibration wrote."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".safetensors" and not {"training", "shifts"} & set(path.parts)
        and not path.name.startswith(("found-", "asked-"))
    }  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Any]:
    """What one process finds, and a training of it with batches of twice the size."""
    import _processes_job as job

    folder = tmp_path_factory.mktemp("alone")
    found = {"evaluation": job.told(job.evaluation(folder)), "calibration": job.told(job.calibration(folder))}
    return folder, found, job.training(None, 8)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave: "whole" never killed, "killed" thrice: asking, training, extracting."""
    folder = tmp_path_factory.mktemp("together")
    first = launched(folder, "whole", "evaluation", "--kill=evaluation")
    assert first.returncode != 0 and "SIGKILL" in first.stderr, first.stderr
    # The main one was ended by the launcher, and the dead one left half a line of its own.
    assert (folder / "killed" / "answers" / "none.jsonl.p1").read_bytes().endswith(b'\n{"id": "key')
    assert not (folder / "killed" / "metrics.json").exists()
    second = launched(folder, "evaluation", "training", "--kill=training")
    assert second.returncode != 0 and "SIGKILL" in second.stderr, second.stderr
    assert (folder / "killed" / "training" / "checkpoint-4").is_dir()
    assert not (folder / "killed" / "training" / "steervlm").exists()
    third = launched(folder, "training", "extraction", "--kill=extraction")
    assert third.returncode != 0 and "SIGKILL" in third.stderr, third.stderr
    return folder


def in_memory(folder: Path, name: str = "found") -> list[Any]:
    return [json.loads((folder / f"{name}-{index}.json").read_text()) for index in range(2)]


@pytest.mark.parametrize("which", ["whole", "killed"])
def test_the_files_are_those_of_one_process(together: Path, alone, which: str):
    expected = files(alone[0])
    if which == "killed":
        expected.pop("points.jsonl")
    assert len(expected) > 15
    assert files(together / which) == expected


def test_every_process_has_the_whole_result(together: Path, alone):
    expected = json.loads(json.dumps(alone[1]))
    for found in in_memory(together / "whole"):
        assert {name: found[name] for name in expected} == expected
        assert found["asked_again"] == 0
    assert [found for _, found in in_memory(together / "killed", "asked")] == [expected["evaluation"]] * 2


def test_what_was_answered_is_not_asked_again(together: Path):
    # Five runs of four batches; the first process had asked one of its two of "none" before the other died, or both.
    first, second = (asked for asked, _ in in_memory(together / "killed", "asked"))
    assert (first, second) in ((8, 9), (9, 9), (10, 9))


def test_both_processes_train_the_same_module(together: Path, alone):
    from _processes_job import config

    first, second = (load_file(together / "whole" / f"module-{index}.safetensors") for index in range(2))
    saved = sp.SteerVLM.load(together / "whole" / "training" / "steervlm").module.state_dict()
    one, start = alone[2].module.state_dict(), sp.SteerVLM.new(config(), 5).module.state_dict()
    assert set(first) == set(second) == set(one)
    assert all(torch.equal(value, second[name]) and torch.equal(value, saved[name]) for name, value in first.items())
    # Adam blows rounding up where a gradient is almost zero: how far apart, beside how far they went.
    assert distance(first, one) < 5e-3 * distance(start, one)


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return float(torch.cat([(value - other[name]).flatten() for name, value in one.items()]).norm())


def test_two_batches_of_four_learn_as_one_of_eight(together: Path, alone):
    losses = [entry["loss"] for entry in alone[2].report["history"]]
    for found in in_memory(together / "whole"):
        assert [entry["loss"] for entry in found["history"]] == pytest.approx(losses, rel=1e-4)
        assert found["recomputed"][0]["loss"] == pytest.approx(losses[0], rel=1e-4)
    assert losses[-1] < losses[0]


def test_a_killed_training_ends_at_the_same_weights(together: Path):
    whole, killed = together / "whole", together / "killed"
    for index in range(2):
        first, second = (load_file(folder / f"module-{index}.safetensors") for folder in (whole, killed))
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    first, second = in_memory(whole)[0], in_memory(killed)[0]
    assert first["history"] == second["history"]


def test_an_extraction_in_two_processes_is_that_of_one(together: Path, alone):
    import _processes_job as job

    one = job.extraction(alone[0])
    for index in range(2):
        found = load_file(together / "whole" / f"shifts-{index}.safetensors")
        assert torch.equal(found["vectors"], one.vectors)
        assert torch.equal(found["contexts"], one.contexts)
    with pytest.raises(sp.JobError, match="not finished"):
        sp.Shifts.load(together / "killed" / "shifts")
    resumed = job.extraction(together / "killed")  # by one process
    assert resumed.ids == one.ids
    assert torch.equal(resumed.vectors, one.vectors)
    assert torch.equal(resumed.contexts, one.contexts)
