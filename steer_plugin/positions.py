"""Which tokens are read and written: a small algebra of named classes, `|`, `&`, `~`, and parentheses in strings.

    last_prompt | generated        image & ~prompt        "last_prompt|generated"

Padding is never selected. `generated` are the tokens fed back while decoding; the first answer token is decided at
`last_prompt`, so methods default to "last_prompt|generated" (preset "paper"); "everywhere" is the L2S authors' code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from steer_plugin.errors import PositionError, nearest
from steer_plugin.layout import TokenLayout

NAMES = ("image", "text", "prompt", "user_end", "last_prompt", "completion", "generated", "everywhere")
PRESETS = {"paper": "last_prompt|generated", "authors_code": "everywhere"}
# Which names hold for a token that is fed back while decoding.
_WHILE_DECODING = {"text", "generated", "everywhere"}


@dataclass(frozen=True)
class Positions:
    """A set of tokens, as an expression over the named classes; combine with `|`, `&` and `~`."""

    op: Literal["name", "or", "and", "not"]
    name: str = ""
    parts: tuple[Positions, ...] = ()

    @classmethod
    def parse(cls, text: str | Positions) -> Positions:
        """Read an expression such as "last_prompt|generated" or "image & ~(prompt)", or a preset's name.

        Raises:
            PositionError: a name that is not known (the nearest is proposed), or broken syntax.
        """
        if isinstance(text, Positions):
            return text
        return _Parser(text).parse()

    def __or__(self, other: Positions | str) -> Positions:
        """Tokens of either."""
        return Positions("or", parts=(self, Positions.parse(other)))

    def __and__(self, other: Positions | str) -> Positions:
        """Tokens of both."""
        return Positions("and", parts=(self, Positions.parse(other)))

    def __invert__(self) -> Positions:
        """All other real tokens; padding stays out."""
        return Positions("not", parts=(self,))

    def __str__(self) -> str:
        """Write the expression as `parse` reads it."""
        if self.op == "name":
            return self.name
        if self.op == "not":
            inner = self.parts[0]
            return f"~{inner}" if inner.op in ("name", "not") else f"~({inner})"
        sign = "|" if self.op == "or" else "&"
        return sign.join(f"({part})" if part.op not in ("name", "not", self.op) else str(part) for part in self.parts)

    def while_decoding(self) -> bool:
        """Whether a token fed back while decoding belongs to the set."""
        if self.op == "name":
            return self.name in _WHILE_DECODING
        inner = [part.while_decoding() for part in self.parts]
        return not inner[0] if self.op == "not" else (any(inner) if self.op == "or" else all(inner))

    def forced(self) -> Positions:
        """The same tokens of a forced answer: what is fed back while decoding is `completion` in one forward."""
        if self.op == "name":
            return self | "completion" if self.name == "generated" else self
        return Positions(self.op, parts=tuple(part.forced() for part in self.parts))

    def mask(self, layout: TokenLayout, start: int = 0, stop: int | None = None) -> Bool[Tensor, "row pos"]:
        """Boolean mask over columns [start, stop) of a call; columns behind the prompt forward are generated ones.

        Raises:
            PositionError: a class that this layout cannot tell (see `TokenLayout.named`).
        """
        rows, width = layout.shape
        stop = width if stop is None else stop
        prompt = self._on_prompt(layout)[:, start:stop]
        behind = stop - max(start, width)
        if behind <= 0:
            return prompt
        tail = torch.full((rows, behind), self.while_decoding(), dtype=torch.bool, device=prompt.device)
        return torch.cat([prompt, tail], 1)

    def _on_prompt(self, layout: TokenLayout) -> Bool[Tensor, "row pos"]:
        if self.op == "name":
            return layout.named(self.name)
        if self.op == "not":
            return layout.real & ~self.parts[0]._on_prompt(layout)
        masks = [part._on_prompt(layout) for part in self.parts]
        both = masks[0] | masks[1] if self.op == "or" else masks[0] & masks[1]
        return both


class _Parser:
    """Recursive descent over  or := and ('|' and)*,  and := not ('&' not)*,  not := '~' not | '(' or ')' | name."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = re.findall(r"[A-Za-z_]\w*|\S", text)
        self.at = 0

    def parse(self) -> Positions:
        if not self.tokens:
            raise PositionError(f"empty positions {self.text!r}; say for instance 'last_prompt|generated'.")
        out = self._or()
        if self.at < len(self.tokens):
            raise self._broken(self.tokens[self.at])
        return out

    def _broken(self, found: str) -> PositionError:
        return PositionError(f"cannot read positions {self.text!r} at {found!r}; join names with |, & and ~.")

    def _peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _or(self) -> Positions:
        out = self._and()
        while self._peek() == "|":
            self.at += 1
            out = out | self._and()
        return out

    def _and(self) -> Positions:
        out = self._not()
        while self._peek() == "&":
            self.at += 1
            out = out & self._not()
        return out

    def _not(self) -> Positions:
        token = self._peek()
        self.at += 1
        if token == "~":
            return ~self._not()
        if token == "(":
            inner = self._or()
            if self._peek() != ")":
                raise self._broken(self._peek() or "the end")
            self.at += 1
            return inner
        if token in NAMES:
            return Positions("name", token)
        if token in PRESETS:
            return _Parser(PRESETS[token]).parse()
        if re.match(r"[A-Za-z_]", token):
            known = (*NAMES, *PRESETS)
            raise PositionError(f"unknown positions {token!r}.{nearest(token, known)} Known: {', '.join(known)}.")
        raise self._broken(token or "the end")


image = Positions("name", "image")
text = Positions("name", "text")
prompt = Positions("name", "prompt")
user_end = Positions("name", "user_end")
last_prompt = Positions("name", "last_prompt")
completion = Positions("name", "completion")
generated = Positions("name", "generated")
everywhere = Positions("name", "everywhere")
