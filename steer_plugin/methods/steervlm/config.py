"""What SteerVLM's paper fixes is code in `module.py`; what it leaves open is a field here, with its default's reason.

Fixed (arXiv 2510.26769): one steerer and one gate for all layers at attn_out, down-projection by 8, two layers of
multi-head attention, z = x + lambda * g * s. Not published: everything below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal, cast, get_args

from steer_plugin.atomic import JSON
from steer_plugin.errors import ArtefactError, InputError

Norm = Literal["pre", "none"]
PairForm = Literal["tokens", "mean", "last"]
Start = Literal["copy", "normal"]
Width = Literal["model", "bottleneck"]
Down = Literal["shared", "own"]
Form = Literal["chat", "bare"]
Picture = Literal["none", "input"]


@dataclass(frozen=True)
class SteerVLMConfig:
    """Sizes of the model that is steered, and every choice that was not published.

    Attributes:
        d_model, n_layers: width and depth of the text decoder.
        reduction: the down-projection's factor; 8 is published.
        heads: of both attention layers. 8: heads of 64 dimensions at d_model 4096, as wide as common models have.
        norm: "pre" normalises what the attention and the gate look at, because one module sees every layer and
            attn_out grows by a factor of 100 over them; what flows on to s keeps its scale. "none" leaves it out.
        residual: h <- h + attention(h). Without it s would forget x, whose scale it must match.
        bias: biases in every linear layer; with them the steerer has the 6,300,160 parameters that fit the paper's
            0.14 %.
        types: learnt embeddings that tell x, u, p+ and p- apart; attention over a set could not know target from
            converse without them.
        pair: what attention sees of p+ and p-: every "tokens" (a mask over "prompt-pair tokens" is published), their
            "mean", or the "last" one.
        gate_width: "model" gates all d_model dimensions of s ("one factor per hidden dimension"), "bottleneck" those
            of s before its up-projection.
        gate_down: "shared" uses the steerer's down-projection in the gate (9.45 M parameters at d_model 4096), "own"
            gives it one of its own.
        start: "copy" begins with what attention gathers handed on as it is (up = down transposed, values and outputs
            the identity, all small): what p+ is about is then named by a short way, which on the pocket model halves
            the loss after 500 steps. "normal" begins with torch's own weights and a small up-projection.
        form: p+ and p- as "chat" turns of a user, which is what the model was tuned on, or as "bare" text.
        picture: "none": p+ and p- are read without a picture, once per pair and model; "input": behind the
            picture of each input, at the price of two short passes per input.
        unsteered, gate: False leaves out u, or the gate (ablations).

    Raises:
        InputError: sizes that do not divide, unknown words.
    """

    d_model: int
    n_layers: int
    reduction: int = 8
    heads: int = 8
    norm: str = "pre"
    residual: bool = True
    bias: bool = True
    types: bool = True
    pair: str = "tokens"
    gate_width: str = "model"
    gate_down: str = "shared"
    start: str = "copy"
    form: str = "chat"
    picture: str = "none"
    unsteered: bool = True
    gate: bool = True

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layers", "reduction", "heads"):
            if int(getattr(self, name)) < 1:
                raise InputError(f"SteerVLM {name} must be at least 1, got {getattr(self, name)!r}.")
        if self.d_model % self.reduction or self.width % self.heads:
            raise InputError(
                f"SteerVLM needs d_model ({self.d_model}) to be a multiple of reduction ({self.reduction}), and the "
                f"quotient a multiple of heads ({self.heads}); choose another reduction or fewer heads."
            )
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"SteerVLM {name} must be one of {', '.join(map(repr, allowed))}, got {getattr(self, name)!r}."
                )

    @property
    def width(self) -> int:
        """Dimensions of the bottleneck."""
        return self.d_model // self.reduction

    @property
    def aside(self) -> tuple[Form, Picture]:
        """How p+ and p- are read."""
        return cast("Form", self.form), cast("Picture", self.picture)

    def as_json(self) -> dict[str, JSON]:
        """Every field."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, JSON]) -> SteerVLMConfig:
        """Read what `as_json` wrote.

        Raises:
            ArtefactError: other fields than this version has.
        """
        known = {field.name for field in fields(cls)}
        if set(stored) != known:
            odd = ", ".join(sorted(set(stored) ^ known))
            raise ArtefactError(
                f"the SteerVLM config has other fields than this version knows ({odd}); train it again."
            )
        return cls(**dict(stored))  # pyright: ignore[reportArgumentType]


_CHOICES: dict[str, tuple[str, ...]] = {
    "norm": get_args(Norm),
    "pair": get_args(PairForm),
    "gate_width": get_args(Width),
    "gate_down": get_args(Down),
    "start": get_args(Start),
    "form": get_args(Form),
    "picture": get_args(Picture),
}
