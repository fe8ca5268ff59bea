"""A small training as a script, to be killed or distributed: python _steervlm_job.py FOLDER [--gradients FILE]."""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", OMP_NUM_THREADS="1")

import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _tiny import D_MODEL, LAYERS, tiny_llava, tiny_processor  # noqa: E402

import steer_plugin as sp  # noqa: E402


def rows(count: int = 16) -> list[sp.SteeringRow]:
    """Pictures of one colour each, and answers of different lengths."""
    return [
        sp.SteeringRow(
            id=f"row-{i}", image=Image.new("RGB", (16, 16), (15 * i, 255 - 15 * i, 90)), task=f"w{10 + i % 3} w11",
            p_plus=f"w{20 + i % 4} w25", p_minus=f"w{30 + i % 4}", answer=" ".join(["w40", "w41", "w42"][: 1 + i % 3]),
        )
        for i in range(count)
    ]  # fmt: skip


def vlm() -> Any:
    return sp.attach(tiny_llava(), tiny_processor())


def config() -> sp.SteerVLMConfig:
    return sp.SteerVLMConfig(D_MODEL, LAYERS, reduction=2, heads=4)


def main(folder: Path, gradients: Path | None, batch: int, accumulate: int, steps: int) -> None:
    if gradients is not None:
        keep_gradients(gradients)
    training = sp.SteerVLMTraining(
        steps=steps, batch_size=batch, accumulate=accumulate, learning_rate=1e-2, save_every=2, log_every=1
    )
    sp.SteerVLM.fit(vlm(), rows(), config(), training, out=folder, seed=5, progress=False)


def keep_gradients(path: Path) -> None:
    """Write the gradients of the first optimiser step."""
    clip = torch.nn.utils.clip_grad_norm_

    def keeping(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        found = list(parameters)
        if int(os.environ.get("RANK", "0")) == 0 and not path.exists():
            torch.save([p.grad.clone() for p in found], path)
        return clip(found, *args, **kwargs)

    torch.nn.utils.clip_grad_norm_ = keeping


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gradients", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    asked = parser.parse_args()
    main(asked.folder, asked.gradients, asked.batch, asked.accumulate, asked.steps)
