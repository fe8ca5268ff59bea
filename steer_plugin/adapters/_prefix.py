"""Prompts that are run once and gone on from under many steerings, which part in the last prompt column only.

    kept     columns [0, width - 1) of the unsteered prompt: their keys and values
    steered  column width - 1 over what is kept, then the answer, as if the prompt had been run from its beginning

A steering that touches the last prompt token and what follows it ("last_prompt", "generated", "last_prompt|generated")
leaves all columns before as they are, whatever its layer and strength; a late read is replayed on that one column.
Everything else runs whole: other positions, pictures' sites, unsteered twins, families whose cache cannot be cut.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from steer_plugin.adapters._columns import can_part
from steer_plugin.adapters._completions import right_padded
from steer_plugin.adapters._follow import Follower
from steer_plugin.adapters._inputs import check_inputs
from steer_plugin.adapters._replay import captures
from steer_plugin.adapters._steered import SteeredModel
from steer_plugin.adapters._travel import managed
from steer_plugin.errors import InputError
from steer_plugin.intervention import Intervention, Steerable
from steer_plugin.layout import TokenLayout

# How an answer may be decoded over a kept prefix; beams and returned sequences would need its rows repeated.
_PLAIN = {"max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "logits_processor"}


class PrefixedModel(SteeredModel):
    """A steered model that can go on from prompts it has run."""

    @abstractmethod
    def generate(self, steering: Any = None, **inputs: Any) -> Tensor:
        """Generate token ids (row, pos), prompt included."""

    def prefix(self, inputs: Mapping[str, Tensor], **how: Any) -> Prefix:
        """Answer prompts unsteered, and keep what many steerings of them have in common; keywords go to `generate`.

        Raises:
            InputError: pictures that do not fit the prompt.
        """
        check_inputs(self.parts, inputs)
        held, ids = (None, None) if self._stack else _kept(self, inputs, how)
        return Prefix(self, inputs, self.generate(**inputs, **how) if ids is None else ids, held)

    @managed
    def going_on(
        self, steering: Steerable, cache: DynamicCache, ids: Tensor, layout: TokenLayout
    ) -> Generator[nn.Module, None, None]:
        """Steer the Hugging Face model from a cache that holds these prompts less their last column.

        Raises:
            SiteError, InputError, PositionError: what this model or these prompts cannot host.
        """
        with self.steering_root(steering) as root:
            if self._run is not None:
                self._run.take_up(cache, ids, layout)
            yield root

    @property
    def bare(self) -> bool:
        """Whether no steering is in force."""
        return not self._stack


@dataclass(frozen=True)
class Held:
    """Keys and values of all columns but the last, and the position ids that `generate` gave the prompt."""

    cache: DynamicCache
    positions: Tensor

    @property
    def layers(self) -> list[DynamicLayer]:
        """The cache by layers, plain ones all of them (see `can_part`)."""
        return cast("list[DynamicLayer]", self.cache.layers)

    def again(self) -> DynamicCache:
        """A cache of one's own over the same tensors, which it never changes: it grows by new ones."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return cache


class Prefix:
    """A batch of prompts to be answered under many steerings; made by `vlm.prefix(inputs)`.

    The weights must stay as they are as long as it is used.

    Attributes:
        ids: the unsteered answers as `generate` returned them, (row, pos), prompt included.
        asked, ran: prompt columns that its uses would have run from the beginning, and those that were run.
    """

    def __init__(self, vlm: PrefixedModel, inputs: Mapping[str, Tensor], ids: Tensor, held: Held | None) -> None:
        self.vlm, self.inputs, self.ids, self._held = vlm, dict(inputs), ids, held
        self.asked = self.ran = self.width

    @property
    def width(self) -> int:
        """Columns of the prompts."""
        return self.inputs["input_ids"].shape[1]

    @property
    def kept(self) -> bool:
        """Whether anything is kept, so that some steering may go on from it."""
        return self._held is not None

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values that are kept."""
        layers = [] if self._held is None else self._held.layers
        return sum(t.nbytes for layer in layers for t in (layer.keys, layer.values) if isinstance(t, Tensor))

    @cached_property
    def layout(self) -> TokenLayout:
        """Classes of the prompts' tokens."""
        ids = self.inputs["input_ids"]
        return self.vlm.parts.layout(ids, self.real, None)

    @cached_property
    def real(self) -> Bool[Tensor, "row pos"]:
        """Tokens that are not padding."""
        ids = self.inputs["input_ids"]
        return self.vlm.parts.real_tokens(self.inputs.get("attention_mask"), ids.shape[0], ids.shape[1], ids.device)

    def serves(self, steering: Steerable | None) -> bool:
        """Whether this steering gives the same when it goes on from what is kept.

        Raises:
            SiteError, InputError, PositionError: what this model or these prompts cannot host.
        """
        if self._held is None or not self.vlm.bare:
            return False
        run = Follower(self.vlm.parts, Intervention(()) if steering is None else steering.intervention)
        # Several late reads take passes over the whole prompt, one for each site.
        if len(run.late_groups) > 1:
            return False
        if any(write.unsteered or write.asides or write.site.in_vision for write in run.writes):
            return False
        last = torch.zeros_like(self.real)
        last[:, -1] = True
        read = [one.positions.mask(self.layout) for write in run.writes for one in write.reads]
        # A late write must be on the last column, or the replay is a second pass.
        late = [run.writes[index].positions.mask(self.layout) for index in run.late]
        written = [write.positions.mask(self.layout) for write in run.writes]
        exact = all(torch.equal(mask, last) for mask in (*read, *late))
        return exact and not any(bool((mask & ~last).any()) for mask in written)

    @torch.no_grad()
    def generate(self, steering: Steerable | None = None, **how: Any) -> Int[Tensor, "row pos"]:
        """Generate as `vlm.generate(**inputs, steering=..., **how)` does, from what is kept wherever that is the same.

        Raises:
            SiteError, InputError, PositionError: as `vlm.generate`.
        """
        self.asked += self.width
        if self._held is None or not _PLAIN.issuperset(how) or not self.serves(steering):
            self.ran += self.width
            return self.vlm.generate(**self.inputs, steering=steering, **how)
        self.ran += 1
        cache, ids = self._held.again(), self.inputs["input_ids"]
        mask, at = self.real.long(), self._held.positions
        with self.vlm.going_on(_of(steering), cache, ids, self.layout) as root:
            return cast("Any", root).generate(
                input_ids=ids, attention_mask=mask, position_ids=at, past_key_values=cache, **how
            )

    @torch.no_grad()
    def forced(
        self, answers: Sequence[Sequence[int]], steering: Steerable | None = None
    ) -> tuple[Float[Tensor, "row pos vocab"], Bool[Tensor, "row pos"]]:
        """Logits that decide each token of given answers, from the left, and which of them are an answer's.

        The answers (token ids, one list for each prompt) run at once behind the last prompt column.

        Raises:
            InputError: other numbers of answers, an empty one, a strength that changes from step to step, or a steering
                that this prefix does not serve.
        """
        rows, steered = self.inputs["input_ids"].shape[0], _of(steering)
        if len(answers) != rows or not all(answers):
            sizes = [len(answer) for answer in answers]
            raise InputError(
                f"got answers of {sizes} tokens for {rows} prompts; give one with a token for each prompt."
            )
        if any(callable(write.alpha) for write in steered.intervention.writes):
            raise InputError(
                "a strength that changes from step to step has no meaning for a given answer; use a number."
            )
        if self._held is None or not self.serves(steering):
            raise InputError("this steering cannot go on from what is kept (see serves()); run the prompts whole.")
        self.asked, self.ran = self.asked + self.width, self.ran + 1
        cache, ids = self._held.again(), self.inputs["input_ids"]
        words, real = right_padded(answers, ids.device)
        mask = torch.cat([self.real, real[:, :-1]], 1).long()
        columns = [ids[:, -1:], words[:, :-1]]  # the last token of an answer decides nothing
        logits: list[Tensor] = []
        stop, at = self.width, self._held.positions[..., -1:]
        with self.vlm.going_on(steered, cache, ids, self.layout) as root:
            for tokens in columns[: min(words.shape[1], 2)]:
                count = tokens.shape[1]
                out = cast("Any", root)(
                    input_ids=tokens, attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True,
                    position_ids=at + torch.arange(count, device=at.device),
                )  # fmt: skip
                logits.append(out.logits)
                stop, at = mask.shape[1], at + count
        return torch.cat(logits, 1), real.to(logits[0].device)


def _of(steering: Steerable | None) -> Steerable:
    return Intervention(()) if steering is None else steering


@torch.no_grad()
def _kept(
    vlm: PrefixedModel, inputs: Mapping[str, Tensor], how: Mapping[str, Any]
) -> tuple[Held | None, Int[Tensor, "row pos"] | None]:
    """Answer once by the Hugging Face model and cut its cache; (None, None) where the model forbids it."""
    root, parts, width = cast("Any", vlm.root), vlm.parts, inputs["input_ids"].shape[1]
    config, mask = root.generation_config, inputs.get("attention_mask")
    if parts.family.replay != "exact" or width < 2 or not _PLAIN.issuperset(how):
        return None, None
    if any((getattr(config, name, None) or 1) != 1 for name in ("num_beams", "num_return_sequences")):
        return None, None
    if mask is not None and not bool(mask[:, -1].all()):
        return None, None
    seen: list[Tensor | None] = []
    parts_alone: list[bool] = []

    def entering(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if not seen:
            at = parts.bind(args, kwargs).get("position_ids")
            seen.append(at if isinstance(at, Tensor) else None)

    def decoding(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if not parts_alone:
            parts_alone.append(not captures(kwargs) and can_part(kwargs, kwargs.get("past_key_values")))

    handles = [
        root.register_forward_pre_hook(entering, with_kwargs=True),
        parts.decoder.register_forward_pre_hook(decoding, with_kwargs=True),
    ]
    try:
        out = root.generate(**inputs, **how, return_dict_in_generate=True)
    finally:
        for handle in handles:
            handle.remove()
    ids, cache, at = out.sequences, out.past_key_values, seen[0] if seen else None
    if parts_alone != [True] or not isinstance(cache, DynamicCache) or at is None:
        return None, ids
    cache.crop(width - 1 - cache.get_seq_length())
    held = Held(cache, at)
    for layer in held.layers:  # what was cut off is let go
        layer.keys, layer.values = cast("Tensor", layer.keys).clone(), cast("Tensor", layer.values).clone()
    return held, ids
