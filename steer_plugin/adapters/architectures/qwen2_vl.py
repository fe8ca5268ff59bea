"""Qwen2-VL: the decoder of Qwen2.5-VL behind a vision tower with layer norms and an ungated MLP."""

from __future__ import annotations

from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.generalized_components import LinearBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.generalized_components.qwen3_5_vision_encoder import (
    Qwen3_5VisionBlockBridge,
    Qwen3_5VisionEncoderBridge,
)
from transformer_lens.model_bridge.supported_architectures.qwen2_5_vl import Qwen2_5_VLArchitectureAdapter


class Qwen2VLArchitectureAdapter(Qwen2_5_VLArchitectureAdapter):
    """Adapter of Qwen2VLForConditionalGeneration; attention and mRoPE stay those of transformers."""

    # torchvision only makes the processor's pictures; the model itself needs none.
    required_libraries: list[str] = []  # noqa: RUF012 - no ClassVar in the base class

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        vision = getattr(cfg, "vision_config", None)
        # Qwen2-VL's vision config calls the decoder's width hidden_size, and its own embed_dim.
        self.cfg.vision_hidden_size = getattr(vision, "embed_dim", None)
        linear = {"in": LinearBridge(name="fc1"), "out": LinearBridge(name="fc2")}
        mlp = GeneralizedComponent(name="mlp", submodules={**linear})
        self.components["vision_encoder"] = Qwen3_5VisionEncoderBridge(
            name="model.visual",
            config=self.cfg,
            submodules={
                "pos_embed": GeneralizedComponent(name="rotary_pos_emb"),
                "blocks": Qwen3_5VisionBlockBridge(name="blocks", submodules={"mlp": mlp}),
            },
        )
