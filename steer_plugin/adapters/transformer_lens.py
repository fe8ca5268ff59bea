"""TransformerLens bridges: the same run on HookPoints, as `hooks()` for the user's own block or around any call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from steer_plugin.adapters._parts import Framework
from steer_plugin.adapters._run import Run
from steer_plugin.adapters.torch_hooks import HookedAttached
from steer_plugin.errors import SiteError
from steer_plugin.intervention import Steerable
from steer_plugin.sites import Site

_NAMES = {"resid_pre": "hook_in", "resid_post": "hook_out", "attn_out": "attn.hook_out", "mlp_out": "mlp.hook_out"}


def hook_name(site: Site) -> str:
    """TransformerLens' name of a resolved site, for example "blocks.14.hook_out"."""
    if site.kind == "projector":
        return "vision_projector.hook_out"
    block = "vision_encoder.encoder_layers" if site.in_vision else "blocks"
    return f"{block}.{site.layer}.{_NAMES[site.kind.removeprefix('vision_')]}"


class BridgeAttached(HookedAttached):
    """A TransformerBridge over a vision-language model; generate through `bridge.original_model`."""

    framework: ClassVar[Framework] = "transformer_lens"

    def __init__(self, model: TransformerBridge, processor: Any = None) -> None:
        super().__init__(model, model.original_model, processor)
        self.bridge = model

    def ends(self, site: Site) -> tuple[nn.Module, str]:
        """HookPoint of a resolved site: an identity module, so its output is the tensor that goes on.

        A layer's output is taken at the layer inside the bridge's block: transformers keeps hidden_states (and takes
        LLaVA's vision features) there, before the block's own hook_out.
        """
        point = self.hook_point(site)
        if site.kind.endswith("resid_post"):
            path, _ = self.parts.family.point(site)
            inner = getattr(self.parts.root.get_submodule(path), "original_component", None)
            if isinstance(inner, nn.Module):
                return inner, "output"
        return point, "output"

    def hook_point(self, site: Site) -> nn.Module:
        """TransformerLens' HookPoint of a resolved site.

        Raises:
            SiteError: this bridge has none.
        """
        name = hook_name(site)
        point = self.bridge.hook_dict.get(name)
        if point is None:
            raise SiteError(f"this TransformerBridge has no hook point {name!r} for {site}; attach the plain HF model.")
        return point

    def hooks(self, *steering: Steerable) -> list[tuple[str, Callable[..., Tensor]]]:
        """Return [(hook name, function)] for `bridge.hooks(fwd_hooks=...)`, in order of execution.

        The list owns its state: it ends when the list is forgotten.

        Raises:
            FrameworkError: a late read needs more than one pass.
            SiteError: a place that TransformerLens' own hooks cannot write faithfully.
        """
        run = self.one_pass(steering)
        run.watch()
        self.equip(run)
        for site in run.sites:
            self.hook_point(site)
            if site.kind == "vision_resid_post" and site.layer == self.parts.last_vision_layer:
                raise SiteError(
                    f"transformers takes the picture's features before hook_out of {site}, so a write there would "
                    "change nothing; use vlm.steering(...), or write at the projector."
                )
        return [(hook_name(site), _Hook(run, site)) for site in run.sites]


class _Hook:
    """One hook function; holds the run, so that the run lives as long as the list of hooks."""

    def __init__(self, run: Run, site: Site) -> None:
        self.run, self.site = run, site
        self.__name__ = f"steer_{site}"

    def __call__(self, tensor: Tensor, hook: object) -> Tensor:
        return self.run.at(self.site, tensor)
