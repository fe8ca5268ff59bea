"""The unsteered twin of a steered stream: u, the same tokens at the same sites without any write.

    generation (a cache was given)     rows [:B] steered, rows [B:] twins, in one forward; twins never reach the head
    any other forward                  a pass of its own, before: the user's reads and gradients see the batch they know

Both share what no write touches: the prompt up to its first written column runs once, without a twin. This happens at
the text decoder's boundary, below `generate`, the vision tower and the head.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from steer_plugin.adapters._call import Call, Forward
from steer_plugin.adapters._columns import Kwargs, can_part, columns, tokens_of, twice
from steer_plugin.adapters._replay import Quiet, captures
from steer_plugin.adapters._run import Run
from steer_plugin.errors import FrameworkError


class Twins:
    """Hooks on the decoder that let an unsteered stream ride along."""

    def __init__(self, run: Run, quiet: Quiet, check: Callable[[], None]) -> None:
        self._run = weakref.ref(run)  # the run owns its twins: it must end when it is forgotten
        self.quiet = quiet
        self.check = check
        self._prefix: Tensor | None = None
        self._doubled: weakref.WeakKeyDictionary[DynamicCache, int] = weakref.WeakKeyDictionary()

    def install(self) -> None:
        """Hook the decoder's boundary; the hooks go with the run."""
        run = self.run
        # always_call: an exception in a layer must not leave the run believing that twins still ride.
        run.attend(self, run.parts.decoder, Twins._before, Twins._after, always_call=True)
        run.at_close.append(self._restore)

    @property
    def run(self) -> Run:
        """The run that these twins belong to, alive as long as its hooks are."""
        run = self._run()
        if run is None:
            raise FrameworkError("a decoder hook outlived its steering; please report this.")
        return run

    # -- before and after the decoder ----------------------------------------------------------------------------

    def _before(self, args: tuple[object, ...], kwargs: Kwargs) -> tuple[tuple[object, ...], Kwargs] | None:
        run, forward = self.run, self.run.forward
        tokens = tokens_of(kwargs)
        if run.paused or run.recording is not None or forward is None or tokens is None:
            return None
        self._prefix = None
        call, given = forward.call, kwargs.get("past_key_values")
        cache = given if isinstance(given, DynamicCache) else None
        if call.riding is None:
            # Decided once per call: a stream that began with a pass of its own goes on so.
            call.riding = cache is not None and not torch.is_grad_enabled() and not run.nested
        decoding = forward.start >= call.width  # without a cache the prompt runs again in each step
        if decoding and not any(write.unsteered and write.positions.while_decoding() for write in run.writes):
            self._restore()  # what needed a twin lies behind: it need not ride any further
            return None
        if forward.step == 0:
            first = self._first_written(call)
            if first == call.width:
                return None  # nothing differs yet; the first token fed back starts the twin from this very cache
            if cache is not None and self._can_share(first, tokens, kwargs):
                kwargs = self._share(first, forward, args, kwargs)
        if call.riding and not run.nested:
            return args, self._with_rows(kwargs, tokens.shape[0], cache)
        self._pass_of_its_own(args, kwargs, call, cache)
        return args, kwargs

    def _after(self, output: object) -> object:
        run = self.run
        if run.paused or run.recording is not None:
            return None
        rows, run.riding = run.riding, 0
        prefix, self._prefix = self._prefix, None
        if not isinstance(output, BaseModelOutputWithPast) or output.last_hidden_state is None:
            return None
        if rows:
            for name in ("last_hidden_state", "hidden_states", "attentions"):
                output[name] = _own_rows(getattr(output, name, None), rows)
        if prefix is not None:
            output.last_hidden_state = torch.cat([prefix, output.last_hidden_state], 1)
        return output

    # -- what is shared ------------------------------------------------------------------------------------------

    def _first_written(self, call: Call) -> int:
        """Return the first column of the prompt that any write touches or any read needs."""
        run = self.run
        positions = {write.positions for write in run.writes if not write.site.in_vision}
        positions |= {read.positions for write in run.writes if not write.late for read in write.reads}
        chosen = [call.chosen(one) for one in positions]
        return min((one.first for one in chosen if one.stop), default=call.width)

    def _can_share(self, first: int, tokens: Tensor, kwargs: Kwargs) -> bool:
        """Whether the columns before the first written one can run apart, into the given cache."""
        run = self.run
        if first == 0 or run.taps or captures(kwargs) or run.forward is None or run.forward.start:
            return False
        if run.parts.family.replay != "exact" or not can_part(kwargs, kwargs.get("past_key_values")):
            return False
        if not torch.is_grad_enabled():
            return True
        # They run without gradients, which is right only if nothing in them could want one.
        return not tokens.requires_grad and not any(p.requires_grad for p in run.parts.decoder.parameters())

    def _share(self, first: int, forward: Forward, args: tuple[object, ...], kwargs: Kwargs) -> Kwargs:
        """Run columns [0, first) once, without writes, and go on with the others."""
        run, mask = self.run, kwargs.get("attention_mask")
        head = {**columns(kwargs, None, first), "use_cache": True}
        if isinstance(mask, Tensor):
            head["attention_mask"] = mask[:, :first]
        run.paused = True
        try:
            with self.quiet(run) as call, torch.no_grad():
                self._prefix = call(*args, **head).last_hidden_state
        finally:
            run.paused = False
        run.forward = replace(forward, start=first)
        return columns(kwargs, first, None)

    # -- the two ways to run a twin ------------------------------------------------------------------------------

    def _with_rows(self, kwargs: Kwargs, rows: int, cache: DynamicCache | None) -> Kwargs:
        """Append the twins behind the batch: inputs now, the cache once."""
        self.check()
        if cache is not None and cache not in self._doubled and cache.get_seq_length():
            cache.batch_select_indices(torch.arange(rows).repeat(2))
        if cache is not None and cache not in self._doubled:
            self._doubled[cache] = rows
            _reorder_both(cache)
        self.run.riding = rows
        return twice(kwargs, rows)

    def _pass_of_its_own(
        self, args: tuple[object, ...], kwargs: Kwargs, call: Call, cache: DynamicCache | None
    ) -> None:
        """Run the twin alone and keep what it has at the written sites; its cache goes on with the call."""
        run = self.run
        if run.nested or kwargs.get("use_cache") is False:
            own: Cache | None = None
        elif call.twin is None:
            own = _forked(cache) if cache is not None else DynamicCache(config=run.parts.root.config.get_text_config())
            call.twin = own
        else:
            own = call.twin
        run.recording = {}
        try:
            with self.quiet(run) as decoder, torch.no_grad():
                decoder(*args, **{**kwargs, "past_key_values": own, "use_cache": own is not None})
            run.recorded = run.recording
        finally:
            run.recording = None

    def _restore(self) -> None:
        """Give the caches that are still in use their own rows back."""
        for cache, rows in list(self._doubled.items()):
            vars(cache).pop("reorder_cache", None)
            cache.batch_select_indices(torch.arange(rows))
        self._doubled.clear()


def install_twins(run: Run, quiet: Quiet, check: Callable[[], None]) -> None:
    """Give a run its twins, if some write needs them; `check` refuses where rows behind the batch would be misread."""
    if any(write.unsteered for write in run.writes):
        Twins(run, quiet, check).install()


def _own_rows(value: object, rows: int) -> object:
    """The user's part of what a decoder returns, a tensor or a tuple of them."""
    if isinstance(value, tuple):
        return tuple(_own_rows(one, rows) for one in value)
    return value[:rows] if isinstance(value, Tensor) else value


def _forked(cache: DynamicCache) -> DynamicCache:
    """Return a second cache that shares what the first holds; growing one leaves the other alone."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork


def _reorder_both(cache: DynamicCache) -> None:
    """Let beams move steered rows and twins alike: `generate` knows of the first half only."""
    me = weakref.ref(cache)

    # beam_idx is (row,); a jaxtyping name inside a function would travel with a remote request.
    def reorder(beam_idx: Tensor) -> None:
        if (own := me()) is not None:
            both = torch.cat([beam_idx, beam_idx + beam_idx.shape[0]])
            type(own).reorder_cache(own, cast("torch.LongTensor", both))

    # An attribute of this one object, taken away again in `_restore`.
    vars(cache)["reorder_cache"] = reorder
