"""An evaluation as a script, to be killed: python _eval_job.py FOLDER PAUSE; prints each stage before it begins."""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", OMP_NUM_THREADS="1")

import sys
import time
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _colours import Colours, Lengths  # noqa: E402
from _tiny import D_MODEL, draw, tiny_llava, tiny_processor  # noqa: E402

import steer_plugin as sp  # noqa: E402
from steer_plugin.evaluation import asking, cost_log  # noqa: E402
from steer_plugin.evaluation.evaluate import evaluate  # noqa: E402
from steer_plugin.evaluation.lineup import Lineup  # noqa: E402


def announced(owner: Any, name: str, stage: str, pause: float) -> None:
    """Let a function say that it begins, and take its time before and after."""
    original = getattr(owner, name)

    def slow(*args: Any, **options: Any) -> Any:
        sys.stdout.write(f"{stage}\n")
        sys.stdout.flush()
        time.sleep(pause)
        found = original(*args, **options)
        time.sleep(pause)
        return found

    setattr(owner, name, slow)


def main(out: Path, pause: float) -> None:
    announced(asking, "_ask", "asking", pause)
    announced(cost_log, "_batch", "costs", pause)
    announced(Lengths, "judge", "judging", pause)
    # Between the bytes of a line and the word of the disk that it has them.
    announced(os, "fsync", "writing", pause / 2)
    steering = sp.MeanSteering(draw(D_MODEL, scale=3), "resid_post.2")
    evaluate(
        sp.attach(tiny_llava(), tiny_processor()), Colours(training=False, judges=[Lengths()]),
        Lineup(("none",), {"mine": steering}, seeds=(0, 1)), out, batch_size=5, costed=9, progress=False,
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
