"""Plain Hugging Face models: forward hooks on the modules that the family's record names."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn

from steer_plugin.adapters._attached import AttachedModel
from steer_plugin.adapters._compiled import unwrapped
from steer_plugin.adapters._hooks import hooked
from steer_plugin.adapters._parts import Framework
from steer_plugin.adapters._run import Run
from steer_plugin.sites import Site


class HookedAttached(AttachedModel):
    """What models steered by torch hooks share: `steering` yields the root model itself."""

    framework: ClassVar[Framework] = "torch"

    def ends(self, site: Site) -> tuple[nn.Module, str]:
        """Module and end ("input" or "output") where the tensor of a resolved site passes."""
        path, end = self.parts.point(site)
        module = self.parts.root.get_submodule(path)
        # A model that became part of a TransformerBridge: transformers takes layers' outputs inside the bridge's block.
        inner = getattr(module, "original_component", None)
        if site.kind.endswith("resid_post") and isinstance(inner, nn.Module):
            module = inner
        return module, end

    @contextmanager
    def lowered(self, run: Run) -> Generator[Any, None, None]:
        """Hook the sites; yields the model that the user attached."""
        with hooked(self.ends, run):
            yield self.model

    def _generate(self, steered: Any, inputs: Mapping[str, Any]) -> Tensor:
        return self.parts.root.generate(**inputs)  # pyright: ignore[reportReturnType, reportCallIssue]

    def _forward(self, steered: Any, inputs: Mapping[str, Any]) -> None:
        self.parts.root(**inputs, logits_to_keep=1)


class TorchAttached(HookedAttached):
    """A plain Hugging Face vision-language model."""

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        plain = unwrapped(model)
        base = getattr(plain, "get_base_model", None)
        inner = base() if callable(base) else plain
        super().__init__(model, inner if isinstance(inner, nn.Module) else plain, processor)

    def _generate(self, steered: Any, inputs: Mapping[str, Any]) -> Tensor:
        return steered.generate(**inputs)
