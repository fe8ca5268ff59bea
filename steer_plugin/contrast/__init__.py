"""Contrastive data: one picture and question, two openings of the answer that differ only in the behaviour."""

from steer_plugin.contrast.files import read_pairs
from steer_plugin.contrast.mmsafety import mmsafety_pairs, mmsafety_split
from steer_plugin.contrast.pair import ContrastivePair
from steer_plugin.contrast.pocket import pocket_caption_pairs, pocket_pairs, pocket_request_pairs
from steer_plugin.contrast.pope import PopeQuestion, pope_pairs, pope_prompt, read_pope
from steer_plugin.contrast.prompt import Prompt
from steer_plugin.contrast.rows import SteeringRow
from steer_plugin.contrast.vnia import read_vnia, vnia_pairs, vnia_prompts

__all__ = [
    "ContrastivePair",
    "PopeQuestion",
    "Prompt",
    "SteeringRow",
    "mmsafety_pairs",
    "mmsafety_split",
    "pocket_caption_pairs",
    "pocket_pairs",
    "pocket_request_pairs",
    "pope_pairs",
    "pope_prompt",
    "read_pairs",
    "read_pope",
    "read_vnia",
    "vnia_pairs",
    "vnia_prompts",
]
