"""What is done: an intervention is a set of writes, each with its own reads; pure torch, no framework, no method.

    h[mask] <- h[mask] + alpha * delta(h, context)[mask]          kind "add"
    h[mask] <- delta(h, context)[mask]                            kind "replace" (patching)

Sums, multiples and negation act on the added part, so they mean what vector algebra says. Reads at a site see every
write at earlier sites and none at their own; so do deltas, hence sums do not depend on their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from steer_plugin.atomic import JSON
from steer_plugin.context import Aside, Context, Delta, Read
from steer_plugin.errors import InputError
from steer_plugin.positions import Positions
from steer_plugin.sites import Site

# A number, one number per batch row, or either as a function of the step (0 = prompt, 1 = first token fed back, ...).
# int is named beside float because run-time checkers tell them apart.
Alpha = float | int | Float[Tensor, ""] | Float[Tensor, " row"] | Callable[[int], "float | int | Tensor"]


@dataclass(frozen=True)
class FixedVector:
    """delta = v: one vector for all rows (d_model,), or one per row (row, d_model)."""

    vector: Tensor

    def __call__(self, hidden: Float[Tensor, "row pos d_model"], context: Context) -> Tensor:
        """Return v, repeated over the beams of a row where there are more rows than vectors."""
        # Moved once per call: a copy from the host at every token would stall a GPU.
        if self.vector.ndim == 1:
            return context.once("vector", lambda: self.vector.to(hidden.device))
        return context.once(f"vectors of {hidden.shape[0]}", lambda: self._rows(hidden))

    def _rows(self, hidden: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row 1 d_model"]:
        return expand_rows(self.vector.to(hidden.device), hidden.shape[0], "steering vectors")[:, None]


def expand_rows(values: Tensor, rows: int, what: str) -> Tensor:
    """Repeat per-row values for beams or returned sequences (Hugging Face repeats each row in place).

    Raises:
        InputError: the batch is no multiple of the number of values.
    """
    if values.shape[0] == rows:
        return values
    if values.shape[0] == 0 or rows % values.shape[0]:
        raise InputError(f"{values.shape[0]} {what} do not fit a batch of {rows} rows; give one, or one per row.")
    return repeat(values, "row ... -> (row beam) ...", beam=rows // values.shape[0])


@dataclass(frozen=True)
class Write:
    """One change: at `site`, on `positions`, alpha * delta is added (or put in place).

    Attributes:
        reads: what the delta needs; values come in this order in its context.
        asides: texts whose own activations at this site it needs.
        unsteered: whether it needs the same tokens of an unsteered stream.
        width: d_model of what is written, to refuse it at another width before any work.
        made_for: identity of the model that an artefact was fitted on; another model refuses it.

    Raises:
        InputError: alpha is NaN or infinite.
    """

    site: Site
    positions: Positions
    delta: Delta
    alpha: Alpha = 1.0
    kind: Literal["add", "replace"] = "add"
    reads: tuple[Read, ...] = ()
    width: int | None = None
    made_for: Mapping[str, JSON] | None = None
    asides: tuple[Aside, ...] = ()
    unsteered: bool = False

    def __post_init__(self) -> None:
        """Refuse a strength that would poison the stream."""
        if not callable(self.alpha):
            check_alpha(self.alpha)

    @property
    def late(self) -> bool:
        """Whether some read lies at or behind the write in the network, so that one pass cannot do it."""
        return any(read.site.order > self.site.order for read in self.reads)

    @property
    def per_row(self) -> tuple[tuple[str, int], ...]:
        """What the write has one of per row (steering vectors, strengths), and for how many rows."""
        vector = self.delta.vector if isinstance(self.delta, FixedVector) else None
        found = [("steering vectors", vector.shape[0])] if vector is not None and vector.ndim == 2 else []
        if isinstance(self.alpha, Tensor) and self.alpha.ndim:
            found.append(("strengths", self.alpha.shape[0]))
        found += [("prompt pairs", len(aside.texts)) for aside in self.asides if len(aside.texts) > 1]
        return tuple(found)

    @property
    def silent(self) -> bool:
        """Whether alpha is zero for good: such a write is not lowered at all."""
        if self.kind == "replace" or callable(self.alpha):
            return False
        return not bool(self.alpha.any()) if isinstance(self.alpha, Tensor) else self.alpha == 0

    def alpha_at(self, step: int) -> float | int | Tensor:
        """Strength at a step: a number or one per row.

        Raises:
            InputError: a callable returned NaN or infinity.
        """
        if callable(self.alpha):
            value = self.alpha(step)
            check_alpha(value)
            return value
        return self.alpha


def check_alpha(alpha: float | int | Tensor) -> None:
    """Raise InputError unless alpha is finite."""
    finite = bool(torch.isfinite(alpha).all()) if isinstance(alpha, Tensor) else math.isfinite(alpha)
    if not finite:
        raise InputError(f"alpha must be a finite number, got {alpha!r}.")


def check_vector(vector: object, what: str = "steering vector") -> Tensor:
    """Return the vector as a detached float tensor (d_model,) or (row, d_model).

    Raises:
        InputError: wrong number of dimensions, NaN or infinite values.
    """
    if not isinstance(vector, Tensor):
        raise InputError(f"{what} must be a tensor (d_model,) or (row, d_model), got {type(vector).__name__}.")
    if vector.ndim not in (1, 2):
        raise InputError(f"{what} must have shape (d_model,) or (row, d_model), got {tuple(vector.shape)}.")
    if not bool(torch.isfinite(vector).all()):
        raise InputError(f"{what} holds {int((~torch.isfinite(vector)).sum())} NaN or infinite values.")
    return vector.detach().clone()


class Steerable:
    """Algebra and ways in, shared by interventions and by every method: a method need only say `intervention`."""

    @property
    def intervention(self) -> Intervention:
        """The reads and writes."""
        raise NotImplementedError

    def __add__(self, other: Steerable) -> Intervention:
        """Both interventions together."""
        return Intervention((*self.intervention.writes, *other.intervention.writes))

    def __radd__(self, other: int) -> Intervention:
        """Let `sum([...])` start from 0."""
        if other != 0:
            raise InputError(f"cannot add {other!r} to an intervention; add another intervention.")
        return self.intervention

    def __mul__(self, factor: Alpha) -> Intervention:
        """Every write `factor` times as strong (a number, one per row, or a function of the step)."""
        return Intervention(tuple(_scaled(write, factor) for write in self.intervention.writes))

    __rmul__ = __mul__

    def __neg__(self) -> Intervention:
        """The opposite intervention."""
        return self * -1.0

    def __sub__(self, other: Steerable) -> Intervention:
        """This one and the opposite of the other."""
        return self + -other

    def apply(self, vlm: AttachedLike, tracer: object | None = None) -> None:
        """Steer inside an nnsight block that the user wrote; see `vlm.apply`."""
        vlm.apply(self, tracer=tracer)

    def hooks(self, vlm: AttachedLike) -> list[tuple[str, Callable[..., Tensor]]]:
        """Return [(hook name, function)] for TransformerLens' `bridge.hooks(fwd_hooks=...)`; see `vlm.hooks`."""
        return vlm.hooks(self)

    def prepare(self, vlm: AttachedLike, inputs: Mapping[str, Tensor]) -> Intervention:
        """Do late reads beforehand, so that the result fits into one pass; see `vlm.prepare`."""
        return vlm.prepare(self, inputs)


@runtime_checkable
class AttachedLike(Protocol):
    """The part of an attached model that interventions call (adapters implement it)."""

    def apply(self, *steering: Steerable, tracer: object | None = None) -> None:
        """Steer inside the user's nnsight block."""
        ...

    def hooks(self, *steering: Steerable) -> list[tuple[str, Callable[..., Tensor]]]:
        """TransformerLens hooks."""
        ...

    def prepare(self, steering: Steerable, inputs: Mapping[str, Tensor]) -> Intervention:
        """Resolve late reads."""
        ...


@dataclass(frozen=True, repr=False)
class Intervention(Steerable):
    """Reads and writes as data; adapters lower it, methods make it."""

    writes: tuple[Write, ...]

    def __repr__(self) -> str:
        """Name what is written where, on which tokens and how strongly."""
        shown = [f"{w.kind} at {w.site} on {str(w.positions)!r}, alpha {w.alpha}" for w in self.writes]
        return f"Intervention({'; '.join(shown)})"

    @property
    def intervention(self) -> Intervention:
        """Itself."""
        return self

    @classmethod
    def of(cls, steering: Steerable | Sequence[Steerable]) -> Intervention:
        """One intervention from one steering object or a list of them."""
        items: Iterable[Steerable] = [steering] if isinstance(steering, Steerable) else steering
        return cls(tuple(write for item in items for write in item.intervention.writes))


def _scaled(write: Write, factor: Alpha) -> Write:
    if write.kind == "replace":
        raise InputError(f"a replacement at {write.site} cannot be scaled or negated; scale the value you put there.")
    old = write.alpha
    if callable(old) or callable(factor):
        first = old if callable(old) else lambda step: old
        second = factor if callable(factor) else lambda step: factor
        return replace(write, alpha=lambda step: first(step) * second(step))
    return replace(write, alpha=old * factor)


def add(site: Site | str, vector: Tensor, positions: Positions | str = "paper", alpha: Alpha = 1.0) -> Intervention:
    """Add a vector (d_model,), or one per row, at a site.

    Raises:
        InputError: NaN, infinite or wrongly shaped vector, alpha not finite.
        SiteError, PositionError: unknown names.
    """
    v = check_vector(vector)
    write = Write(Site.parse(site), Positions.parse(positions), FixedVector(v), alpha, width=v.shape[-1])
    return Intervention((write,))


def patch(site: Site | str, value: Tensor, positions: Positions | str) -> Intervention:
    """Put a vector (d_model,), or one per row, in place of what is there (activation patching)."""
    v = check_vector(value, "patch")
    write = Write(Site.parse(site), Positions.parse(positions), FixedVector(v), kind="replace", width=v.shape[-1])
    return Intervention((write,))
