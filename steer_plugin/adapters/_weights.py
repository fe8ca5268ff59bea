"""Weights that are no plain tensors in memory: quantised, or kept elsewhere by accelerate.

accelerate (device_map, cpu_offload, disk_offload) leaves meta tensors on a module between forwards. Its hook,
`module._hf_hook`, knows the device that the module runs on and where the weights are. accelerate is not imported here:
a model that it never touched has no such hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn


def execution_device(module: nn.Module) -> torch.device | None:
    """Where the weights of a module (the first that it or a child has) are while it runs; None: it has none."""
    for name, parameter in module.named_parameters():
        if not parameter.is_meta:
            return parameter.device
        for hook in _hooks(module.get_submodule(name.rpartition(".")[0])):
            if (device := getattr(hook, "execution_device", None)) is not None:
                return torch.device(device)
        return parameter.device
    return None


def stored(root: nn.Module, name: str) -> Tensor | None:
    """The weight that a meta parameter stands for, from host memory or read off the disk; None: nobody has it."""
    path, _, own = name.rpartition(".")
    for hook in _offloading(root.get_submodule(path)):
        return cast("Tensor", hook.weights_map[own])
    return None


def stored_version(root: nn.Module, name: str) -> tuple[int, int]:
    """Two numbers that change when the weight behind a meta parameter is replaced, or changed in host memory."""
    path, _, own = name.rpartition(".")
    for hook in _offloading(root.get_submodule(path)):
        weights = hook.weights_map
        key = getattr(weights, "prefix", "") + own
        weights = getattr(weights, "dataset", weights)
        held: Any = getattr(weights, "state_dict", weights)
        # On disk every look makes a new tensor: there the hook itself stands for its weights.
        value = cast("Mapping[str, Tensor]", held).get(key) if isinstance(held, dict) else None
        return (hash((id(hook), own)), 0) if value is None else (hash((id(value), own)), value._version)
    return 0, 0


def sample(weight: Tensor) -> bytes:
    """The first numbers of a weight; of one that is quantised, those of the tensors that it is made of."""
    # torch's protocol for tensors made of tensors, which torchao follows: they have no views of their own.
    parts = getattr(weight, "__tensor_flatten__", None)
    if parts is not None:
        return b"".join(sample(getattr(weight, name)) for name in parts()[0])
    return weight.detach().flatten()[:8].float().cpu().numpy().tobytes()


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Hooks of accelerate on one module; several are chained in one."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def _offloading(module: nn.Module) -> Iterator[Any]:
    return (hook for hook in _hooks(module) if getattr(hook, "weights_map", None) is not None)
