"""Hints are checked while the tests run: `_checked` refuses what `jaxtyping.jaxtyped` refuses, no more, no less."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import _checked
import jaxtyping
import numpy as np
import pytest
import torch
from beartype import beartype
from jaxtyping import Float, Int
from torch import Tensor

import steer_plugin as sp
from steer_plugin.evaluation.intervals import ratio

HOOKS: tuple[Callable[..., Any], ...] = (_checked._jaxtyped, _checked.checked)


def added(x: Float[Tensor, "row d"], y: Float[Tensor, " d"], times: int = 1) -> Float[Tensor, "row d"]:
    return x + y if times == 1 else (x + y)[:, :1] if times == 2 else (x + y).long()


def listed(rows: list[Int[Tensor, " pos"]], *more: Int[Tensor, " pos"], **named: Int[Tensor, " pos"]) -> int:
    return len(rows) + len(more) + len(named)


def plain(text: str, *, count: int | None = None) -> str:
    return text if count != 3 else count  # pyright: ignore[reportReturnType]


def numbers(until: int) -> Iterator[int]:
    yield from range(until)


def unknown(x: NotThere) -> NotThere:  # pyright: ignore[reportUndefinedVariable]
    return x


@dataclass
class Row:
    name: str
    first: Float[Tensor, " d"]
    second: Float[Tensor, " d"]


D, E, P = torch.zeros(3), torch.zeros(4), torch.zeros(2, dtype=torch.long)
CALLS: list[tuple[Any, tuple[Any, ...], dict[str, Any], bool]] = [
    (added, (torch.zeros(2, 3), D), {}, True),
    (added, (torch.zeros(2, 3), E), {}, False),  # an axis of one name has one size
    (added, (torch.zeros(2, 3), D[None]), {}, False),
    (added, (torch.zeros(2, 3).long(), D), {}, False),
    (added, (torch.zeros(2, 3), D), {"times": "1"}, False),
    (added, (torch.zeros(2, 3), D), {"times": 2}, False),  # the answer has another size
    (added, (torch.zeros(2, 3), D), {"times": 3}, False),  # and another kind
    (listed, ([P, P],), {}, True),
    (listed, ([P], P), {"named": P}, True),
    (listed, ([P], P[:1]), {}, False),
    (listed, ([P],), {"named": P[:1]}, False),
    (listed, ([D],), {}, False),
    (plain, ("a",), {"count": 2}, True),
    (plain, (1,), {}, False),
    (plain, ("a",), {"count": 3}, False),
    (plain, ("a",), {"count": "b"}, False),
    (numbers, (2,), {}, True),
    (numbers, ("2",), {}, False),
    (unknown, (D,), {}, True),  # a name that is not there when the function is made
    (Row, ("a", D, D), {}, True),
    (Row, ("a", D, E), {}, False),
    (Row, (1, D, D), {}, False),
]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(("what", "values", "named", "fine"), CALLS)
def test_the_same_is_refused(hook: Callable[..., Any], what: Any, values: Any, named: Any, fine: bool) -> None:
    if inspect.isclass(what):
        what = dataclass(type("Row", (), {"__annotations__": what.__annotations__, "__module__": __name__}))
    found = hook(typechecker=beartype)(what)
    if fine:
        found(*values, **named)
    else:
        with pytest.raises(jaxtyping.TypeCheckError):
            found(*values, **named)


def test_the_axes_of_a_call_are_its_own() -> None:
    """A function that calls another may name other sizes by the same names, and keeps its own afterwards."""

    def inner(x: Float[Tensor, " d"]) -> int:
        return len(x)

    def outer(x: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        return E if checked_inner(E) == len(x) + 1 and x.any() else x

    checked_inner, run = (_checked.checked(one, typechecker=beartype) for one in (inner, outer))
    assert run(D) is D
    with pytest.raises(jaxtyping.TypeCheckError):
        run(D + 1)  # gives back what the inner call was given


def test_the_package_is_checked() -> None:
    """The functions of every module that is loaded, and the hook is really there."""
    with pytest.raises(jaxtyping.TypeCheckError):
        sp.Positions.parse(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(jaxtyping.TypeCheckError):
        ratio(np.zeros(3))
    modules = [module for name, module in sys.modules.items() if name.startswith("steer_plugin.")]
    functions = [
        value for module in modules for value in vars(module).values()
        if isinstance(value, FunctionType) and value.__module__ == module.__name__ and value.__annotations__
    ]  # fmt: skip
    assert len(functions) > 200
    named = {one.__name__ for one in functions if "__wrapped__" not in vars(one) and not hasattr(one, "__checked__")}
    assert named == set()
