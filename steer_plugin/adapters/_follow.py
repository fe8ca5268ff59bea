"""Which columns of which call a forward runs: a steering follows the forwards of its model and changes nothing.

When a forward starts, a passive pre-hook on the root model tells which columns it is about to run; the hook is there
only as long as the run lives. Calls are known by their KV cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, StaticCache

from steer_plugin.adapters._call import Call, Forward, Tap
from steer_plugin.adapters._checks import check_matches, check_rows
from steer_plugin.adapters._compiled import compiled_around, eagerly
from steer_plugin.adapters._parts import ModelParts
from steer_plugin.errors import FrameworkError, InputError
from steer_plugin.intervention import Intervention, Write
from steer_plugin.layout import TokenLayout, keys_seen
from steer_plugin.sites import Site

A = TypeVar("A")


class Follower:
    """The writes and taps of one steering, and where the model's forwards are.

    Attributes:
        held: whether somebody closes it for certain; `eager` whether compiled code is off until then.

    Raises:
        SiteError, InputError, PositionError: what this model cannot host, before any work.
    """

    def __init__(
        self,
        parts: ModelParts,
        intervention: Intervention,
        taps: Sequence[Tap] = (),
        completion_tokens: int | Sequence[int] | None = None,
        *,
        single_forward: bool = False,
    ) -> None:
        parts.check(intervention)
        self.parts = parts
        self.taps = tuple(replace(tap, site=parts.resolve(tap.site)) for tap in taps)
        self.writes = tuple(_resolved(write, parts) for write in intervention.writes if not write.silent)
        self.completion_tokens = completion_tokens
        self.single_forward = single_forward
        self.forward: Forward | None = None
        self.forwards = 0
        self.muted: frozenset[int] = frozenset()
        self.resolving: tuple[int, ...] = ()
        self.paused = False
        self._inside = False
        self._awaiting_backward = 0
        self._calls: weakref.WeakKeyDictionary[Cache, Call] = weakref.WeakKeyDictionary()
        self._given: weakref.WeakSet[Cache] = weakref.WeakSet()
        self._uncached: Call | None = None
        self._handles: list[RemovableHandle] = []
        self._attendants: list[object] = []
        self.held = self.eager = False
        self._endings = ExitStack()

    @property
    def sites(self) -> list[Site]:
        """Every site that is read or written, in order of execution."""
        found = {write.site for write in self.writes} | {tap.site for tap in self.taps}
        found |= {read.site for write in self.writes for read in write.reads}
        return sorted(found, key=lambda site: site.order)

    @property
    def late(self) -> tuple[int, ...]:
        """Numbers of the writes that need a value from behind them, in order of execution."""
        late = [index for index, write in enumerate(self.writes) if write.late]
        return tuple(sorted(late, key=lambda index: self.writes[index].site.order))

    @property
    def late_groups(self) -> list[tuple[int, ...]]:
        """Late writes that share a site resolve together: neither sees the other, whatever their order in the sum."""
        sites = list(dict.fromkeys(self.writes[index].site for index in self.late))
        return [tuple(i for i in self.late if self.writes[i].site == site) for site in sites]

    @property
    def nested(self) -> bool:
        """Whether a context pass is running inside the forward that the user asked for."""
        return bool(self.resolving)

    def watch(self) -> None:
        """Start to follow the root model's forwards; ends with `close`, or with the run itself.

        Raises:
            FrameworkError: code under torch.compile would hide this steering.
        """
        self.uncompiled()
        me, root = weakref.ref(self), self.parts.root

        def before(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            if (run := me()) is not None:
                run.begin(args, kwargs)

        def after(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            if (run := me()) is not None:
                run.end(output)

        self.adopt([root.register_forward_pre_hook(before, with_kwargs=True), root.register_forward_hook(after)])

    def uncompiled(self) -> None:
        """Switch compiled code off until the end where it lies around a place of this steering.

        Raises:
            FrameworkError: there is such code, and no end that is known.
        """
        inside = [self.parts.point(site)[0] for site in self.sites]
        name = compiled_around(self.parts.root, ["", self.parts.family.decoder, *inside])
        if name is None or self.eager:
            return
        if not self.held:
            raise FrameworkError(
                f"{name or 'the model'} is under torch.compile, whose graphs would hide these hooks; steer with "
                "vlm.steering(...), which runs it eagerly as long as the block is open."
            )
        self.run_eagerly()

    def run_eagerly(self) -> None:
        """Switch compiled code off until this is closed."""
        if not self.eager:
            self.eager = True
            self._endings.enter_context(eagerly())

    def attend(
        self,
        attendant: A,
        module: nn.Module,
        before: Callable[[A, tuple[object, ...], dict[str, object]], object],
        after: Callable[[A, object], object] | None = None,
        *,
        always_call: bool = False,
    ) -> None:
        """Own an object that acts at a module's boundary; its hooks go with this one, be it closed or forgotten."""
        self._attendants.append(attendant)
        me = weakref.ref(attendant)

        def entering(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
            return None if (one := me()) is None else before(one, args, kwargs)

        def leaving(module: nn.Module, args: tuple[object, ...], output: object) -> Any:
            return None if (one := me()) is None or after is None else after(one, output)

        handles = [module.register_forward_pre_hook(entering, with_kwargs=True)]
        if after is not None:
            handles.append(module.register_forward_hook(leaving, always_call=always_call))
        self.adopt(handles)

    def adopt(self, handles: Sequence[RemovableHandle]) -> None:
        """Own some hooks: they are removed by `close`, or when the run is forgotten."""
        self._handles.extend(handles)
        for handle in handles:
            weakref.finalize(self, handle.remove)

    def begin(self, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """Take note of a root forward that is about to run.

        Raises:
            InputError, PositionError, FrameworkError: unusable inputs or cache.
        """
        if self.nested or self.paused:
            return
        # `generate` names everything; to look names up in the signature would cost more than all else here.
        named = self.parts.bind(args, kwargs) if args else kwargs
        ids, embeds = named.get("input_ids"), named.get("inputs_embeds")
        ids = ids if isinstance(ids, Tensor) else None
        shown = ids if ids is not None else embeds
        if not isinstance(shown, Tensor):
            raise InputError("the forward got neither input_ids nor inputs_embeds; pass the processor's output.")
        cache = named.get("past_key_values")
        cache = cache if isinstance(cache, Cache) else None
        rows, width = shown.shape[0], shown.shape[1]
        past = 0 if cache is None else self._past(cache, width)
        if past:
            self.forward = self._decoding(cache, past, width)
        elif cache is None and (call := self._continued(ids)) is not None:
            self.forward = Forward(call, 0, width)
        else:
            mask = named.get("attention_mask")
            if isinstance(cache, StaticCache):
                self._check_static()
                mask = keys_seen(mask, width)
            real = self.parts.real_tokens(mask, rows, width, shown.device)
            self.parts.check_pictures(ids, named)
            call = self._prompt(ids, self.parts.layout(ids, real, self.completion_tokens))
            self.forward = Forward(call, 0, width)
            self.on_prompt, self.on_decoded = {}, {}
            if cache is None:
                self._uncached = call
            else:
                self._calls[cache] = call
        self.forward.call.length = self.forward.stop
        self.forwards += 1
        self._inside = True
        self._awaiting_backward += int(torch.is_grad_enabled())

    def take_up(self, cache: Cache, ids: Int[Tensor, "row pos"], layout: TokenLayout) -> None:
        """Know a cache that holds a prompt less its last columns, which no write or read of this steering touches.

        Answer tokens may then follow all at once: those of a given answer.

        Raises:
            InputError, PositionError: what this prompt cannot host.
        """
        self._calls[cache] = self._prompt(ids, layout)
        self._given.add(cache)

    def _past(self, cache: Cache, width: int) -> int:
        """Columns that a cache holds."""
        call = self._calls.get(cache)
        if isinstance(cache, StaticCache) and width == 1 and call is not None:
            # A static cache counts on its device: to ask it at every token would be to wait for it at every token.
            return call.length
        return int(cache.get_seq_length())

    def _check_static(self) -> None:
        """Refuse what needs more than one pass over one cache; compiled decoding, which static caches bring, is off.

        Raises:
            FrameworkError: a late read, a twin, or a block of the user's own, which has no end that is known.
        """
        if self.late or any(write.unsteered for write in self.writes):
            what = "a read behind its write" if self.late else "an unsteered twin"
            raise FrameworkError(
                f"{what} takes a second pass over the prompt, for which a static KV cache has neither room nor a mask; "
                "leave cache_implementation out."
            )
        if not self.held:
            raise FrameworkError(
                "a static KV cache makes generate compile its decoding, which would hide these hooks; steer with "
                "vlm.steering(...) or vlm.generate(...), or leave cache_implementation out."
            )
        self.run_eagerly()

    def _prompt(self, ids: Tensor | None, layout: TokenLayout) -> Call:
        rows, width = layout.shape
        call = Call(layout, ids, width)
        inside = [write for write in self.writes if not write.site.in_vision]
        call.choose([one.positions for write in inside for one in (write, *write.reads)])
        check_matches(self.writes, call, single_forward=self.single_forward)
        check_rows(self.writes, ids, rows)
        return call

    def end(self, output: object) -> None:
        """Remember which cache a plain forward has filled, so that feeding it back is decoding."""
        self._inside = self._inside and self.nested
        cache = getattr(output, "past_key_values", None)
        if not self.nested and not self.paused and self.forward is not None and isinstance(cache, Cache):
            self._calls[cache] = self.forward.call

    def _decoding(self, cache: Cache | None, past: int, width: int) -> Forward:
        call = None if cache is None else self._calls.get(cache)
        if call is None:
            raise FrameworkError(
                f"a KV cache with {past} tokens was filled outside this steering (a cache reused over turns?): which "
                "of them are prompt is unknown. Start the steering before the prompt, without past_key_values."
            )
        if width != 1 and cache not in self._given:
            raise FrameworkError(
                f"{width} tokens at once behind a filled cache (chunked prefill, assisted decoding or another turn) "
                "are refused until proven; feed one token at a time."
            )
        return Forward(call, past, past + width)

    def _continued(self, ids: Tensor | None) -> Call | None:
        """Without a cache, a forward that repeats the prompt and adds one token to the last one is decoding."""
        call = self._uncached
        if call is None or ids is None or call.prompt_ids is None or ids.shape[1] != call.length + 1:
            return None
        same_rows = ids.shape[0] == call.prompt_ids.shape[0]
        return call if same_rows and torch.equal(ids[:, : call.width], call.prompt_ids) else None


def _resolved(write: Write, parts: ModelParts) -> Write:
    reads = tuple(replace(read, site=parts.resolve(read.site)) for read in write.reads)
    return replace(write, site=parts.resolve(write.site), reads=reads)
