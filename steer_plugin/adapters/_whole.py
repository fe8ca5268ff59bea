"""P2S the plain way: completions behind whole prompts, for families that cannot branch and for sampled targets.

average_sampled    forced tokens and a continuation sampled behind them, as the authors' POPE code does
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import ProcessorMixin

from steer_plugin.adapters._call import mean_over
from steer_plugin.adapters._completions import continued, forced_inputs, until_eos
from steer_plugin.adapters._inputs import encode, with_positions
from steer_plugin.adapters._parts import ModelParts
from steer_plugin.adapters._plan import Pair, Plan
from steer_plugin.adapters._taps import Ends, reading
from steer_plugin.context import Read
from steer_plugin.positions import Positions

_COMPLETION = Positions.parse("completion")


class Whole:
    """Whole forwards of one extraction."""

    def __init__(self, parts: ModelParts, processor: ProcessorMixin, ends: Ends, plan: Plan) -> None:
        self.parts, self.processor, self.ends, self.plan = parts, processor, ends, plan

    def shifts(
        self, pairs: Sequence[Pair], completions: Sequence[Sequence[int]]
    ) -> tuple[Float[Tensor, "twice d_model"], Float[Tensor, "row d_model"]]:
        """Return (pooled completions, contexts); `completions` are all positive ones, then all negative ones."""
        images = [pair.load_images() for pair in pairs]
        inputs = self._encode([pair.user_text for pair in pairs], images)
        suffixed = any(pair.suffix for pair in pairs)
        # At test time there is no suffix: the context is read on the bare prompt.
        bare = self._encode([pair.prompt for pair in pairs], images) if suffixed else inputs
        contexts = self._contexts(bare)
        sampled = self.plan.target == "average_sampled"
        pooled = self._sampled(pairs[0].id, inputs, completions) if sampled else self._forced(inputs, completions)
        return pooled, contexts

    def _encode(self, prompts: Sequence[str], images: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        return with_positions(self.parts, encode(self.processor, prompts, images, self.parts.device))

    def _contexts(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "row d_model"]:
        ids, read = inputs["input_ids"], Read(self.plan.read, self.plan.context)
        real = self.parts.real_tokens(inputs.get("attention_mask"), ids.shape[0], ids.shape[1], ids.device)
        mask = self.plan.context.mask(self.parts.layout(ids, real, None))
        got: list[Tensor] = []
        with reading(self.ends, [(read.site, lambda hidden: got.append(mean_over(hidden, mask, read)))], read.site):
            self.parts.root(**inputs, use_cache=False, logits_to_keep=1)
        return got[0]

    def _forced(self, inputs: Mapping[str, Tensor], completions: Sequence[Sequence[int]]) -> Tensor:
        full, forced = forced_inputs(inputs, completions, self.parts.family.answer_type)
        width = full["input_ids"].shape[1]
        behind = torch.arange(width, device=forced.device) >= width - forced[:, None]
        return self._pooled(full, behind, last=self.plan.target == "last")

    def _sampled(self, first: str, inputs: Mapping[str, Tensor], completions: Sequence[Sequence[int]]) -> Tensor:
        """The authors' way: force the opening, sample on, and average over everything behind the prompt."""
        family = self.parts.family
        joined, forced = forced_inputs(inputs, completions, family.answer_type)
        key = f"{self.plan.seed}:{first}".encode()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))
            ids = cast("Any", self.parts.root).generate(
                **joined, do_sample=True, max_new_tokens=self.plan.sampled_tokens
            )
        width = joined["input_ids"].shape[1]
        new = ids.shape[1] - width
        alive = until_eos(ids[:, -new:], self.parts.root) if new else ids[:, :0].bool()
        full = continued(joined, ids, alive, family.answer_type)
        columns = torch.arange(ids.shape[1], device=ids.device)
        return self._pooled(full, full["attention_mask"].bool() & (columns >= width - forced[:, None]), last=False)

    def _pooled(self, inputs: Mapping[str, Tensor], behind: Bool[Tensor, "row pos"], *, last: bool) -> Tensor:
        if last:  # completions end in the last column
            behind = behind & (torch.arange(behind.shape[1], device=behind.device) == behind.shape[1] - 1)
        read, got = Read(self.plan.write, _COMPLETION), list[Tensor]()
        with reading(self.ends, [(read.site, lambda hidden: got.append(mean_over(hidden, behind, read)))], read.site):
            self.parts.root(**with_positions(self.parts, inputs), use_cache=False, logits_to_keep=1)
        return got[0]
