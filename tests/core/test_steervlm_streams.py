"""SteerVLM's streams: twins, replay and pairs equal the naive two passes, token by token, whatever the way in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _tiny import D_MODEL, IMAGE, LAYERS, greedy, hand_masks, plain_hooks, single_row
from torch import Tensor

import steer_plugin as sp

PAIRS = [("w20 w21 w22", "w30 w31"), ("w40", "w41 w42 w43 w44"), ("w50 w51", "w50 w51")]


def steervlm(seed: int = 3, **options: Any) -> sp.SteerVLM:
    """Build a module that is strong enough to change what is said."""
    made = sp.SteerVLM.new(sp.SteerVLMConfig(D_MODEL, LAYERS, reduction=2, heads=4, **options), seed)
    with torch.no_grad():
        made.module.steerer.up.weight.mul_(25)
    return made


STEER = steervlm()


class Naive:
    """The paper's way: for every token an unsteered pass over everything, then a steered one; no cache, no twins."""

    def __init__(self, plain: Any, vlm: Any, made: sp.SteerVLM, pairs: list[tuple[str, str]], alpha: Any = 1.0) -> None:
        self.plain, self.made, self.alpha = plain, made, alpha
        sides = [[self.read(vlm, pair[side]) for pair in pairs] for side in (0, 1)]
        self.memory = [
            [
                made.module.remember(
                    *(part for side in sides for part in (side[row][layer][None], torch.ones(1, len(side[row][0])).bool()))
                )
                for layer in range(LAYERS)
            ]
            for row in range(len(pairs))
        ]

    def read(self, vlm: Any, text: str) -> list[Tensor]:
        """attn_out of the text's own tokens in the chat template "<s> USER: text ASSISTANT:"."""
        tokenizer = vlm.processor.tokenizer
        ids = torch.tensor([tokenizer(f"USER: {text} ASSISTANT:")["input_ids"]])
        kept: list[Tensor] = []
        sites = [("attn_out", layer, lambda h: kept.append(h[0, 2:-1].clone())) for layer in range(LAYERS)]
        with plain_hooks(self.plain, *sites), torch.no_grad():
            self.plain(input_ids=ids)
        return kept

    def logits(self, inputs: dict[str, Tensor], mask: Tensor) -> Tensor:
        """Logits of one row; `mask` says which tokens are steered."""
        u: dict[int, Tensor] = {}
        with torch.no_grad():
            record = [("attn_out", l, lambda h, l=l: u.update({l: h.clone()})) for l in range(LAYERS)]
            with plain_hooks(self.plain, *record):
                self.plain(**inputs)

            def steer(h: Tensor, layer: int) -> Tensor:
                change = self.made.module(h, u[layer], self.memory[self.row][layer])[2]
                return torch.where(mask[..., None], h + self.alpha * change, h)

            with plain_hooks(self.plain, *(("attn_out", l, lambda h, l=l: steer(h, l)) for l in range(LAYERS))):
                return self.plain(**inputs).logits

    def generate(self, inputs: dict[str, Tensor], row: int, where: str, new: int) -> list[int]:
        self.row = row if len(self.memory) > 1 else 0
        one = single_row(inputs, row)
        prompt, decoding = hand_masks(one)[where]
        said: list[int] = []
        for _ in range(new):
            mask = torch.cat([prompt, torch.full((1, len(said)), decoding)], 1)
            scores = self.logits(one, mask)[0, -1]
            scores[[0, IMAGE]] = -torch.inf
            said.append(int(scores.argmax()))
            one["input_ids"] = torch.cat([one["input_ids"], torch.tensor([[said[-1]]])], 1)
            one["attention_mask"] = torch.ones_like(one["input_ids"])
        return said


@pytest.mark.parametrize("where", ["last_prompt|generated", "generated", "everywhere", "image", "text"])
@pytest.mark.parametrize("cached", [True, False])
def test_equals_the_naive_two_passes(vlm, plain, inputs, where: str, cached: bool):
    steering = STEER.pair(*zip(*PAIRS, strict=True)).with_positions(where)
    naive = Naive(plain, vlm, STEER, PAIRS)
    expected = [naive.generate(inputs, row, where, 6) for row in range(3)]
    got = vlm.generate(**inputs, steering=steering, max_new_tokens=6, do_sample=False, use_cache=cached)
    assert got[:, -6:].tolist() == expected
    assert got.tolist() != greedy(plain, inputs, 6).tolist()
