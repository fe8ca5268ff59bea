"""`lmms-eval --model steer_plugin --model_args pretrained=...,steering=...`: a steered model by name.

lmms-eval finds `manifest` through the entry point group "lmms_eval.models", wherever this package is installed.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from steer_plugin.cli_steering import load_steering
from steer_plugin.errors import InputError
from steer_plugin.evaluation.lmms import SteeredTasks, lmms_class
from steer_plugin.loading import load_model

MODEL = "steer_plugin"


def manifest() -> Any:
    """Return what lmms-eval registers: the model's name, and where its class is."""
    made: Any = import_module("lmms_eval.models.registry_v2").ModelManifest
    return made(model_id=MODEL, simple_class_path=f"{__name__}.NamedLMM")


@cache
def named_class() -> type[Any]:
    """Make the class that lmms-eval builds from `--model_args`; FrameworkError without lmms-eval."""
    base: Any = lmms_class()

    class NamedLMM(base):
        """A model and a saved steering by their names."""

        def __init__(
            self,
            pretrained: str = "pocket",
            steering: str = "",
            scale: float = 1.0,
            batch_size: int | str = 1,
            device: str | None = None,
            max_batch_size: int | None = None,
            **options: Any,
        ) -> None:
            vlm = load_model(str(pretrained), device)
            made = load_steering(Path(str(steering))) if steering else None
            if made is None and scale != 1:
                raise InputError(f"scale is {scale} without a steering: add steering=FOLDER to --model_args.")
            scaled = made if made is None or scale == 1 else made * scale
            super().__init__(SteeredTasks(vlm, scaled, batch_size=int(batch_size), **options))

    return NamedLMM


def __getattr__(name: str) -> object:
    if name == "NamedLMM":
        return named_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
