"""A read behind its write: context first, then steer, at the text decoder's boundary.

    h_context = read(prefill without the write);   delta = f(h_context);   steered stream from there on

At "last_prompt|generated" the context pass already is the prefill: its cache is cropped by one and only the last prompt
token runs again, steered. Anywhere else the prompt runs a second time. `generate`, the vision tower and the head are
outside the decoder and never notice.

With several late writes, each context pass omits its own write, those at the same site and the late ones behind it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from steer_plugin.adapters._call import Forward
from steer_plugin.adapters._columns import can_part, columns, tokens_of
from steer_plugin.adapters._run import Run

# Runs the decoder so that the run's sites fire and the user's framework does not count it as a pass of its own.
QuietCall = Callable[..., BaseModelOutputWithPast]
Quiet = Callable[[Run], AbstractContextManager[QuietCall]]


class Replay:
    """Hooks on the decoder that do the late reads of a run."""

    def __init__(self, run: Run, quiet: Quiet) -> None:
        self._run = weakref.ref(run)
        self.quiet = quiet
        self._prefix: Tensor | None = None

    def install(self, run: Run) -> None:
        """Hook the decoder's boundary; the hooks go with the run."""
        run.attend(self, run.parts.decoder, Replay._before, Replay._after)

    def _before(
        self, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        run = self._run()
        if run is None:
            return None
        forward = run.forward
        if run.paused or run.recording is not None or run.nested or forward is None:
            return None
        if forward.stop != forward.call.width or forward.call.resolved:
            return None
        kwargs = _with_cache(run, kwargs)
        replayed = tokens_of(kwargs) is not None and _can_replay(run, forward, kwargs)
        out: BaseModelOutputWithPast | None = None
        groups = run.late_groups
        for number, group in enumerate(groups):
            last = number == len(groups) - 1
            reuse = replayed and last
            inner = kwargs if reuse else {**kwargs, "past_key_values": None, "use_cache": False}
            with run.context_pass(group), self.quiet(run) as call:
                out = call(*args, **inner)
        forward.call.resolved = True
        cache = kwargs.get("past_key_values")
        if not replayed or out is None or not isinstance(cache, DynamicCache):
            return None  # what the decoder was called with stands, its own cache included
        cache.crop(-1)
        self._prefix = out.last_hidden_state
        run.forward = Forward(forward.call, forward.stop - 1, forward.stop)
        return args, columns(kwargs, -1, None)

    def _after(self, output: object) -> object:
        run = self._run()
        if run is None or run.nested or self._prefix is None or not isinstance(output, BaseModelOutputWithPast):
            return None
        prefix, self._prefix = self._prefix, None
        if output.last_hidden_state is not None:
            output.last_hidden_state = torch.cat([prefix[:, :-1], output.last_hidden_state], 1)
        return output


def _with_cache(run: Run, kwargs: dict[str, object]) -> dict[str, object]:
    """Make the cache that the decoder is about to make for itself, so that the context pass may fill it."""
    config, asked = run.parts.root.config.get_text_config(), kwargs.get("use_cache")
    wanted = getattr(config, "use_cache", False) if asked is None else asked
    if not wanted or kwargs.get("past_key_values") is not None or torch.is_grad_enabled():
        return kwargs
    return {**kwargs, "past_key_values": DynamicCache(config=config), "use_cache": True}


def _can_replay(run: Run, forward: Forward, kwargs: dict[str, object]) -> bool:
    """Whether the context pass can serve as the prefill: only the last column, in every row, changes afterwards."""
    call = forward.call
    if any(write.unsteered for write in run.writes):
        return False  # the twin's stream parts from the steered one; `Twins` shares the prefix itself
    if captures(kwargs) or run.parts.family.replay != "exact" or call.width < 2:
        return False
    if not can_part(kwargs, kwargs.get("past_key_values")):
        return False
    touched = [run.writes[index].positions for index in run.late]
    touched += [read.positions for i, write in enumerate(run.writes) if i not in run.late for read in write.reads]
    # Taps are not told of context passes: what they want of other columns has to run in the main pass.
    touched += [tap.positions for tap in run.taps if not tap.site.in_vision]
    final = (call.width - 1, call.width, True)
    chosen = [call.chosen(positions) for positions in touched]
    return all((one.first, one.stop, one.whole) == final for one in chosen)


def captures(kwargs: dict[str, object]) -> bool:
    """Whether the caller wants every token's hidden states or attentions, so that none may run apart."""
    return bool(kwargs.get("output_hidden_states") or kwargs.get("output_attentions"))


def install_replay(run: Run, quiet: Quiet) -> None:
    """Give a run its late reads, if it has any; only for runs that are closed explicitly."""
    if run.late:
        Replay(run, quiet).install(run)
