"""Forward hooks that let a function replace the tensor entering or leaving a module; nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steer_plugin.adapters._travel import managed
from steer_plugin.sites import Site


def hook_site(module: nn.Module, end: str, act: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Let `act` replace the tensor that enters or leaves a module (the first of a tuple)."""

    def leaving(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (act(output[0]), *output[1:])
        return act(output)

    def entering(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (act(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": act(kwargs["hidden_states"])}

    # In front of other hooks: transformers keeps hidden_states (and takes LLaVA's vision features) in hooks of its own,
    # which stay on the layers after the first forward and would otherwise see the unwritten tensor.
    if end == "input":
        return module.register_forward_pre_hook(entering, with_kwargs=True)
    return module.register_forward_hook(leaving, prepend=True)


@runtime_checkable
class Sited(Protocol):
    """What acts at some sites: a run, or what stands in for one."""

    @property
    def sites(self) -> Sequence[Site]:
        """Where it acts."""
        ...

    def at(self, site: Site, hidden: Tensor) -> Tensor:
        """Take the tensor at a site and return the one to go on with."""
        ...


@managed
def hooked(ends: Callable[[Site], tuple[nn.Module, str]], run: Sited) -> Generator[None, None, None]:
    """Hook every site of a run; nothing is left behind, whatever happens inside."""
    handles: list[RemovableHandle] = []
    try:
        # Backwards: hooks go in front of each other, and two sites may be one module's output (attn_raw, attn_out).
        for site in reversed(run.sites):
            module, end = ends(site)
            handles.append(hook_site(module, end, lambda hidden, site=site: run.at(site, hidden)))
        yield
    finally:
        for handle in handles:
            handle.remove()
