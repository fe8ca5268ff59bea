"""P2S extraction: picture and prompt run once, both completions over the shared cache, stopping after the last read.

    z = pool(h(X, T+)) - pool(h(X, T-)) at the write site,   context = h(X) at the read site

Targets: `last` (last forced token, as the paper describes), `average_forced` (mean over the forced tokens),
`average_sampled` (the L2S authors' POPE code: forced tokens plus a sampled continuation).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache, ProcessorMixin

from steer_plugin.adapters._call import mean_over
from steer_plugin.adapters._chat import completion_ids, template_of
from steer_plugin.adapters._completions import continued, forced_inputs, right_padded, until_eos
from steer_plugin.adapters._hooks import hook_site
from steer_plugin.adapters._inputs import encode, with_positions
from steer_plugin.adapters._parts import ModelParts
from steer_plugin.adapters._plan import Pair, Plan
from steer_plugin.artefact import versions
from steer_plugin.atomic import JSON
from steer_plugin.context import Read
from steer_plugin.errors import InputError, SiteError
from steer_plugin.positions import Positions
from steer_plugin.sites import Site
from steer_plugin.store import ShardWriter


class _Stop(BaseException):
    """Ends a forward after the last layer that is read; never leaves this module."""


class Extraction:
    """One extraction on one model; `ends` says where a site's tensor passes."""

    def __init__(
        self, parts: ModelParts, processor: ProcessorMixin, ends: Callable[[Site], tuple[nn.Module, str]], plan: Plan
    ) -> None:
        self.parts, self.processor, self.ends, self.plan = parts, processor, ends, plan
        for site in (plan.write, plan.read):
            if site.in_vision:
                raise SiteError(
                    f"extraction cannot use {site}: it pools tokens of the text, and there are picture patches. Give a "
                    "site of the decoder, such as resid_post(14)."
                )
            parts.point(site)

    def job(self, pairs: Sequence[Pair]) -> dict[str, JSON]:
        """Describe the job, so that a folder never mixes two."""
        plan = self.plan
        digest = hashlib.sha256()
        for pair in pairs:
            digest.update("\x1f".join([pair.id, pair.user_text, pair.positive, pair.negative]).encode())
        return {
            "kind": "p2s",
            "model": {**self.parts.identity(), "weights": self.parts.fingerprint()},
            "write": str(plan.write),
            "read": str(plan.read),
            "context": str(plan.context),
            "target": plan.target,
            # A sampled continuation depends on its length and on who shares its batch.
            "sampling": [plan.sampled_tokens, plan.batch_size] if plan.target == "average_sampled" else None,
            "seed": plan.seed,
            "pairs": len(pairs),
            "pairs_sha256": digest.hexdigest(),
            # The source, not what it renders: some templates write today's date.
            "template_sha256": hashlib.sha256(template_of(self.processor).encode()).hexdigest(),
            "versions": cast(JSON, versions()),
        }

    def run(self, pairs: Sequence[Pair], out: Path, *, progress: bool = True) -> None:
        """Extract into a folder; what is already there is not done again.

        Raises:
            InputError: no pairs, or ids that repeat.
            JobError: the folder holds another job, or cannot be written.
        """
        if not pairs:
            raise InputError("extraction needs at least one contrastive pair, got none.")
        ids = [pair.id for pair in pairs]
        if len(set(ids)) != len(ids):
            twice = next(one for one in ids if ids.count(one) > 1)
            raise InputError(f"pair id {twice!r} occurs more than once; ids must be unique.")
        size = self.plan.batch_size
        with ShardWriter(out, self.job(pairs)) as writer:
            chunks = [pairs[i : i + size] for i in range(0, len(pairs), size)]
            bar = tqdm(total=len(pairs), desc="extract", unit="pair", disable=not progress)
            for chunk in chunks:
                todo = [i for i, pair in enumerate(chunk) if pair.id not in writer.done]
                if todo:
                    # The chunk is computed whole even if half of it is on disk: batches, hence sampled continuations
                    # and rounding, are the same as in a run that was never interrupted.
                    vectors, contexts = self.shifts(chunk)
                    writer.append(
                        [chunk[i].id for i in todo],
                        {"vector": vectors[todo].float().cpu(), "context": contexts[todo].float().cpu()},
                        [{"behaviour": chunk[i].behaviour} for i in todo],
                    )
                bar.update(len(chunk))
            bar.close()
            writer.close()

    @torch.no_grad()
    def shifts(self, pairs: Sequence[Pair]) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row d_model"]]:
        """Return (z, context) of one batch of pairs, (row, d_model) each."""
        images = [pair.load_images() for pair in pairs]
        suffixed = any(pair.suffix for pair in pairs)
        inputs = self._encode([pair.user_text for pair in pairs], images)
        contexts: dict[str, Tensor] = {}
        if suffixed:
            # At test time there is no suffix: the context is read on the bare prompt.
            bare = self._encode([pair.prompt for pair in pairs], images)
            self._prefill(bare, contexts, cache=None)
        sides = [(pair, pair.positive, "positive") for pair in pairs] + [(p, p.negative, "negative") for p in pairs]
        completions = [
            completion_ids(self.processor, pair.user_text, text, f"pair {pair.id!r}, {side}")
            for pair, text, side in sides
        ]
        if self.plan.target == "average_sampled":
            if not suffixed:
                self._prefill(inputs, contexts, cache=None)
            pooled = self._sampled(pairs[0].id, inputs, completions)
        else:
            family = self.parts.family
            shared = family.replay == "exact" and family.positions != "own"
            cache = DynamicCache(config=self.parts.root.config.get_text_config()) if shared else None
            if cache is not None or not suffixed:
                self._prefill(inputs, {} if suffixed else contexts, cache)
            pooled = self._joined(inputs, completions) if cache is None else self._completed(inputs, completions, cache)
        positive, negative = pooled.float().chunk(2)
        return positive - negative, contexts["context"]

    def _encode(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> dict[str, Tensor]:
        device = self.parts.device
        return with_positions(self.parts, encode(self.processor, prompts, images, device))

    def _layout_mask(self, inputs: Mapping[str, Tensor], positions: Positions) -> Bool[Tensor, "row pos"]:
        ids = inputs["input_ids"]
        real = self.parts.real_tokens(inputs.get("attention_mask"), ids.shape[0], ids.shape[1], ids.device)
        return positions.mask(self.parts.layout(ids, real, None))

    def _prefill(self, inputs: Mapping[str, Tensor], contexts: dict[str, Tensor], cache: DynamicCache | None) -> None:
        """Run the prompt up to the last layer that is needed; keep the context, and the cache up to the write."""
        read = Read(self.plan.read, self.plan.context)
        mask = self._layout_mask(inputs, self.plan.context)

        def keep(hidden: Tensor) -> None:
            contexts["context"] = mean_over(hidden, mask, read)

        plan = self.plan
        last = plan.read if cache is None else max(plan.write, plan.read, key=lambda site: site.order)
        with self._reading({self.plan.read: keep}, last):
            self.parts.root(**inputs, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)

    def _completed(
        self, inputs: Mapping[str, Tensor], completions: Sequence[Sequence[int]], cache: DynamicCache
    ) -> Float[Tensor, "twice d_model"]:
        """Run both completions of each row over the shared cache and pool them at the write site."""
        ids, real = right_padded(completions, inputs["input_ids"].device)
        prompt_mask = inputs["attention_mask"].repeat(2, 1)
        lengths = prompt_mask.sum(-1, keepdim=True)
        cache.batch_select_indices(torch.arange(ids.shape[0]) % inputs["input_ids"].shape[0])
        got: dict[str, Tensor] = {}

        def keep(hidden: Tensor) -> None:
            got["pooled"] = self._pool(hidden, real)

        with self._reading({self.plan.write: keep}, self.plan.write):
            self.parts.root(
                input_ids=ids,
                attention_mask=torch.cat([prompt_mask, real.to(prompt_mask.dtype)], 1),
                position_ids=lengths + torch.arange(ids.shape[1], device=ids.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return got["pooled"]

    def _joined(
        self, inputs: Mapping[str, Tensor], completions: Sequence[Sequence[int]]
    ) -> Float[Tensor, "twice d_model"]:
        """The plain way, for families whose cache or positions cannot be taken up again: each completion whole."""
        full, forced = self._forced(inputs, completions)
        width = full["input_ids"].shape[1]
        behind = torch.arange(width, device=forced.device) >= width - forced[:, None]
        got: dict[str, Tensor] = {}

        def keep(hidden: Tensor) -> None:
            got["pooled"] = self._pool(hidden, behind)

        with self._reading({self.plan.write: keep}, self.plan.write):
            self.parts.root(**with_positions(self.parts, full), use_cache=False, logits_to_keep=1)
        return got["pooled"]

    def _forced(
        self, inputs: Mapping[str, Tensor], completions: Sequence[Sequence[int]]
    ) -> tuple[dict[str, Tensor], Int[Tensor, " row"]]:
        return forced_inputs(inputs, completions, self.parts.family.answer_type)

    def _pool(self, hidden: Float[Tensor, "row pos d_model"], real: Bool[Tensor, "row pos"]) -> Tensor:
        if self.plan.target == "last":
            columns = torch.arange(real.shape[1], device=real.device)
            real = columns == torch.where(real, columns, -1).amax(-1, keepdim=True)
        return mean_over(hidden, real, Read(self.plan.write, Positions.parse("completion")))

    def _sampled(
        self,
        first: str,
        inputs: Mapping[str, Tensor],
        completions: Sequence[Sequence[int]],
    ) -> Float[Tensor, "twice d_model"]:
        """The authors' way: force the opening, sample on, and average over everything behind the prompt."""
        joined, forced = self._forced(inputs, completions)
        key = f"{self.plan.seed}:{first}".encode()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))
            ids = cast(Any, self.parts.root).generate(**joined, do_sample=True, max_new_tokens=self.plan.sampled_tokens)
        new = ids.shape[1] - joined["input_ids"].shape[1]
        alive = until_eos(ids[:, -new:], self.parts.root) if new else ids[:, :0].bool()
        full = with_positions(self.parts, continued(joined, ids, alive, self.parts.family.answer_type))
        columns = torch.arange(ids.shape[1], device=ids.device)
        behind = full["attention_mask"].bool() & (columns >= joined["input_ids"].shape[1] - forced[:, None])
        got: dict[str, Tensor] = {}

        def keep(hidden: Tensor) -> None:
            got["pooled"] = mean_over(hidden, behind, Read(self.plan.write, Positions.parse("completion")))

        with self._reading({self.plan.write: keep}, self.plan.write):
            self.parts.root(**full, use_cache=False, logits_to_keep=1)
        return got["pooled"]

    @contextmanager
    def _reading(self, taps: Mapping[Site, Callable[[Tensor], None]], last: Site) -> Generator[None, None, None]:
        """Hook the taps and stop the forward once `last` is through."""
        handles: list[Any] = []

        def act(site: Site) -> Callable[[Tensor], Tensor]:
            def see(hidden: Tensor) -> Tensor:
                if site in taps:
                    taps[site](hidden)
                if site == last:
                    raise _Stop
                return hidden

            return see

        try:
            for site in {*taps, last}:
                handles.append(hook_site(*self.ends(site), act(site)))
            yield
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
