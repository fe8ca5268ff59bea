"""Attach a model: nnsight, TransformerLens or plain Hugging Face; frameworks are imported only when they are used."""

from __future__ import annotations

import importlib
import sys
import weakref
from typing import Any

from steer_plugin.adapters._attached import AttachedModel
from steer_plugin.adapters._check_report import CheckReport
from steer_plugin.adapters._plan import parse_target
from steer_plugin.errors import FamilyError, FrameworkError, InputError, nearest

__all__ = ["FRAMEWORKS", "AttachedModel", "CheckReport", "attach", "check_framework", "parse_target"]

# Attaching twice gives the same object. Weak values: an entry goes with its attached model, which keeps the model
# (hence its id) alive for exactly as long.
_attached: weakref.WeakValueDictionary[tuple[int, str | None], AttachedModel] = weakref.WeakValueDictionary()
FRAMEWORKS = ("torch", "nnsight", "transformer_lens")
_BRIDGE = "_steer_plugin_bridge"


def attach(model: Any, processor: Any = None, *, framework: str | None = None) -> AttachedModel:
    """Attach an nnsight model, a TransformerBridge, or a plain (or PEFT-wrapped) Hugging Face vision-language model.

    Args:
        model: the model as its framework gives it.
        processor: its processor; needed for `vlm.inputs`, `user_end` and the recognition of assistant headers.
        framework: "nnsight" or "transformer_lens" wraps a plain Hugging Face model first (TransformerLens changes it in
            place); `vlm.model` is the wrapper. "torch" is a plain model as it is.

    Raises:
        FamilyError: a text-only or unknown model.
        FrameworkError: the framework's extra is not installed, or it cannot host this model.
        InputError: an unknown framework, or a model that is wrapped already.
    """
    if framework == "torch":
        _check_plain(model, framework)
        framework = None
    known = _attached.get((id(model), framework))
    if known is not None and _serves(known, model, processor):
        return known
    wrapped = model if framework is None else _wrapped(model, processor, framework)
    vlm = _adapter(wrapped)(wrapped, processor)
    _attached[id(model), framework] = _attached[id(wrapped), None] = vlm
    return vlm


def _serves(known: AttachedModel, model: object, processor: object) -> bool:
    """Whether an attached model is still this one: same object, same processor, and no newer record of its family."""
    from steer_plugin.families import family_of

    return (
        (known.model is model or known.root is model)
        and (processor is None or processor is known.processor)
        and known.parts.family == family_of(known.parts.root.config)
    )


def check_framework(name: str) -> None:
    """Refuse an unknown framework.

    Raises:
        InputError: none of `FRAMEWORKS`; the nearest is proposed.
    """
    if name not in FRAMEWORKS:
        raise InputError(f"unknown framework {name!r}.{nearest(name, FRAMEWORKS)} Known: {', '.join(FRAMEWORKS)}.")


def _check_plain(model: object, framework: str) -> None:
    from torch import nn

    if not isinstance(model, nn.Module) or _adapter(model).framework != "torch":
        raise InputError(
            f"framework={framework!r} takes a plain Hugging Face model, got {type(model).__name__}; attach what your "
            "framework gave you without framework=."
        )


def _wrapped(model: object, processor: object, framework: str) -> object:
    """Put a plain model into a framework's wrapper."""
    check_framework(framework)
    _check_plain(model, framework)
    adapter = load_adapter(framework)
    if framework == "nnsight":
        return adapter.wrap(model, processor)
    # A bridge changes the model in place, so the model keeps it: there is no second one around the same model. Not by
    # setattr, which would make it a submodule.
    kept = vars(model)
    if _BRIDGE not in kept:
        kept[_BRIDGE] = adapter.build_bridge(model, processor)
    return kept[_BRIDGE]


def _adapter(model: object) -> Any:
    """Choose the adapter by what the object is; a framework that was never imported cannot have made it."""
    from torch import nn

    for module, name, adapter in (
        ("nnsight.intervention.envoy", "Envoy", "nnsight.NNsightAttached"),
        ("transformer_lens.model_bridge", "TransformerBridge", "transformer_lens.BridgeAttached"),
    ):
        loaded = sys.modules.get(module)
        if loaded is not None and isinstance(model, getattr(loaded, name)):
            file, cls = adapter.split(".")
            return getattr(load_adapter(file), cls)
    if isinstance(model, nn.Module):
        return load_adapter("torch_hooks").TorchAttached
    raise FamilyError(
        f"cannot attach {type(model).__name__}: give an nnsight model, a TransformerBridge or a Hugging Face model."
    )


def load_adapter(name: str) -> Any:
    """Import one adapter.

    Raises:
        FrameworkError: its framework is missing; names the extra to install.
    """
    try:
        return importlib.import_module(f"steer_plugin.adapters.{name}")
    except ImportError as error:
        extra = name.replace("_", "-")
        raise FrameworkError(
            f"{error.name or name} is not installed ({error}); install it with pip install 'steer-plugin[{extra}]'."
        ) from error
