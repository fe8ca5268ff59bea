"""A pocket VLM and its drawn world: a trained LLaVA of 1.3 M parameters that errs measurably, and the truth to tell.

`World` draws scenes, questions, requests, stances and captions, `export` writes them in published formats; `load` gives
the packaged model and processor; `evaluate`, `conduct`, `chair` and `show` measure and picture what the model says;
`train` makes such a model from scratch on a CPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steer_plugin.pocket.compliance import conduct
    from steer_plugin.pocket.evaluation import evaluate, is_caption
    from steer_plugin.pocket.formats import export
    from steer_plugin.pocket.hallucination import chair, mentioned
    from steer_plugin.pocket.model import load, trained
    from steer_plugin.pocket.repair import steerability
    from steer_plugin.pocket.requests import Wish, outcome, right_expert, unsafe
    from steer_plugin.pocket.scene import Scene, SceneObject
    from steer_plugin.pocket.sheet import show
    from steer_plugin.pocket.stances import ANY_WORD, HELD_TOPICS, SEEN_TOPICS, Stance, StancePair, attitude, shown
    from steer_plugin.pocket.training import train
    from steer_plugin.pocket.world import CaptionCase, Question, Request, StanceCase, World

__all__ = [
    "ANY_WORD",
    "HELD_TOPICS",
    "SEEN_TOPICS",
    "CaptionCase",
    "Question",
    "Request",
    "Scene",
    "SceneObject",
    "Stance",
    "StanceCase",
    "StancePair",
    "Wish",
    "World",
    "attitude",
    "chair",
    "conduct",
    "evaluate",
    "export",
    "is_caption",
    "load",
    "mentioned",
    "outcome",
    "right_expert",
    "show",
    "shown",
    "steerability",
    "train",
    "trained",
    "unsafe",
]

# Torch and transformers take seconds to import: a name is fetched when it is first used.
_HOMES = {
    "ANY_WORD": "stances",
    "HELD_TOPICS": "stances",
    "SEEN_TOPICS": "stances",
    "attitude": "stances",
    "CaptionCase": "world",
    "Question": "world",
    "Request": "world",
    "Scene": "scene",
    "SceneObject": "scene",
    "Stance": "stances",
    "StanceCase": "world",
    "StancePair": "stances",
    "Wish": "requests",
    "World": "world",
    "chair": "hallucination",
    "conduct": "compliance",
    "evaluate": "evaluation",
    "export": "formats",
    "is_caption": "evaluation",
    "load": "model",
    "mentioned": "hallucination",
    "outcome": "requests",
    "right_expert": "requests",
    "show": "sheet",
    "shown": "stances",
    "steerability": "repair",
    "train": "training",
    "trained": "model",
    "unsafe": "requests",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
