"""Bounds on the damage that steering may do, points of a curve over strengths, and what is steered at a strength.

    KLBound       mean KL(steered || unsteered) per token along the unsteered model's own answers <= limit
    QualityBound  1 - mean quality of the steered answers / mean quality of the unsteered ones    <= drop

A loss of quality below 10 % is the bound of Learning to Steer (arXiv 2508.12815); KL needs no judge of quality.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from steer_plugin.atomic import JSON
from steer_plugin.errors import FrameworkError, InputError
from steer_plugin.evaluation.intervals import Interval
from steer_plugin.intervention import Steerable

if TYPE_CHECKING:
    from pandas import DataFrame
else:
    DataFrame = object  # imported when needed; run-time type checkers look the name up

Scores: TypeAlias = NDArray[np.float64]
# From {key: answer} to one number per item, higher is better; NaN does not count.
Behaviour: TypeAlias = Callable[[Mapping[str, str]], Sequence[float]]
# From the ids of a batch and a strength to what steers it.
Maker: TypeAlias = Callable[[Sequence[str], float], Steerable | None]
Steered: TypeAlias = Steerable | Maker
Where: TypeAlias = tuple[str, float]

UNSTEERED: Where = ("", 0.0)


@runtime_checkable
class Scalable(Protocol):
    """A method with a strength of its own (L2S, MeanSteering, SteerVLM)."""

    def with_alpha(self, alpha: float) -> Steerable:
        """The same at another strength."""
        ...


@dataclass(frozen=True)
class KLBound:
    """At most `limit` nats per token of KL(steered || unsteered), along the unsteered model's own answers.

    Raises:
        InputError: a limit that is not above 0.
    """

    limit: float | int = 0.5

    kind = "kl"
    label = "KL to unsteered (nats per token)"

    def __post_init__(self) -> None:
        """Refuse a limit that nothing, or everything, meets."""
        check_number("limit", self.limit, "nats per token above 0, as 0.5", 0 < self.limit < math.inf)


@dataclass(frozen=True)
class QualityBound:
    """At most the share `drop` of the unsteered answers' mean quality is lost; NaN does not count.

    Raises:
        InputError: a drop that is no share.
    """

    quality: Behaviour
    drop: float | int = 0.1

    kind = "quality"
    label = "relative loss of quality"

    def __post_init__(self) -> None:
        """Refuse a share that nothing, or everything, meets."""
        check_number("drop", self.drop, "a share between 0 and 1, as 0.1 for 10 %", 0 < self.drop < 1)

    @property
    def limit(self) -> float | int:
        """The largest damage."""
        return self.drop


Bound: TypeAlias = KLBound | QualityBound


@dataclass(frozen=True)
class Point:
    """One strength (of one layer or choice, by its name): what it does, and at what damage.

    Attributes:
        feasible: whether the damage is within the bound.
        n: how many items counted for the behaviour.
        scores, costs: behaviour and damage of each item, in the items' order; NaN does not count.
        texts: the answers by key.
    """

    name: str
    alpha: float
    behaviour: Interval
    damage: Interval
    feasible: bool
    n: int
    scores: Scores = field(repr=False, compare=False)
    costs: Scores = field(repr=False, compare=False)
    texts: Mapping[str, str] = field(repr=False, compare=False)

    @property
    def where(self) -> Where:
        """Name and strength."""
        return self.name, self.alpha

    def as_json(self) -> dict[str, JSON]:
        """Figures and intervals; a damage beyond all measure is null."""
        row: dict[str, JSON] = {"name": self.name, "alpha": self.alpha}
        for what, one in (("behaviour", self.behaviour), ("damage", self.damage)):
            for key, value in (("", one.value), ("_low", one.low), ("_high", one.high)):
                row[what + key] = value if math.isfinite(value) else None
        return {**row, "feasible": self.feasible, "n": self.n}


def to_frame(points: Sequence[Point]) -> DataFrame:
    """A pandas table, one row per point.

    Raises:
        FrameworkError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise FrameworkError("tables of points need pandas: pip install 'steer-plugin[analysis]'.") from error
    return pd.DataFrame([point.as_json() for point in points])


def named(steering: Steered | Mapping[str, Steered], alone: str = "steering") -> dict[str, Steered]:
    """What is steered by its name; one without a name is called `alone`.

    Raises:
        InputError: nothing to steer by, an empty name, or something that has no strength.
    """
    found = dict(steering) if isinstance(steering, Mapping) else {alone: steering}
    for name, one in found.items():
        if not isinstance(name, str) or not name:
            raise InputError(f"{name!r} names no choice; use names such as 'layer 14', as in {{'layer 14': l2s}}.")
        if not isinstance(one, Steerable) and not callable(one):
            raise InputError(
                f"{name!r} is a {type(one).__name__}; give a steering (L2S, MeanSteering, ...) or a function of (ids "
                "of a batch, alpha) that returns one."
            )
    if not found:
        raise InputError("got no steering; give one, or several by name, as in {'layer 14': l2s}.")
    return found


def at_strength(steering: Steered, alpha: float | int) -> Steerable | Callable[[Sequence[str]], Steerable | None]:
    """The steering at a strength: its own `with_alpha`, a multiple where it has none, or a function of the ids."""
    if isinstance(steering, Steerable):
        return steering.with_alpha(alpha) if isinstance(steering, Scalable) else steering * alpha
    return lambda ids: steering(ids, alpha)


def identity(steering: Steered) -> dict[str, JSON]:
    """What tells one steering from another in a file: its class, its writes, and a digest of its tensors."""
    if not isinstance(steering, Steerable):
        return {"function": getattr(steering, "__qualname__", type(steering).__qualname__)}
    digest = hashlib.sha256()
    writes = steering.intervention.writes
    for tensor in (
        one for held in (vars(steering), *(_held(write.delta) for write in writes)) for one in _tensors(held)
    ):
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    shown = [f"{w.kind} {w.site} {w.positions} {[(str(r.site), str(r.positions)) for r in w.reads]}" for w in writes]
    return {"class": type(steering).__name__, "writes": shown, "tensors": digest.hexdigest()}


def _held(delta: object) -> Mapping[str, object]:
    return cast("Mapping[str, object]", getattr(delta, "__dict__", {}))


def _tensors(held: Mapping[str, object]) -> list[Tensor]:
    out: list[Tensor] = []
    for _, value in sorted(held.items()):
        if isinstance(value, Tensor):
            out.append(value)
        elif isinstance(value, nn.Module):
            out += [tensor for _, tensor in sorted(value.state_dict().items())]
    return out


def check_number(name: str, value: float | int, expected: str, fine: bool) -> None:
    """Raise InputError unless a number is fine."""
    if not fine:
        raise InputError(f"{name}={value!r} cannot be used: expected {expected}.")
