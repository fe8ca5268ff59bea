"""Where the pocket VLM is steered where nobody says otherwise: layers to choose from, and positions, by benchmark.

Existence is decided at the last prompt token: steering the generated ones too, at strengths that matter, breaks what
follows the first word. Requests and captions are steered while they are generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from steer_plugin.methods import SteerVLM
from steer_plugin.pocket import trained


class Usual(NamedTuple):
    """Pairs of (write, read) to choose from, and tokens to write on."""

    layers: tuple[tuple[str, str], ...]
    positions: str


def _sites(*pairs: tuple[int, int]) -> tuple[tuple[str, str], ...]:
    return tuple((f"resid_post.{write}", f"resid_post.{read}") for write, read in pairs)


USUAL: Mapping[str, Usual] = MappingProxyType(
    {
        "pope": Usual(_sites((1, 1), (1, 2), (2, 3)), "last_prompt"),
        "ohd": Usual(_sites((1, 1), (1, 2), (2, 3)), "last_prompt"),
        "chair": Usual(_sites((1, 3), (2, 3)), "last_prompt|generated"),
        "mmsafety": Usual(_sites((1, 3), (2, 3)), "last_prompt|generated"),
        "vnia": Usual(_sites((1, 1), (2, 2)), "last_prompt|generated"),
    }
)


def packaged_steervlm() -> SteerVLM:
    """The SteerVLM that ships with the pocket VLM, without a pair."""
    return SteerVLM.load(trained("steervlm"))
