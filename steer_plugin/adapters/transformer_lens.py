"""TransformerLens bridges: the same run on HookPoints, as `hooks()` for the user's own block or around any call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import CLIPVisionEncoderBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.model_bridge.supported_architectures.llava_onevision import LlavaOnevisionArchitectureAdapter
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from steer_plugin.adapters._bound import BoundBridge
from steer_plugin.adapters._inputs import check_inputs, with_positions
from steer_plugin.adapters._parts import Framework
from steer_plugin.adapters._run import Run
from steer_plugin.adapters.torch_hooks import HookedAttached
from steer_plugin.errors import FrameworkError, SiteError
from steer_plugin.families import family_of
from steer_plugin.intervention import Steerable
from steer_plugin.sites import Site

_INSTEAD = "Attach the plain model with sp.attach(model), or through nnsight with sp.attach(NNsight(model))."

# -- bridges around models in memory -----------------------------------------------------------------------------


def build_bridge(model: nn.Module, processor: ProcessorMixin | None = None) -> TransformerBridge:
    """Build a TransformerBridge around a Hugging Face vision-language model, which becomes part of it.

    The model is changed in place: its layers become the bridge's blocks, and its attention kernel "eager", so that its
    logits move by rounding if it had another. The processor stays as it is; the bridge has a copy of its tokenizer.

    Raises:
        FamilyError: a text-only or unknown model.
        FrameworkError: a model that TransformerLens cannot host; says why, and what to use instead.
    """
    if not isinstance(model, PreTrainedModel):
        raise FrameworkError(
            f"build_bridge takes a Hugging Face model, got {type(model).__name__} (of PEFT, merge the adapter first: "
            f"model.merge_and_unload()). {_INSTEAD}"
        )
    if any(isinstance(module, GeneralizedComponent) for module in model.modules()):
        raise FrameworkError(
            f"this {type(model).__name__} is already inside a TransformerBridge; attach that one: sp.attach(bridge)."
        )
    family = family_of(model.config).name
    name = _architecture(model, family)
    try:
        with _for_a_loaded_model(name):
            bridge = build_bridge_from_module(
                model,
                name,
                hf_config=model.config,
                tokenizer=_tokenizer_of(processor),
                post_adapter_hook=partial(_wrap_unknown_towers_whole, model),
            )
    except (AttributeError, RuntimeError, ValueError) as error:
        raise FrameworkError(
            f"TransformerLens {version('transformer-lens')} could not take this {family!r} model apart as its "
            f"architecture {name!r} expects ({error}). Load the model again, since parts of it are replaced by now. "
            f"{_INSTEAD}"
        ) from error
    bridge.processor = processor  # pyright: ignore[reportAttributeAccessIssue] - declared as None
    return bridge


def _architectures() -> Mapping[str, type[ArchitectureAdapter]]:
    """All adapters that TransformerLens knows: its own, and those of entry points such as ours."""
    ArchitectureAdapterFactory.discover_entry_points()
    # There is no public list that has the discovered ones.
    return ArchitectureAdapterFactory._adapters  # pyright: ignore[reportPrivateUsage]


def _architecture(model: PreTrainedModel, family: str) -> str:
    """Name of a model's architecture: its class, or what that derives from.

    Raises:
        FrameworkError: no adapter hosts it.
    """
    known = _architectures()
    for kind in type(model).__mro__:
        if kind.__name__ in known:
            return kind.__name__
    raise FrameworkError(
        f"TransformerLens {version('transformer-lens')} cannot host family {family!r}: it has no architecture "
        f"{type(model).__name__!r}, and steer_plugin brings none (entry points are read from what is installed: after "
        f"an update of the source, install it again). {_INSTEAD}"
    )


@contextmanager
def _for_a_loaded_model(name: str) -> Generator[None, None, None]:
    """Let an adapter do without what only loading needs, while one bridge is built."""
    adapter = _architectures()[name]
    # Qwen2.5-VL's and Qwen3-VL's refuse to be made where torchvision is missing, which only processors use.
    changes: dict[str, object] = {"required_libraries": []}
    if issubclass(adapter, LlavaOnevisionArchitectureAdapter):
        # Its own overwrites lm_head where text_config alone ties it to the embedding, and leaves the kernels at SDPA.
        changes["prepare_model"] = ArchitectureAdapter.prepare_model
    changed = cast("type[ArchitectureAdapter]", type(adapter.__name__, (adapter,), changes))
    ArchitectureAdapterFactory.register_adapter(name, changed)
    try:
        yield
    finally:
        ArchitectureAdapterFactory.register_adapter(name, adapter)


def _wrap_unknown_towers_whole(model: PreTrainedModel, adapter: ArchitectureAdapter) -> None:
    """TransformerLens takes every tower of LLaVA that is not SigLIP for CLIP's (Pixtral 12B): make it one component."""
    tower = adapter.components.get("vision_encoder")
    if isinstance(tower, CLIPVisionEncoderBridge) and model.config.vision_config.model_type != "clip_vision_model":
        adapter.components["vision_encoder"] = GeneralizedComponent(name=tower.name)


def _tokenizer_of(processor: ProcessorMixin | None) -> PreTrainedTokenizerBase | None:
    """Copy a processor's tokenizer for TransformerLens, which fills in special tokens and reads init_kwargs.

    Unless these say that the tokenizer adds BOS, TransformerLens loads another by name, which one made in memory does
    not have. Whether BOS is really added it measures afterwards.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return None
    copied = copy.deepcopy(tokenizer)
    copied.init_kwargs = {**tokenizer.init_kwargs, "name_or_path": tokenizer.name_or_path, "add_bos_token": True}
    return copied


# -- attached bridges --------------------------------------------------------------------------------------------


class BridgeAttached(HookedAttached):
    """A TransformerBridge over a vision-language model; generate through `bridge.original_model`."""

    framework: ClassVar[Framework] = "transformer_lens"

    def __init__(self, model: TransformerBridge, processor: Any = None) -> None:
        own = getattr(model, "processor", None)
        super().__init__(model, model.original_model, processor if processor is not None else own)
        self.bridge = model

    def ends(self, site: Site) -> tuple[nn.Module, str]:
        """HookPoint of a resolved site: an identity module, so its output is the tensor that goes on.

        A layer's output is taken at the layer inside the bridge's block: transformers keeps hidden_states (and takes
        LLaVA's vision features) there, before the block's own hook_out. Inside a vision tower that TransformerLens
        wraps as a whole there are plain modules, as without a bridge.
        """
        path, end = self.parts.point(site)
        module = self.parts.root.get_submodule(path)
        if not isinstance(module, GeneralizedComponent):
            return module, end
        inner = module.original_component
        if site.kind.endswith("resid_post") and inner is not None:
            return inner, "output"
        return module.hook_in if end == "input" else module.hook_out, "output"

    def bound(self, inputs: Mapping[str, Tensor]) -> BoundBridge:
        """Return the bridge with a batch's pictures bound to it, as `transformer_lens.patching` takes it.

        Raises:
            InputError: inputs that this model cannot take.
        """
        check_inputs(self.parts, inputs)
        return BoundBridge(self.bridge, with_positions(self.parts, inputs))

    def hook_point(self, site: Site) -> HookPoint:
        """TransformerLens' HookPoint of a resolved site.

        Raises:
            SiteError: this bridge has none that can be written faithfully.
        """
        path, end = self.parts.point(site)
        module = self.parts.root.get_submodule(path)
        if not isinstance(module, GeneralizedComponent):
            raise SiteError(
                f"this TransformerBridge has no hook point for {site}: it wraps the vision tower of family "
                f"{self.parts.family.name!r} as a whole. Use vlm.steering(...), which hooks {path!r} itself, or write "
                "at the projector."
            )
        if site.kind == "vision_resid_post" and site.layer in self._layers_kept_inside():
            raise SiteError(
                f"transformers takes the picture's features before hook_out of {site}, so a write there would "
                "change nothing, or not all that it should; use vlm.steering(...), or write at the projector."
            )
        return module.hook_in if end == "input" else module.hook_out

    def hook_name(self, site: Site) -> str:
        """TransformerLens' own name of a resolved site, for example "blocks.14.hook_out".

        Raises:
            SiteError: this bridge has no hook point that can be written faithfully.
        """
        return str(self.hook_point(site).name)

    def _layers_kept_inside(self) -> set[int]:
        """Vision layers whose output transformers takes inside the block, from hidden_states."""
        config = self.parts.root.config
        taken = getattr(config, "vision_feature_layer", None)
        # For -1 InternVL alone takes the tower's last_hidden_state, which comes after hook_out.
        if taken is None or (taken == -1 and config.model_type == "internvl"):
            return set()
        entries = [taken] if isinstance(taken, int) else cast("list[int]", taken)
        # hidden_states counts the embeddings as 0, so entry k is the output of layer k - 1.
        return {entry % (self.parts.n_vision_layers + 1) - 1 for entry in entries}

    def hooks(self, *steering: Steerable) -> list[tuple[str, Callable[..., Tensor]]]:
        """Return [(hook name, function)] for `bridge.hooks(fwd_hooks=...)`, in order of execution.

        The list owns its state: it ends when the list is forgotten.

        Raises:
            FrameworkError: a late read needs more than one pass.
            SiteError: a place that TransformerLens' own hooks cannot write faithfully.
        """
        run = self.one_pass(steering)
        names = [self.hook_name(site) for site in run.sites]
        run.watch()
        self.equip(run)
        return [(name, _Hook(run, site)) for name, site in zip(names, run.sites, strict=True)]


class _Hook:
    """One hook function; holds the run, so that the run lives as long as the list of hooks."""

    def __init__(self, run: Run, site: Site) -> None:
        self.run, self.site = run, site
        self.__name__ = f"steer_{site}"

    def __call__(self, tensor: Tensor, hook: object) -> Tensor:
        return self.run.at(self.site, tensor)
