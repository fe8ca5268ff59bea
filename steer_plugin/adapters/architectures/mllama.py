"""Mllama (Llama 3.2 Vision): Llama's decoder, some of whose layers attend to the picture in place of the text."""

from __future__ import annotations

from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.generalized_components import VisionProjectionBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.supported_architectures.llama import LlamaArchitectureAdapter


class MllamaArchitectureAdapter(LlamaArchitectureAdapter):
    """Adapter of MllamaForConditionalGeneration; its two-part vision tower is one opaque component.

    A cross-attention block has `cross_attn` in place of `attn`. What it adds is gated outside any module: its
    cross_attn.hook_out and mlp.hook_out (alias hook_mlp_out) are the tensors before the gates. Without a picture these
    blocks do not run at all.
    """

    _testing_lm_attr = "model.language_model"
    _testing_hybrid = True  # some blocks have no `attn`

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        self.cfg.is_multimodal = True
        self.cfg.attn_implementation = "eager"
        self._reprefix_components("model.", "model.language_model.")
        parts = self.components["blocks"].submodules
        parts["attn"].optional = True
        parts["cross_attn"] = GeneralizedComponent(name="cross_attn", optional=True)
        self.components["vision_encoder"] = GeneralizedComponent(name="model.vision_model")
        self.components["vision_projector"] = VisionProjectionBridge(name="model.multi_modal_projector")
