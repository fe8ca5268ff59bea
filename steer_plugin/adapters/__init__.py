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

__all__ = ["FRAMEWORKS", "AttachedModel", "CheckReport", "attach", "parse_target"]

# Attaching twice gives the same object. Weak values: an entry goes with its attached model, which keeps the model
# (hence its id) alive for exactly as long.
_attached: weakref.WeakValueDictionary[tuple[int, str | None], AttachedModel] = weakref.WeakValueDictionary()
FRAMEWORKS = ("torch", "nnsight", "transformer_lens")


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
    known = _attached.get((id(model), framework))
    if known is not None and model in (known.model, known.root) and (processor is None or processor is known.processor):
        return known
    wrapped = model if framework is None else _wrapped(model, processor, framework)
    vlm = _adapter(wrapped)(wrapped, processor)
    _attached[id(model), framework] = _attached[id(wrapped), None] = vlm
    return vlm


def _wrapped(model: object, processor: object, framework: str) -> object:
    """Put a plain model into a framework's wrapper."""
    from transformers import PreTrainedModel

    if framework not in FRAMEWORKS:
        raise InputError(f"unknown framework {framework!r}.{nearest(framework, FRAMEWORKS)} Known: {FRAMEWORKS}.")
    if framework == "torch":
        return model
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"framework={framework!r} wraps a plain Hugging Face model, got {type(model).__name__}; attach what your "
            "framework gave you without framework=."
        )
    adapter = load_adapter(framework)
    return adapter.wrap(model, processor) if framework == "nnsight" else adapter.build_bridge(model, processor)


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
