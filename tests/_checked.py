"""The checks of `--jaxtyping-packages` at a third of their price: same hints, same error, each value looked at once.

jaxtyping binds the signature and checks every argument twice at each call of each function. Here beartype checks the
function itself, and only functions with a shape in their hints open a scope of named axes.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any, ForwardRef, Self, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

_jaxtyped = jaxtyping.jaxtyped
_axes = _jaxtyped("context")
_conf = BeartypeConf(violation_type=jaxtyping.TypeCheckError)


def install() -> None:
    """Let the import hook find this under the name that it writes above every function and class."""
    jaxtyping.jaxtyped = checked


def checked(decorated: Any = None, *, typechecker: Any = None) -> Any:
    """Do as `jaxtyping.jaxtyped`: a function is wrapped, a dataclass gets a wrapped `__init__`."""
    if typechecker is None or isinstance(decorated, str):
        return _jaxtyped(decorated, typechecker=typechecker)
    if decorated is None:
        return lambda found: checked(found, typechecker=typechecker)
    if inspect.isclass(decorated):
        if dataclasses.is_dataclass(decorated) and not hasattr(decorated.__init__, "__checked__"):
            decorated.__init__ = checked(decorated.__init__, typechecker=typechecker)
        return decorated
    if not isinstance(decorated, FunctionType) or inspect.isgeneratorfunction(decorated):
        return _jaxtyped(decorated, typechecker=typechecker)
    hints = {name: _resolved(hint, decorated.__globals__) for name, hint in decorated.__annotations__.items()}
    if any(_mentions(hint, lambda part: isinstance(part, ForwardRef) or part is Self) for hint in hints.values()):
        return _jaxtyped(decorated, typechecker=typechecker)  # a hint of itself
    return _function(decorated, hints)


def _function(found: FunctionType, hints: dict[str, Any]) -> Callable[..., Any]:
    copy = FunctionType(found.__code__, found.__globals__, found.__name__, found.__defaults__, found.__closure__)
    copy.__kwdefaults__, copy.__annotations__ = found.__kwdefaults__, hints
    copy.__module__, copy.__qualname__ = found.__module__, found.__qualname__
    typed = beartype(conf=_conf)(copy)
    if not any(_mentions(hint, _is_shape) for hint in hints.values()):
        out = found if typed is copy else wraps(found)(typed)
    else:

        @wraps(found)
        def out(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            with _axes:
                return typed(*args, **kwargs)

    out.__checked__ = True
    return out


def _resolved(hint: Any, names: dict[str, Any]) -> Any:
    """Look a hint up as jaxtyping does: one that cannot be found when its function is made is not checked."""

    def holder(value: Any) -> None: ...

    holder.__annotations__ = {"value": hint}
    try:
        return get_type_hints(holder, names, include_extras=True)["value"]
    except Exception:
        return Any


def _mentions(hint: Any, wanted: Callable[[Any], bool]) -> bool:
    parts = hint if isinstance(hint, list) else get_args(hint)
    return wanted(hint) or any(_mentions(part, wanted) for part in parts)


def _is_shape(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, jaxtyping.AbstractArray)
