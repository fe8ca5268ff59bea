"""What the checks are made with: two prompts, a picture that is the same everywhere, and the scores of an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from steer_plugin.errors import InputError

if TYPE_CHECKING:
    from steer_plugin.adapters._attached import AttachedModel

PROMPTS = ("Describe the image.", "What is the main colour of this picture? Answer with one word.")


class Scores:
    """Keeps the scores of every step of a generation."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.kept.append(scores.float().clone())
        return scores


def own_inputs(vlm: AttachedModel) -> dict[str, Tensor]:
    """One prompt with one picture.

    Raises:
        InputError: the model was attached without its processor.
    """
    if vlm.processor is None:
        raise InputError("vlm.check() needs the model's processor, or inputs of your own: vlm.check(inputs).")
    return vlm.inputs(PROMPTS[0], [stripes()])


def stripes() -> Image.Image:
    """A picture of coloured stripes: the same everywhere, and nothing to download."""
    side = 224
    x, y = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy")
    pixels = torch.stack([x * 7 % 256, y * 5 % 256, (x + y) * 3 % 256], -1).to(torch.uint8)
    return Image.fromarray(pixels.numpy(), "RGB")
