"""Where the image tokens of a prompt lie on its pictures.

picture = sections in the order of its tokens;  section = rows x cols tokens, row by row, over one box of the picture:

    llava, paligemma, gemma3      one grid (LLaVA's processor may have cropped the picture)
    llava_next, llava_onevision   the whole picture, then the tiles as one grid without margins, a newline token per row
    qwen*_vl, mistral3            one grid; Mistral's break tokens are no image tokens
    idefics3, smolvlm, internvl   the tiles row by row, then the whole picture
    mllama                        one token that stands for the whole picture

Boxes are (left, top, right, bottom) in fractions of the user's picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Bool
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig, ProcessorMixin

from steer_plugin._picture_rules import RULES, Inputs, Prompt
from steer_plugin._tiles import Box, Picture, Section
from steer_plugin.errors import FamilyError, InputError

__all__ = ["Box", "Picture", "Section", "TokenBox", "picture_tokens", "sections", "token_boxes"]

Pictures = Sequence[Sequence[Image.Image]]

# A forward that was given pictures in one of these forms tells nothing of their size.
_ENCODED = ("mm_encoder_outputs", "image_features", "image_hidden_states", "cross_attention_states")


class TokenBox(NamedTuple):
    """Number of the picture in its row, and the box that a token covers; None for a newline token."""

    picture: int
    box: Box | None


def picture_tokens(config: PretrainedConfig, inputs: Inputs) -> int | None:
    """How many image tokens the given pictures ask for in the whole batch, without running the model.

    0 without pictures; None where it cannot be known: another family, or pictures given as features.

    Raises:
        InputError: OneVision's batch_num_images and image_sizes count different numbers of pictures.
    """
    rule = RULES.get(str(config.model_type))
    if rule is None or any(inputs.get(key) is not None for key in _ENCODED):
        return None
    if inputs.get("pixel_values") is None:
        return 0
    blocks = rule.blocks(config, inputs)
    return None if blocks is None else sum(section.tokens for block in blocks for section in block)


def sections(
    config: PretrainedConfig,
    inputs: Inputs,
    processor: ProcessorMixin | None = None,
    pictures: Pictures | None = None,
) -> list[list[Picture]]:
    """Sections of every picture of every row.

    Idefics3 and SmolVLM need the processor; InternVL needs processor and pictures once a picture has tiles. LLaVA's
    processor crops the centre: with processor and pictures the boxes tell where that was, without pictures they are
    fractions of what the model sees. So they are for Gemma 3's crops (pan and scan), each a picture of its own then.

    Raises:
        FamilyError: a family whose geometry is not known here.
        InputError: input_ids are missing, their image tokens disagree with the pictures, or more has to be given.
    """
    rule = RULES.get(str(config.model_type))
    if rule is None:
        raise FamilyError(
            f"where image tokens lie on a picture is not known for model type {str(config.model_type)!r}; it is for "
            f"{', '.join(sorted(RULES))}."
        )
    ids, token = inputs.get("input_ids"), getattr(config, "image_token_id", None)
    if not isinstance(ids, Tensor) or token is None:
        raise InputError("finding image tokens needs input_ids, and a config with an image_token_id.")
    if pictures is not None and len(pictures) != len(ids):
        raise InputError(f"got lists of pictures for {len(pictures)} rows, but input_ids have {len(ids)}.")
    blocks = rule.blocks(config, inputs) if inputs.get("pixel_values") is not None else []
    if blocks is None or any(inputs.get(key) is not None for key in _ENCODED):
        raise InputError("where image tokens lie needs pixel_values as the processor gives them, with sizes and grids.")
    out: list[list[Picture]] = []
    for row, mine in enumerate(_dealt(ids == token, blocks)):
        given = None if pictures is None else [picture.size for picture in pictures[row]]
        prompt = Prompt(row, ids[row].tolist(), int(token), processor, given)
        found = rule.arrange(prompt, mine) if mine else []
        prompt.expect(len(found))
        out.append(found)
    return out


def token_boxes(row: Sequence[Picture]) -> list[TokenBox]:
    """Picture number and box of each image token of a row (one entry of `sections`), in prompt order."""
    return [
        TokenBox(number, box) for number, picture in enumerate(row) for section in picture for box in section.boxes()
    ]


def _dealt(image: Bool[Tensor, "row pos"], blocks: Sequence[Picture]) -> list[list[Picture]]:
    """Hand the blocks of a batch to the rows whose image tokens they fill."""
    wanted = [int(count) for count in image.sum(-1)]
    given = sum(section.tokens for block in blocks for section in block)
    rest, out = list(blocks), list[list[Picture]]()
    for count in wanted:
        mine: list[Picture] = []
        while rest and count >= (size := sum(section.tokens for section in rest[0])):
            mine.append(rest.pop(0))
            count -= size
        if count:
            break
        out.append(mine)
    if rest or len(out) < len(wanted):
        raise InputError(
            f"the pictures ask for {given} image tokens, but the rows of the prompt have {wanted}; give the inputs as "
            "the processor made them, one placeholder for each picture."
        )
    return out
