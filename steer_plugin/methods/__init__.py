"""Methods: each produces interventions and knows no framework. mean.py is the one to copy for your own."""

from steer_plugin.methods.gguf import read_gguf, write_gguf
from steer_plugin.methods.l2s import L2S
from steer_plugin.methods.mean import BehaviourMeans, MeanSteering
from steer_plugin.methods.network import SteeringNetwork
from steer_plugin.methods.norm_random import NormRandom
from steer_plugin.methods.p2s import P2S
from steer_plugin.methods.steervlm import SteerVLM, SteerVLMConfig

__all__ = [
    "L2S",
    "P2S",
    "BehaviourMeans",
    "MeanSteering",
    "NormRandom",
    "SteerVLM",
    "SteerVLMConfig",
    "SteeringNetwork",
    "read_gguf",
    "write_gguf",
]
