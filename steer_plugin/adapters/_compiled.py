"""torch.compile and hooks: a graph compiled without a hook never calls it, and one compiled with it keeps it for good.

So what is compiled around a steered place runs eagerly while the steering is in force, and compiled again afterwards:
no graph is ever made with a hook of ours inside. What is compiled elsewhere in the model stays compiled.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import nn

_MADE_BY_COMPILE = "_torchdynamo_orig_callable"
_WRAPPED = "_orig_mod"


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside what `torch.compile(model)` returns, or the model itself."""
    inner = vars(model).get("_modules", {}).get(_WRAPPED)
    return inner if isinstance(inner, nn.Module) else model


def compiled_around(root: nn.Module, paths: Iterable[str]) -> str | None:
    """Name a module under torch.compile that has one of these modules inside, or is one with its hooks compiled too.

    "" is the root model.
    """
    for path in dict.fromkeys(paths):
        names, module = path.split(".") if path else [], root
        for depth in range(len(names) + 1):
            own, inner = depth == len(names), unwrapped(module)
            # `module.compile()` compiles hooks and all; around a compiled `forward`, and around what torch.compile
            # returns, hooks on that very module stay as they are.
            if getattr(inner, "_compiled_call_impl", None) is not None:
                return ".".join(names[:depth])
            if not own and (inner is not module or _is_compiled(vars(module).get("forward"))):
                return ".".join(names[:depth])
            module = module if own else getattr(inner, names[depth])
    return None


def _is_compiled(function: object) -> bool:
    return callable(function) and hasattr(function, _MADE_BY_COMPILE)


def eagerly() -> AbstractContextManager[None]:
    """Let compiled code run as it was written; for the whole process, as torch has it."""
    return torch.compiler.set_stance("force_eager")


def compiled_hint() -> str:
    """What to add to a message about hooks that did not fire, where torch.compile has made any graph."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    counted: Mapping[str, Mapping[str, int]] = getattr(dynamo, "counters", {})
    if not counted.get("stats", {}).get("unique_graphs", 0):
        return ""
    return (
        " torch.compile is in use: a compiled function of your own that calls the model hides hooks; compile the model "
        "itself (model.compile()), or call it outside that function."
    )


def warn_of_hidden_forwards() -> None:
    """Say that a block saw no forward, where compiled code may have run one."""
    if hint := compiled_hint():
        warnings.warn(f"No forward of the attached model was seen in this steering block.{hint}", stacklevel=2)
