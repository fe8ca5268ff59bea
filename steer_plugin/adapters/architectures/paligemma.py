"""PaliGemma and PaliGemma 2: a SigLIP tower before a Gemma or a Gemma 2 decoder."""

from __future__ import annotations

from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import SiglipVisionEncoderBridge, VisionProjectionBridge
from transformer_lens.model_bridge.supported_architectures.gemma1 import Gemma1ArchitectureAdapter
from transformer_lens.model_bridge.supported_architectures.gemma2 import Gemma2ArchitectureAdapter


class PaliGemmaArchitectureAdapter(ArchitectureAdapter):
    """Adapter of PaliGemmaForConditionalGeneration; its decoder is that of TransformerLens' Gemma adapters."""

    _testing_lm_attr = "model.language_model"

    def __init__(self, cfg: TransformerBridgeConfig) -> None:
        super().__init__(cfg)
        # Of the two decoders only Gemma 2 lists the kinds of its layers (sliding and full attention).
        decoder = Gemma2ArchitectureAdapter if getattr(cfg, "layer_types", None) else Gemma1ArchitectureAdapter
        text = decoder(cfg)
        self.weight_processing_conversions = text.weight_processing_conversions
        self.component_mapping = text.components
        self._reprefix_components("model.", "model.language_model.")

        self.cfg.is_multimodal = True
        self.cfg.attn_implementation = "eager"
        self._extract_vision_dims(cfg)
        self.components["vision_encoder"] = SiglipVisionEncoderBridge(name="model.vision_tower", config=self.cfg)
        self.components["vision_projector"] = VisionProjectionBridge(name="model.multi_modal_projector")
