"""SteerVLM: one small steerer and gate for all layers, driven by a prompt pair and the unsteered activation."""

from steer_plugin.methods.steervlm.config import SteerVLMConfig
from steer_plugin.methods.steervlm.method import SteerVLM
from steer_plugin.methods.steervlm.module import PairMemory, SteerVLMModule

__all__ = ["PairMemory", "SteerVLM", "SteerVLMConfig", "SteerVLMModule"]
