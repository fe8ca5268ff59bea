"""From a name to a model and its processor: the embedded pocket VLM, or a folder or hub id of a Hugging Face VLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from steer_plugin import pocket
from steer_plugin.adapters import AttachedModel, attach
from steer_plugin.errors import InputError
from steer_plugin.families import family_of

POCKET = "pocket"


def load_model(name: str, device: str | None = None) -> AttachedModel:
    """Load and attach a plain Hugging Face VLM ("pocket" is the embedded one); see `load_plain`."""
    return attach(*load_plain(name, device))


def load_plain(name: str, device: str | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a Hugging Face VLM and its processor; `device` "auto" lets accelerate spread it over what there is.

    Raises:
        InputError: nothing there, or a processor that is only a tokenizer.
        FamilyError: a text-only or unknown model, before its weights are read.
    """
    if name == POCKET:
        return pocket.load()
    if (Path(name) / "config.json").is_file() and (Path(name) / "MODEL_CARD.md").is_file():
        return pocket.load(Path(name))
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
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
