"""Jobs of several processes as a script, for a launcher: _processes_job.py FOLDER STAGE... [--kill STAGE].

The second of the processes kills itself in the middle of the stage that --kill names.
"""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", OMP_NUM_THREADS="1")

import functools
import json
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from _colours import Colours, Lengths, numbers  # noqa: E402
from _steervlm_job import config, rows, vlm  # noqa: E402
from _tiny import D_MODEL, draw  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

import steer_plugin as sp  # noqa: E402
from steer_plugin.adapters import _bulk  # noqa: E402
from steer_plugin.adapters._extract import Extraction  # noqa: E402
from steer_plugin.contrast import ContrastivePair  # noqa: E402
from steer_plugin.evaluation import asking  # noqa: E402
from steer_plugin.evaluation.asking import Sampling  # noqa: E402
from steer_plugin.evaluation.calibrate import Calibration, calibrate  # noqa: E402
from steer_plugin.evaluation.evaluate import evaluate  # noqa: E402
from steer_plugin.evaluation.lineup import Lineup  # noqa: E402
from steer_plugin.evaluation.result import Evaluation  # noqa: E402
from steer_plugin.processes import Processes  # noqa: E402
from steer_plugin.training import steervlm  # noqa: E402

BATCH = 3  # four batches of questions


def evaluation(out: Path) -> Evaluation:
    """Drawn answers of a steering and its controls, judged, with costs."""
    steering = sp.MeanSteering(draw(D_MODEL, scale=3), "resid_post.2")
    return evaluate(
        vlm(), Colours(training=False, judges=[Lengths()]), Lineup(("none",), {"mine": steering}, seeds=(0, 1)), out,
        sampling=Sampling(seed=3), batch_size=BATCH, costed=9, progress=False,
    )  # fmt: skip


def calibration(out: Path) -> Calibration:
    """A strength chosen on the same questions."""
    asks = Colours(training=False).asks

    def even(texts: Mapping[str, str]) -> list[float]:
        return [float(sum(one % 2 == 0 for one in numbers(texts[ask.key]))) for ask in asks]

    steering = sp.MeanSteering(draw(D_MODEL, scale=3), "resid_post.2")
    return calibrate(
        vlm(), steering, asks, even, alphas=(0.5, 4.0), max_points=4, batch_size=BATCH, max_new_tokens=3,
        out=out / "points.jsonl", progress=False,
    )  # fmt: skip


def training(out: Path | None, batch: int, *, steps: int = 6, checkpointing: bool = False) -> sp.SteerVLM:
    """A few steps, a checkpoint behind every second one."""
    chosen = sp.SteerVLMTraining(
        steps=steps, batch_size=batch, learning_rate=1e-2, save_every=2, log_every=1, checkpointing=checkpointing
    )
    return sp.SteerVLM.fit(vlm(), rows(), config(), chosen, out=out, seed=5, progress=False)


def extraction(out: Path) -> sp.Shifts:
    """Vectors of a dozen pairs in six batches, three pairs about each picture."""
    pairs = [
        ContrastivePair(f"p{i}", (row.image,), f"w{10 + i} w11", "w20 w21", "w30", behaviour=f"b{i % 2}")
        for i, row in enumerate(row for row in rows(4) for _ in range(3))
    ]
    return vlm().extract(pairs, "resid_post.1", "resid_post.2", out / "shifts", batch_size=2, progress=False)


def extracting(killed: Path) -> None:
    """Extract, and die in the second batch, with the first one on disk."""
    extract, seen = Extraction.shifts, list[int]()

    def shifts(self: Extraction, batch: Any) -> Any:
        seen.append(1)
        if len(seen) == 2:
            while not (killed / "shifts" / "shard-1-000000.safetensors").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return extract(self, batch)

    Extraction.shifts = shifts
    _bulk.PATIENCE = 0.0
    extraction(killed)


def told(found: Evaluation | Calibration) -> dict[str, Any]:
    """What was found, without what only this process can know."""
    return {name: value for name, value in found.as_json().items() if name != "reused"}


def everything(out: Path, processes: Processes) -> None:
    """All jobs to their ends."""
    found, asked = evaluation(out), counted(None)
    evaluation(out)
    trained, chosen, shifts = training(out / "training", 4), calibration(out), extraction(out)
    save_file({"vectors": shifts.vectors, "contexts": shifts.contexts}, out / f"shifts-{processes.index}.safetensors")
    recomputed = training(None, 4, steps=2, checkpointing=True)
    keep(out, processes, trained, evaluation=told(found), asked_again=len(asked), calibration=told(chosen),
         recomputed=(recomputed.report or {})["history"])  # fmt: skip


def keep(out: Path, processes: Processes, trained: sp.SteerVLM, **found: object) -> None:
    """Write what this process has in its memory."""
    save_file(dict(trained.module.state_dict()), out / f"module-{processes.index}.safetensors")
    found["history"] = (trained.report or {})["history"]
    (out / f"found-{processes.index}.json").write_text(json.dumps(found))


def counted(log: Path | None) -> list[int]:
    """Count the batches that this process asks; with a log the second one is its last, half a line behind."""
    ask, asked = asking._ask, list[int]()

    def asking_one(*args: Any) -> Any:
        asked.append(1)
        if log is not None and len(asked) == 2:
            with log.open("ab") as file:
                file.write(b'{"id": "key')
            os.kill(os.getpid(), signal.SIGKILL)
        return ask(*args)

    asking._ask = asking_one
    return asked


def dying(folder: Path) -> Any:
    """A Trainer whose process dies in the fifth step, and has written half of its part of the last checkpoint."""

    class Dying(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                (folder / "checkpoint-4" / "rng_state_1.pth").write_bytes(b"PK half")
                os.kill(os.getpid(), signal.SIGKILL)

    return functools.partial(steervlm.Trainer, callbacks=[Dying()])


def main(folder: Path, stages: list[str], kill: str | None) -> None:
    processes, killed = Processes.current(), folder / "killed"
    for stage in stages:
        dies = stage == kill and processes.index == 1
        if stage == "whole":
            everything(folder / "whole", processes)
        elif stage == "evaluation":
            asked = counted(killed / "answers" / "none.jsonl.p1" if dies else None)
            found = evaluation(killed)
            (killed / f"asked-{processes.index}.json").write_text(json.dumps([len(asked), told(found)]))
        elif stage == "extraction":
            extracting(killed) if dies else extraction(killed)
        else:
            steervlm.Trainer = dying(killed / "training") if dies else steervlm.Trainer
            keep(killed, processes, training(killed / "training", 4))


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("stages", nargs="+", choices=["whole", "evaluation", "training", "extraction"])
    parser.add_argument("--kill")
    given = parser.parse_args()
    main(given.folder, given.stages, given.kill)
