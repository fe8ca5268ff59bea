"""What a delta may look at: values read in this call, texts read beforehand, its unsteered twin, the step, a memory.

A method says what it needs with `Read`, `Aside` and `Write.unsteered`; adapters decide how many passes that takes.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar, cast, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from steer_plugin.errors import InputError
from steer_plugin.positions import Positions
from steer_plugin.sites import Site

T = TypeVar("T")


@dataclass(frozen=True)
class Read:
    """A value that a delta needs: the mean over `positions` of the prompt forward at `site`, (row, d_model)."""

    site: Site
    positions: Positions

    @classmethod
    def at(cls, site: Site | str, positions: Positions | str) -> Read:
        """Build a read from a site and positions, or their texts."""
        return cls(Site.parse(site), Positions.parse(positions))


@dataclass(frozen=True)
class Aside:
    """A text of its own whose unsteered activations a delta needs at its write's site: one for all, or one per row.

    Attributes:
        texts: the texts.
        form: the text alone ("bare"), or as a user's turn of the chat template ("chat"); only the text's own tokens are
            handed on.
        picture: "none", or "input" to read the text behind the picture of each input.

    Raises:
        InputError: no text, or an empty one.
    """

    texts: tuple[str, ...]
    form: Literal["chat", "bare"] = "chat"
    picture: Literal["none", "input"] = "none"

    def __post_init__(self) -> None:
        """Refuse what has no tokens."""
        if not self.texts or not all(text.strip() for text in self.texts):
            raise InputError(f"a prompt of a pair must be a text that is not empty, got {list(self.texts)!r}.")


@dataclass(frozen=True)
class AsideTokens:
    """Activations of an aside at one site, padded at the end; `row` is 1 when one text serves all rows."""

    tokens: Float[Tensor, "row pos d_model"]
    real: Bool[Tensor, "row pos"]


@dataclass
class Context:
    """What a delta may look at: the values read in this call, the step, and a memory that lives as long as the call.

    Attributes:
        reads: one (row, d_model) tensor for each Read of the write, in its order.
        step: 0 in the prompt forward, then 1, 2, ... for each token fed back.
        rows: rows of the hidden state (beams included).
        memory: whatever the delta wants to keep from step to step; dropped with the call.
        unsteered: the same tokens at the same site in a stream without any write, where the write asks for it.
        asides: one entry for each Aside of the write.
        note: where somebody records, takes a name and a (row, pos, dim) tensor of intermediate values; otherwise None.
    """

    reads: tuple[Float[Tensor, "row d_model"], ...]
    step: int
    rows: int
    memory: MutableMapping[str, object] = field(default_factory=dict)
    unsteered: Float[Tensor, "row pos d_model"] | None = None
    asides: tuple[AsideTokens, ...] = ()
    note: Callable[[str, Tensor], None] | None = None

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Return memory[name], made on first use: a network runs once per call, not once per token."""
        if name not in self.memory:
            self.memory[name] = make()
        return cast("T", self.memory[name])


@runtime_checkable
class Delta(Protocol):
    """What is added: maps (row, pos, d_model) and a context to a tensor that broadcasts to (row, pos, d_model)."""

    def __call__(self, hidden: Float[Tensor, "row pos d_model"], context: Context) -> Tensor:
        """Return the addend; never change `hidden`."""
        ...
