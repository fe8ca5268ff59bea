"""One declarative record per VLM family: where its parts are, which token is a picture, how its positions count.

A new family is one `register_family(Family(...))`; nothing else in the package knows a model by name. What depends on
the decoder or the vision tower inside (PaliGemma over Gemma or Gemma 2, LLaVA over CLIP or Pixtral) is looked up by
their own `model_type`, unless the record says it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from steer_plugin.errors import FamilyError
from steer_plugin.family import Family as Family


@dataclass(frozen=True)
class Backbone:
    """Habits of a text decoder's layers; every path is relative to a layer.

    Attributes:
        attn_added, mlp_added: modules whose outputs are added to the residual stream, where these are norms behind the
            attention and the MLP and not those themselves.
    """

    attn_added: str | None = None
    mlp_added: str | None = None


@dataclass(frozen=True)
class Tower:
    """Habits of a vision tower: its layers (relative to the tower), what is in them, and how its width is called."""

    layers: str = "encoder.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    width: str = "hidden_size"
    scaled: str | None = None


_NORMS_BEHIND = Backbone("post_attention_layernorm", "post_feedforward_layernorm")
# Decoders whose attention and MLP pass a norm before they are added; all others add them as they are.
BACKBONES: dict[str, Backbone] = {
    "gemma2": _NORMS_BEHIND,
    "gemma3_text": _NORMS_BEHIND,
    "olmo2": _NORMS_BEHIND,
    "olmo3": _NORMS_BEHIND,
}
_QWEN = Tower("blocks", "attn")
TOWERS: dict[str, Tower] = {
    "clip_vision_model": Tower(),
    "siglip_vision_model": Tower(),
    "idefics3": Tower(),  # so it is called in checkpoints that were saved by the first versions
    "idefics3_vision": Tower(),
    "smolvlm": Tower(),
    "smolvlm_vision": Tower(),
    "pixtral": Tower("transformer.layers", "attention", "feed_forward"),
    "internvl_vision": Tower("encoder.layer", "attention", scaled="a learned scale is multiplied in behind the module"),
    "mllama_vision_model": Tower("transformer.layers"),
    # Qwen2-VL calls the decoder's width `hidden_size` in its vision config.
    "qwen2_vl": Tower("blocks", "attn", width="embed_dim"),
    "qwen2_vl_vision": Tower("blocks", "attn", width="embed_dim"),
    "qwen2_5_vl": _QWEN,
    "qwen2_5_vl_vision": _QWEN,
    "qwen3_vl": _QWEN,
    "qwen3_vl_vision": _QWEN,
}


def completed(family: Family, config: PretrainedConfig) -> Family:
    """Fill in what a record leaves to the decoder's and the vision tower's own types."""
    text = str(config.get_text_config().model_type)
    vision = str(getattr(getattr(config, "vision_config", None), "model_type", ""))
    backbone, tower = BACKBONES.get(text, Backbone()), TOWERS.get(vision)
    factor = getattr(config.get_text_config(), "residual_multiplier", None)
    # Granite and others: residual + 0.22 * attention, in the layer's own forward.
    scaled = None if factor in (None, 1) else f"it is multiplied by residual_multiplier={factor}"
    out = replace(
        family,
        attn_added=family.attn_added or backbone.attn_added,
        mlp_added=family.mlp_added or backbone.mlp_added,
        scaled=family.scaled or scaled,
    )
    if tower is None or family.vision is None or family.vision_layers is not None:
        return out
    return replace(
        out,
        vision_layers=f"{family.vision}.{tower.layers}",
        vision_attention=family.vision_attention or tower.attention,
        vision_mlp=family.vision_mlp or tower.mlp,
        vision_width=family.vision_width or tower.width,
        vision_scaled=family.vision_scaled or tower.scaled,
    )


_USUAL = Family(
    "usual",
    (),
    decoder="model.language_model",
    layers="model.language_model.layers",
    vision="model.vision_tower",
    projector="model.multi_modal_projector",
)
_QWEN_VL = replace(_USUAL, vision="model.visual", projector="model.visual.merger", positions="own")
_IDEFICS = replace(
    _USUAL,
    decoder="model.text_model",
    layers="model.text_model.layers",
    vision="model.vision_model",
    projector="model.connector",
)
KNOWN: tuple[Family, ...] = (
    replace(_USUAL, name="llava", model_types=("llava",), assistant_headers=("ASSISTANT:",)),
    replace(_USUAL, name="llava_next", model_types=("llava_next",), assistant_headers=("ASSISTANT:",)),
    replace(_USUAL, name="llava_onevision", model_types=("llava_onevision",)),
    replace(_QWEN_VL, name="qwen2_vl", model_types=("qwen2_vl",)),
    replace(
        _QWEN_VL,
        name="qwen2_5_vl",
        model_types=("qwen2_5_vl",),
        notes="vision layers see the patches window by window, not row by row",
    ),
    replace(
        _QWEN_VL,
        name="qwen3_vl",
        model_types=("qwen3_vl",),
        notes="deepstack: behind each of the first layers picture features are added at image tokens, so resid_pre of "
        "the next layer is resid_post plus these; they come from mergers of their own, which projector does not write",
    ),
    replace(
        _USUAL,
        name="gemma3",
        model_types=("gemma3",),
        replay="second_pass",
        notes="attn_out and mlp_out lie behind the post norms: that is what is added; attn_raw and mlp_raw before them",
    ),
    replace(
        _USUAL,
        name="paligemma",
        model_types=("paligemma",),
        positions="mask+1",
        answer_type=1,  # answers attend causally, the prompt both ways
        replay="second_pass",
        branches="prompt",
        notes="picture and prompt attend to each other both ways; over Gemma 2, attn_out and mlp_out lie behind norms",
    ),
    replace(_IDEFICS, name="idefics3", model_types=("idefics3",)),
    replace(_IDEFICS, name="smolvlm", model_types=("smolvlm",)),
    replace(
        _USUAL,
        name="internvl",
        model_types=("internvl",),
        notes="vision layers scale what they add outside any module: vision_attn_raw and vision_mlp_raw alone",
    ),
    replace(
        _USUAL,
        name="mllama",
        model_types=("mllama",),
        vision="model.vision_model",
        cross_attention="cross_attn",
        replay="second_pass",
        branches="none",
        notes="one <|image|> token stands for a picture, which the cross-attention layers read; these have attn_raw "
        "and mlp_raw alone, and do not run at all for text without a picture",
    ),
    replace(_USUAL, name="mistral3", model_types=("mistral3",)),
)


class _Registry:
    """Families by model type; one instance lives in this module and changes only through `register_family`."""

    def __init__(self, *families: Family) -> None:
        self.by_type = {kind: family for family in families for kind in family.model_types}

    def add(self, family: Family) -> None:
        self.by_type.update({kind: family for kind in family.model_types})

    def find(self, config: PretrainedConfig) -> Family:
        kind = str(config.model_type)
        if kind in self.by_type:
            return completed(self.by_type[kind], config)
        if not hasattr(config, "vision_config"):
            raise FamilyError(
                f"model type {kind!r} is text-only (its config has no vision_config); steer_plugin steers "
                f"vision-language models. Known families: {', '.join(sorted(self.by_type))}."
            )
        raise FamilyError(
            f"unknown vision-language family {kind!r}. Known: {', '.join(sorted(self.by_type))}. Register yours: "
            f"sp.register_family(sp.Family(name={kind!r}, model_types=({kind!r},), decoder=..., layers=...)), then run "
            "vlm.check()."
        )


_registry = _Registry(*KNOWN)


def register_family(family: Family) -> None:
    """Make a family known to `attach` (a later record of the same model type replaces the earlier one)."""
    _registry.add(family)


def known_families() -> tuple[Family, ...]:
    """All registered families, each once, in the order in which they came."""
    return tuple(dict.fromkeys(_registry.by_type.values()))


def family_of(config: PretrainedConfig) -> Family:
    """Return the record of a model's family, completed for its decoder and its vision tower.

    Raises:
        FamilyError: text-only or unknown model; says which are known and how to register one.
    """
    return _registry.find(config)
