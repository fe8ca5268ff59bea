"""One lowered steering: h[mask] <- h[mask] + alpha * delta at each site, whichever framework brings the tensors.

Adapters differ only in how a tensor gets from its module to `Run.at(site, hidden)` and back.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from steer_plugin.adapters._call import Call, Forward, Tap
from steer_plugin.adapters._compiled import compiled_hint, warn_of_hidden_forwards
from steer_plugin.adapters._follow import Follower
from steer_plugin.adapters._parts import ModelParts
from steer_plugin.adapters._put import Reach, Scaled, Strength, put
from steer_plugin.adapters._travel import managed
from steer_plugin.context import Aside, AsideTokens, Context
from steer_plugin.errors import FrameworkError, PositionError, SiteError
from steer_plugin.intervention import Intervention, Write, expand_rows
from steer_plugin.sites import Site

Stream: TypeAlias = Float[Tensor, "row pos d_model"]
# What a delta noted: the write's site, the forward, which tokens count, a name, the values.
Noted = Callable[[Site, Forward, "Bool[Tensor, 'row pos'] | bool", str, Tensor], None]


class Run(Follower):
    """State of one steering of one model; made by an adapter, dropped at the end of the call.

    Attributes:
        riding: rows of the user's batch while as many twins ride behind them, otherwise 0.
        recording: while a twin runs alone, what it has at the sites that want it; `recorded` is the last of these.
        asides: activations of texts, by (text, form) and site; `words` the embeddings of those read behind pictures.
        noted: who is told what deltas note, if anybody.
        at_close: what to undo when the run ends.
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
        # Not super(): nnsight ships a function as source, without the cell that super() looks into.
        Follower.__init__(self, parts, intervention, taps, completion_tokens, single_forward=single_forward)
        self.riding = 0
        self.recording: dict[Site, Tensor] | None = None
        self.recorded: Mapping[Site, Tensor] = {}
        self.asides: dict[tuple[str, str], Mapping[Site, Tensor]] = {}
        self.words: dict[str, Tensor] = {}
        self.noted: Noted | None = None
        self.at_close: list[Callable[[], None]] = []
        self.fired: set[Site] = set()
        self.on_prompt: dict[int, tuple[int, ...]] = {}
        self.on_decoded: dict[int, int] = {}
        self._matched: set[int] = set()
        self._writes_at = {
            site: [
                i for kind in ("replace", "add") for i, w in enumerate(self.writes) if (w.site, w.kind) == (site, kind)
            ]
            for site in self.sites
        }
        self._reads_at = {
            site: [(i, read) for i, write in enumerate(self.writes) for read in write.reads if read.site == site]
            for site in self.sites
        }
        # Looked up at every token: what cannot change is worked out here.
        self._while_decoding = [write.positions.while_decoding() for write in self.writes]
        alphas = [write.alpha for write in self.writes]
        self._every_row = [isinstance(a, Tensor) and a.is_cpu and bool((a != 0).all()) for a in alphas]
        self._in_vision = [write.site.in_vision for write in self.writes]
        self._recorded_at = {write.site for write in self.writes if write.unsteered or write.asides}

    @managed
    def context_pass(self, group: tuple[int, ...]) -> Generator[None, None, None]:
        """While open, forwards serve the late reads of a group, left out with the late writes not yet known."""
        late = self.late
        self.resolving, self.muted = group, frozenset(late[late.index(group[0]) :])
        try:
            yield
        finally:
            self.resolving, self.muted = (), frozenset()

    def close(self, *, check: bool = False) -> None:
        """Stop following; with `check`, refuse a steering that ran and changed nothing.

        Raises:
            PositionError: some write matched no token in any forward.
        """
        for handle in self._handles:
            handle.remove()
        for undo in self.at_close:
            undo()
        self._endings.close()
        if check and self.writes and not self.forwards:
            warn_of_hidden_forwards()
        if check and self.forwards:
            self.check_fired()
            for index, write in enumerate(self.writes):
                if write.site.in_vision or index in self._matched:
                    continue
                raise PositionError(
                    f"the write at {write.site} on {str(write.positions)!r} matched no token in {self.forwards} "
                    "forward(s): nothing was steered. The first answer token is decided at last_prompt; "
                    "'generated' starts with the first token fed back."
                )

    def check_fired(self) -> None:
        """Refuse a site whose module never ran: a projector without a picture, a layer that looks at pictures alone.

        Raises:
            SiteError: names the site.
        """
        silent = [site for site in self.sites if site not in self.fired]
        if silent:
            raise SiteError(
                f"{silent[0]} did not run in {self.forwards} forward(s), so nothing was read or written there: is the "
                f"prompt without a picture? vlm.check() shows which sites of this model fire.{compiled_hint()}"
            )

    def at(self, site: Site, hidden: Tensor) -> Tensor:
        """Do what is asked for at a site: reads, then writes, then the user's taps; return the tensor to go on with."""
        if self.paused:
            return hidden
        if hidden.ndim != 3:  # Qwen's towers pack all patches into one row, Mllama's projector has an axis of tiles
            return self.at(site, hidden.reshape(-1, *hidden.shape[-2:])).reshape(hidden.shape)
        self.fired.add(site)
        if self.recording is not None:
            if site in self._recorded_at:
                self.recording[site] = hidden.detach()
            return hidden
        if not self._inside and not site.in_vision:
            self._check_recomputed(site)
        if not self.riding or site.in_vision:
            return self._steered(site, hidden, self.recorded.get(site))
        rows = self.riding
        main, twins = hidden[:rows], hidden[rows:]
        out = self._steered(site, main, twins)
        return hidden if out is main else torch.cat([out, twins])

    def _steered(self, site: Site, hidden: Stream, twins: Stream | None) -> Stream:
        forward = self.forward
        if forward is not None:
            for index, read in self._reads_at[site]:
                # A late read belongs to its own context pass; in the main pass it would see its own write.
                if index in self.resolving or (not self.writes[index].late and index not in self.muted):
                    forward.read(index, read, hidden)
        out, own = hidden, False
        for index in self._writes_at[site]:
            if index not in self.muted:
                before = out
                out = self._written(index, hidden, out, twins, own=own)
                # A sum is new, and so is what a replacement was put into; what replaces all of it is the delta's.
                own = own if out is before else self.writes[index].kind == "add" and not torch.is_grad_enabled()
        if self.taps and forward is not None and not self.nested:
            for tap in self.taps:
                if tap.site == site:
                    tap.take(out, forward)
        return out

    def _check_recomputed(self, site: Site) -> None:
        """Gradient checkpointing runs layers again in backward; their masks are known for the last forward only."""
        if self.forward is None:
            raise FrameworkError(f"{site} fired before a forward of the attached model began.")
        if self._awaiting_backward > 1:
            raise FrameworkError(
                f"gradient checkpointing recomputes {site}, but {self._awaiting_backward} forwards ran since the last "
                "backward and which of them is meant is unknown; call backward after each forward."
            )
        self._awaiting_backward = 0

    def _written(self, index: int, hidden: Stream, out: Stream, twins: Stream | None, *, own: bool) -> Stream:
        write, forward = self.writes[index], self.forward
        rows, span = hidden.shape[0], hidden.shape[1]
        if self._in_vision[index]:
            call, reach, context = None, Reach(0, span), Context((), 0, rows)
        elif forward is None:
            return out
        else:
            call = forward.call
            if forward.start >= call.width:
                if not self._while_decoding[index]:
                    return out
                reach = Reach(0, span)
            else:
                reach = forward.reach(write.positions, out.device)
            if not self.nested:
                self._count(index, forward)
            context = self._context(index, write, forward, hidden)
            context.unsteered = twins if write.unsteered else None
        alpha = write.alpha_at(context.step)
        if isinstance(alpha, (int, float)) and alpha == 0 and write.kind == "add":
            return out
        # Layers may lie on several devices: what was made elsewhere goes where it is added.
        # A further replacement keeps what others put in place; sums are all made of what arrived.
        change = write.delta(out if write.kind == "replace" else hidden, context).to(out.device)
        if reach.start >= reach.stop:
            return out
        if write.kind == "replace":
            part = reach.of(out)
            return put(out, reach.of(change).to(out.dtype).expand_as(part), reach, None, own=own)
        strength = self._strength(index, write, alpha, rows, call, out)
        value = self._scaled(index, write, strength, change, context, call, out)
        return put(out, reach.of(out) + reach.of(value), reach, strength.rows, own=own)

    def _strength(
        self, index: int, write: Write, alpha: float | int | Tensor, rows: int, call: Call | None, out: Stream
    ) -> Strength:
        if call is None or callable(write.alpha):
            return Strength.of(alpha, rows, out.device)
        known = call.strengths.get((index, rows, out.device))
        if known is None:
            known = Strength.of(alpha, rows, out.device, every_row=self._every_row[index])
            call.strengths[index, rows, out.device] = known
        return known

    def _scaled(
        self, index: int, write: Write, strength: Strength, change: Tensor, context: Context, call: Call | None,
        out: Stream,
    ) -> Tensor:  # fmt: skip
        """Return alpha * change for this stream; where both stay the same in a call, it is made once."""
        known = None if call is None or callable(write.alpha) else call.scaled.get(index)
        if known is not None and known.serves(change, out):
            return known.value
        value = (strength.factor * change).to(out)
        if call is not None and not callable(write.alpha):
            kept = Scaled.keep(change, value, context.memory.values())
            if kept is not None:
                call.scaled[index] = kept
        return value

    def _context(self, index: int, write: Write, forward: Forward, hidden: Stream) -> Context:
        """What the delta of a write may look at, on the device of the stream that it is shown."""
        call, rows = forward.call, hidden.shape[0]
        reads = self._shown(index, write, forward, hidden) if write.reads else ()
        context = Context(reads, forward.step, rows, call.memory.setdefault(index, {}))
        if write.asides:
            if index not in call.asides:
                call.asides[index] = tuple(self._aside(aside, write.site, call, rows) for aside in write.asides)
            context.asides = call.asides[index]
        if self.noted is not None and not self.nested:
            context.note = partial(self.noted, write.site, forward, forward.mask(write.positions))
        return context

    def _shown(self, index: int, write: Write, forward: Forward, hidden: Stream) -> tuple[Tensor, ...]:
        """What was read for a write, one for each row of the stream; in the prompt it may still change."""
        call, key = forward.call, (index, hidden.shape[0], hidden.device)
        if forward.step > 0 and key in call.shown:
            return call.shown[key]
        values = (call.values[index, read].to(hidden.device) for read in write.reads)
        reads = tuple(expand_rows(value, hidden.shape[0], "contexts") for value in values)
        if forward.step > 0 and not torch.is_grad_enabled():
            call.shown[key] = reads
        return reads

    def _aside(self, aside: Aside, site: Site, call: Call, rows: int) -> AsideTokens:
        """Activations of a text at a site: one for all rows, or one per row, padded at the end."""
        if aside.picture == "input":
            return call.pictured[aside][site]
        texts = [self.asides[text, aside.form][site] for text in aside.texts]
        tokens = pad_sequence(texts, batch_first=True)
        lengths = torch.tensor([len(text) for text in texts], device=tokens.device)
        real = torch.arange(tokens.shape[1], device=tokens.device)[None] < lengths[:, None]
        if len(texts) == 1:
            return AsideTokens(tokens, real)
        return AsideTokens(expand_rows(tokens, rows, "prompt pairs"), expand_rows(real, rows, "prompt pairs"))

    def _count(self, index: int, forward: Forward) -> None:
        if forward.step > 0:
            if self._while_decoding[index]:
                self.on_decoded[index] = self.on_decoded.get(index, 0) + 1
                self._matched.add(index)
        else:
            # In a replay the prompt forward runs one column; the others were counted as the prefix was made.
            self.on_prompt[index] = forward.call.chosen(self.writes[index].positions).counts
            if any(self.on_prompt[index]):
                self._matched.add(index)

    def counts(self) -> list[list[int]]:
        """Tokens written so far by each write, per row: those of the last prompt, plus those fed back."""
        none = (0,) * (0 if self.forward is None else self.forward.call.layout.shape[0])
        return [
            [count + self.on_decoded.get(index, 0) for count in self.on_prompt.get(index, none)]
            for index in range(len(self.writes))
        ]
