"""SmolVLM: module for module an Idefics3 with names of its own."""

from __future__ import annotations

from transformer_lens.model_bridge.supported_architectures.idefics3 import Idefics3ArchitectureAdapter


class SmolVLMArchitectureAdapter(Idefics3ArchitectureAdapter):
    """Adapter of SmolVLMForConditionalGeneration (SmolVLM 1 and 2)."""
