"""From a name to a model and its processor: the embedded pocket VLM, or a folder or hub id of a Hugging Face VLM.

Of several processes each puts the model on a GPU of its own; one that is alone takes the first, or all with "auto".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from steer_plugin import pocket
from steer_plugin.adapters import AttachedModel, attach
from steer_plugin.errors import InputError
from steer_plugin.families import family_of
from steer_plugin.processes import Processes

POCKET = "pocket"


def load_model(name: str, device: str | None = None) -> AttachedModel:
    """Load and attach a plain Hugging Face VLM ("pocket" is the embedded one); see `load_plain`."""
    return attach(*load_plain(name, device))


def load_plain(name: str, device: str | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a Hugging Face VLM and its processor; `device` "auto" lets accelerate spread it over what there is.

    The embedded model is small enough to stay on the CPU where no device is named.

    Raises:
        InputError: nothing there, a processor that is only a tokenizer, or "auto" in several processes.
        FamilyError: a text-only or unknown model, before its weights are read.
    """
    processes = Processes.current()
    if device == "auto" and processes.several:
        raise InputError(
            f"device 'auto' spreads one model over all GPUs, and {processes.count} processes were started, each with a "
            "model of its own: start one process, or leave the device out."
        )
    folder = Path(name)
    if name == POCKET or all((folder / file).is_file() for file in ("config.json", "MODEL_CARD.md")):
        small, processor = pocket.load() if name == POCKET else pocket.load(folder)
        return (small if device in (None, "auto") else cast(Any, small).to(device)), processor
    where = device or processes.device()
    try:
        family_of(AutoConfig.from_pretrained(name))
        processor = AutoProcessor.from_pretrained(name)
        # The dtype of the weights; "auto" would keep bf16 on a CPU, where it is slow.
        dtype = torch.float32 if where == "cpu" else torch.bfloat16
        spread = {"device_map": "auto"} if where == "auto" else {}
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, **spread)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"cannot load the model {name!r}: {error}. Give 'pocket', a folder that save_pretrained made, or a hub id."
        ) from error
    if not isinstance(processor, ProcessorMixin):
        raise InputError(
            f"{name!r} gave only a {type(processor).__name__} where a processor for images and text was expected; "
            "its image processor may need a package that is not installed (torchvision, for Qwen's)."
        )
    loaded = cast(PreTrainedModel, model).eval()
    stays = spread or getattr(loaded, "is_quantized", False)  # quantised weights lie where they were loaded
    return (loaded if stays else cast(Any, loaded).to(where)), processor
