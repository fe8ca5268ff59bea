"""InternVL (the checkpoints in transformers' own format): LLaVA's layout around InternViT."""

from __future__ import annotations

from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.generalized_components import LinearBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.supported_architectures.llava import LlavaArchitectureAdapter


class InternVLVisionLayerBridge(GeneralizedComponent):
    """One InternViT layer: x + lambda_1 * attention(norm(x)), then x + lambda_2 * mlp(norm(x)).

    It has no hook_attn_out and no hook_mlp_out: what is added is scaled outside any module (attn.hook_out and
    mlp.hook_out are the tensors before the scale).
    """

    is_list_item = True
    hook_aliases = {"hook_resid_pre": "hook_in", "hook_resid_post": "hook_out"}  # noqa: RUF012 - as in the base class

    def __init__(self, name: str) -> None:
        linear = {"in": LinearBridge(name="fc1"), "out": LinearBridge(name="fc2")}
        super().__init__(
            name,
            submodules={
                "ln1": GeneralizedComponent(name="layernorm_before"),
                "attn": GeneralizedComponent(name="attention"),
                "ln2": GeneralizedComponent(name="layernorm_after"),
                "mlp": GeneralizedComponent(name="mlp", submodules={**linear}),
            },
        )


class InternVLArchitectureAdapter(LlavaArchitectureAdapter):
    """Adapter of InternVLForConditionalGeneration over a decoder of Llama's or Qwen's layout."""

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        self.components["vision_encoder"] = GeneralizedComponent(
            name="model.vision_tower",
            submodules={
                "embeddings": GeneralizedComponent(name="embeddings"),
                "encoder_layers": InternVLVisionLayerBridge(name="encoder.layer"),
            },
        )
