"""Prompts about the same pictures, cut where they part: what comes before runs once, the rest is a few tokens each.

    trunk row   USER: <image> x 576, Is there a              one for each distinct set of pictures
    tails       dog in the image? ASSISTANT:     cat in the image? ASSISTANT:     ...

The parting is found on token ids of the rendered prompts with one placeholder for a picture; the processor encodes one
prompt for each trunk row, and must have ended it with the very same ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from steer_plugin.adapters._chat import chat_text, special_tokens
from steer_plugin.adapters._inputs import encode, with_positions
from steer_plugin.adapters._parts import ModelParts

Ids = list[int]


@dataclass(frozen=True)
class Shared:
    """Prompts as rows of a trunk and what is behind them.

    Attributes:
        inputs: the trunk's batch, left-padded, on the CPU.
        rows: of each prompt, its row there.
        ids: of each prompt, all its token ids.
        tails: of each prompt, the token ids behind the trunk; all of them empty, or none.
    """

    inputs: dict[str, Tensor]
    rows: list[int]
    ids: list[Ids]
    tails: list[Ids]

    @property
    def parted(self) -> bool:
        """Whether there is something behind the trunk."""
        return any(self.tails)

    def cut(self, prompt: int) -> int:
        """Tokens of a prompt that lie in the trunk."""
        return len(self.ids[prompt]) - len(self.tails[prompt])

    def split(self, asked: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[int]]]:
        """Some tokens of each prompt, as columns of its trunk row and as numbers within its tail."""
        width = self.inputs["input_ids"].shape[1]
        cuts = [self.cut(prompt) for prompt in range(len(asked))]
        front = [[width - cut + one for one in row if one < cut] for row, cut in zip(asked, cuts, strict=True)]
        return front, [[one - cut for one in row if one >= cut] for row, cut in zip(asked, cuts, strict=True)]


def shared_prompts(
    parts: ModelParts,
    processor: ProcessorMixin,
    prompts: Sequence[str],
    pictures: Sequence[str],
    load: Callable[[int], Sequence[Image.Image]],
) -> Shared:
    """Encode prompts, each set of pictures once; `pictures` names them, `load` opens those of a prompt.

    Raises:
        InputError: what the processor refuses.
    """
    images: dict[str, Sequence[Image.Image]] = {}
    for number, name in enumerate(pictures):
        if name not in images:
            images[name] = load(number)
    counts = [len(images[name]) for name in pictures]
    if parts.family.branches == "exact" and (len(images) < len(prompts)):
        plain = [_plain_ids(processor, text, count) for text, count in zip(prompts, counts, strict=True)]
        shared = _parted(parts, processor, prompts, pictures, images, plain)
        if shared is not None:
            return shared
    inputs = _encoded(parts, processor, prompts, [images[name] for name in pictures])
    ids = _rows(inputs)
    return Shared(inputs, list(range(len(prompts))), ids, [[] for _ in ids])


def _parted(
    parts: ModelParts,
    processor: ProcessorMixin,
    prompts: Sequence[str],
    pictures: Sequence[str],
    images: Mapping[str, Sequence[Image.Image]],
    plain: Sequence[Ids],
) -> Shared | None:
    """Share what prompts about the same pictures begin with; None where their token ids do not allow it."""
    members = {name: [i for i, one in enumerate(pictures) if one == name] for name in images}
    # Every tail has a token at least, also where one prompt begins another, or stands alone.
    cuts = {name: _common([plain[i] for i in group]) for name, group in members.items()}
    first = [group[0] for group in members.values()]
    inputs = _encoded(parts, processor, [prompts[i] for i in first], [images[pictures[i]] for i in first])
    whole = dict(zip(images, _rows(inputs), strict=True))
    tails = [ids[cuts[name] :] for ids, name in zip(plain, pictures, strict=True)]
    for number, name in zip(first, images, strict=True):
        tail = tails[number]
        if whole[name][-len(tail) :] != tail or parts.image_token_id in tail or cuts[name] < 1:
            return None
    begun = {name: whole[name][: -len(tails[number])] for number, name in zip(first, images, strict=True)}
    trunk = with_positions(parts, _shortened(inputs, [len(tails[number]) for number in first]))
    order = list(images)
    return Shared(
        trunk,
        [order.index(name) for name in pictures],
        [begun[name] + tail for name, tail in zip(pictures, tails, strict=True)],
        tails,
    )


def _common(rows: Sequence[Ids]) -> int:
    """How many tokens all rows begin with, short of the shortest one's last."""
    least = min(map(len, rows)) - 1
    return next((i for i in range(least) if len({row[i] for row in rows}) > 1), least)


def _plain_ids(processor: ProcessorMixin, prompt: str, pictures: int) -> Ids:
    """Token ids of a rendered prompt, one placeholder for each picture."""
    tokenizer = cast("Any", processor).tokenizer
    text = chat_text(processor, prompt, pictures)
    ids = list(tokenizer(text, **special_tokens(processor, text))["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _encoded(
    parts: ModelParts, processor: ProcessorMixin, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]
) -> dict[str, Tensor]:
    return with_positions(parts, encode(processor, prompts, images, torch.device("cpu")))


def _rows(inputs: Mapping[str, Tensor]) -> list[Ids]:
    """Token ids of each row, padding left out."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return inputs["input_ids"].tolist()
    return [row[real.bool()].tolist() for row, real in zip(inputs["input_ids"], mask, strict=True)]


def _shortened(inputs: Mapping[str, Tensor], cuts: Sequence[int]) -> dict[str, Tensor]:
    """Take tokens off the end of each left-padded row, and the columns that nobody needs any more."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    front = (mask.sum(-1) - torch.tensor(cuts)).max()
    out: dict[str, Tensor] = {}
    for key, value in {**inputs, "attention_mask": mask}.items():
        if key == "position_ids":
            continue
        if value.shape[:2] == ids.shape:
            # Rolled, not cut: what was at a row's end comes round to its front, where it is padding.
            value = torch.stack([row.roll(cut, 0) for row, cut in zip(value, cuts, strict=True)])
            if key == "attention_mask":
                value = torch.stack([_cleared(row, cut) for row, cut in zip(value, cuts, strict=True)])
            value = value[:, ids.shape[1] - int(front) :]
        out[key] = value
    return out


def _cleared(row: Tensor, count: int) -> Tensor:
    kept = row.clone()
    kept[:count] = 0
    return kept
