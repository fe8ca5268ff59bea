"""What lets the adapters travel with a remote nnsight request, and the rules for code that does.

nnsight 0.8 ships the registered package by value: each function as its own source text, compiled again on the server
(nnsight/intervention/serialization.py). So code that runs inside a steered forward keeps to what survives that:

- no zero-argument `super()`: the text comes without the cell that it looks into;
- no decorator but `property`, `classmethod`, `staticmethod`, dataclasses and `managed`: the others are lost;
- no jaxtyping name inside a function's body (its own arguments may have them): the server may not have jaxtyping;
- no `import` of steer_plugin inside a function, and no module of it used by attribute.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextlib import contextmanager as managed
else:
    import contextlib

    class managed:
        """`contextlib.contextmanager` as an object around the function: an object keeps what a function loses."""

        def __init__(self, function: Any) -> None:
            self.function = function
            self.__doc__ = function.__doc__

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Open the context."""
            return contextlib.contextmanager(self.function)(*args, **kwargs)

        def __get__(self, owner: object, kind: type | None = None) -> Any:
            """Bind as a method does."""
            return self if owner is None else partial(self, owner)


__all__ = ["managed"]
