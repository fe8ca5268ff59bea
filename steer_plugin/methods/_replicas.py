"""One module for layers on several devices: it stays where it is, and copies of its weights go where the layers are."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class Replicas:
    """Copies of a module's weights, one per device, kept until a weight changes; a copy of this object starts empty."""

    def __init__(self) -> None:
        self._made: dict[torch.device, nn.Module] = {}
        self._version: object = None

    def __reduce__(self) -> tuple[type[Replicas], tuple[()]]:
        """Weights travel with the module alone."""
        return Replicas, ()

    def __len__(self) -> int:
        """Count the devices with a copy."""
        return len(self._made)

    def on(self, module: M, device: torch.device) -> M:
        """Return the module itself if all its weights are on the device, or a copy there.

        While its weights are trained the copy is made anew each time, as part of the graph, so that gradients reach
        the module.
        """
        weights = list(module.parameters())
        if all(weight.device == device for weight in weights):
            return module
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            return moved(module, device)
        version = [(id(one), one.data_ptr(), 0 if one.is_inference() else one._version) for one in weights]
        if version != self._version:
            self._made.clear()
            self._version = version
        if device not in self._made:
            with torch.no_grad():
                self._made[device] = moved(module, device)
        return self._made[device]  # pyright: ignore[reportReturnType]


def moved(module: M, device: torch.device) -> M:
    """Return a copy of a module whose weights are copies on a device; gradients flow back to the module's own."""
    # deepcopy takes what the memo holds for what it has copied already.
    memo: dict[int, Any] = {id(one): one.to(device, copy=True) for one in [*module.parameters(), *module.buffers()]}
    return copy.deepcopy(module, memo)
