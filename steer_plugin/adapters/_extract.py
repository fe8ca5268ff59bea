"""P2S extraction as a tree of prefixes that is cut off behind the last layer that is read.

    z = pool(h(X, T+)) - pool(h(X, T-)) at the write site,   context = h(X) at the read site

    picture, beginning of the question     once for all pairs of a batch that share it
      rest of the bare prompt              once; the context is read there
      rest of the prompt, suffix           once, unless it is the bare prompt
        T+  |  T-                          two rows over its keys and values

Targets: `last` (last forced token, as the paper describes), `average_forced` (mean over the forced tokens),
`average_sampled` (the L2S authors' POPE code: forced tokens plus a sampled continuation; whole forwards).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import ProcessorMixin

from steer_plugin.adapters._batches import Size
from steer_plugin.adapters._bulk import Bulk, Rows
from steer_plugin.adapters._chat import completion_ids
from steer_plugin.adapters._parts import ModelParts
from steer_plugin.adapters._plan import Pair, Plan
from steer_plugin.adapters._shared import shared_prompts
from steer_plugin.adapters._taps import Ends
from steer_plugin.adapters._tree import Batch, Tree
from steer_plugin.adapters._whole import Whole
from steer_plugin.atomic import JSON
from steer_plugin.errors import InputError, SiteError


class Extraction(Bulk[Pair, Batch]):
    """One extraction on one model; `ends` says where a site's tensor passes."""

    what, unit = "extraction", "pair"

    def __init__(self, parts: ModelParts, processor: ProcessorMixin, ends: Ends, plan: Plan) -> None:
        super().__init__(parts, processor, plan.batch_size)
        self.plan = plan
        for site in (plan.write, plan.read):
            if site.in_vision:
                raise SiteError(
                    f"extraction cannot use {site}: it pools tokens of the text, and there are picture patches. Give a "
                    "site of the decoder, such as resid_post(14)."
                )
            parts.point(site)
        sampled = plan.target == "average_sampled"
        if sampled and plan.batch_size is None:
            raise InputError(
                'batch_size="auto" does not go with target="average_sampled": a draw depends on who shares its batch. '
                "Give a number."
            )
        self._tree, self._whole = Tree(parts, ends, plan), Whole(parts, processor, ends, plan)
        self._branching = not sampled and parts.family.branches != "none"

    def asked(self, items: Sequence[Pair]) -> dict[str, JSON]:
        """Sites, target and pairs."""
        plan = self.plan
        digest = hashlib.sha256()
        for pair in items:
            digest.update("\x1f".join([pair.id, pair.user_text, pair.positive, pair.negative]).encode())
        return {
            "kind": "p2s",
            "write": str(plan.write),
            "read": str(plan.read),
            "context": str(plan.context),
            "target": plan.target,
            # A sampled continuation depends on its length and on who shares its batch.
            "sampling": [plan.sampled_tokens, plan.batch_size] if plan.target == "average_sampled" else None,
            "seed": plan.seed,
            "pairs": len(items),
            "pairs_sha256": digest.hexdigest(),
        }

    def size(self, item: Pair) -> Size:
        """Size of the whole user turn."""
        return self.sizes.of(item.user_text, item.images)

    def batch(self, items: Sequence[Pair]) -> Batch:
        """Tokenise pairs and open their pictures."""
        sides = [(pair, pair.positive, "positive") for pair in items] + [(p, p.negative, "negative") for p in items]
        completions = [
            completion_ids(self.processor, pair.user_text, text, f"pair {pair.id!r}, {side}")
            for pair, text, side in sides
        ]
        suffixed = [i for i, pair in enumerate(items) if pair.user_text != pair.prompt]
        full = list(range(len(items)))
        for number, i in enumerate(suffixed):
            full[i] = len(items) + number
        if not self._branching:
            return Batch(items, completions, None, full)
        owner = [*range(len(items)), *suffixed]
        shared = shared_prompts(
            self.parts,
            self.processor,
            [pair.prompt for pair in items] + [items[i].user_text for i in suffixed],
            [self.sizes.pictures(items[i].images) for i in owner],
            lambda number: items[owner[number]].load_images(),
        )
        return Batch(items, completions, shared, full)

    def rows(self, batch: Batch) -> Rows:
        """Vectors, contexts and behaviours."""
        vectors, contexts = self.shifts(batch)
        about: list[dict[str, JSON]] = [{"behaviour": pair.behaviour} for pair in batch.pairs]
        return Rows({"vector": vectors.float().cpu(), "context": contexts.float().cpu()}, about)

    @torch.no_grad()
    def shifts(self, batch: Batch) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row d_model"]]:
        """Return (z, context) of one batch of pairs, (row, d_model) each."""
        if batch.shared is not None:
            pooled, contexts = self._tree.shifts(batch, batch.shared)
        else:
            pooled, contexts = self._whole.shifts(batch.pairs, batch.completions)
        positive, negative = pooled.float().chunk(2)
        return positive - negative, contexts
