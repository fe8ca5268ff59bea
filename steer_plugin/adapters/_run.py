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
from steer_plugin.adapters._follow import Follower
from steer_plugin.adapters._parts import ModelParts
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
        self.on_prompt: dict[int, Tensor] = {}
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
                "prompt without a picture? vlm.check() shows which sites of this model fire."
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
        out = hidden
        for index in self._writes_at[site]:
            if index not in self.muted:
                out = self._written(index, hidden, out, twins)
        for tap in self.taps:
            if tap.site == site and forward is not None and not self.nested:
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

    def _written(
        self,
        index: int,
        hidden: Stream,
        out: Stream,
        twins: Stream | None,
    ) -> Stream:
        write, forward = self.writes[index], self.forward
        rows = hidden.shape[0]
        if write.site.in_vision:
            mask, context = True, Context((), 0, rows)
        elif forward is None:
            return out
        else:
            mask = forward.mask(write.positions)
            if mask is False:
                return out
            if not self.nested:
                self._count(index, forward, mask)
            context = self._context(index, write, forward, hidden, mask)
            context.unsteered = twins if write.unsteered else None
        alpha = write.alpha_at(context.step)
        if isinstance(alpha, (int, float)) and alpha == 0 and write.kind == "add":
            return out
        # Layers may lie on several devices: what was made elsewhere goes where it is added.
        change = write.delta(hidden, context).to(out.device)
        mask = mask.to(out.device) if isinstance(mask, Tensor) else mask
        if write.kind == "replace":
            new = change.to(out.dtype).expand_as(out)
        else:
            if isinstance(alpha, Tensor) and (alpha.ndim or not alpha.is_cpu):
                alpha = alpha.to(out.device)
            if isinstance(alpha, Tensor) and alpha.ndim:
                alpha = expand_rows(alpha, rows, "strengths")
                # A row of strength 0 keeps its bits: even adding +0.0 would turn -0.0 into 0.0.
                mask = (alpha != 0)[:, None].expand(rows, hidden.shape[1]) & mask
                alpha = alpha[:, None, None]
            new = out + (alpha * change).to(out)
        return new if mask is True else torch.where(torch.as_tensor(mask)[..., None], new, out)

    def _context(
        self, index: int, write: Write, forward: Forward, hidden: Stream, mask: Bool[Tensor, "row pos"] | bool
    ) -> Context:
        """What the delta of a write may look at, on the device of the stream that it is shown."""
        call, rows = forward.call, hidden.shape[0]
        values = (call.values[index, read].to(hidden.device) for read in write.reads)
        reads = tuple(expand_rows(value, rows, "contexts") for value in values)
        context = Context(reads, forward.step, rows, call.memory.setdefault(index, {}))
        if write.asides:
            if index not in call.asides:
                call.asides[index] = tuple(self._aside(aside, write.site, call, rows) for aside in write.asides)
            context.asides = call.asides[index]
        if self.noted is not None and not self.nested:
            context.note = partial(self.noted, write.site, forward, mask)
        return context

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

    def _count(self, index: int, forward: Forward, mask: Tensor | bool) -> None:
        if forward.step > 0:
            if self.writes[index].positions.while_decoding():
                self.on_decoded[index] = self.on_decoded.get(index, 0) + 1
                self._matched.add(index)
        elif isinstance(mask, Tensor):
            # In a replay the prompt forward runs one column; the others were counted as the prefix was made.
            self.on_prompt[index] = forward.call.prompt_mask(self.writes[index].positions).sum(-1)
            if index not in self._matched and bool(self.on_prompt[index].any()):
                self._matched.add(index)

    def counts(self) -> list[list[int]]:
        """Tokens written so far by each write, per row: those of the last prompt, plus those fed back."""
        rows = 0 if self.forward is None else self.forward.call.layout.shape[0]
        none = torch.zeros(rows, dtype=torch.long)
        return [
            (self.on_prompt.get(index, none) + self.on_decoded.get(index, 0)).tolist()
            for index in range(len(self.writes))
        ]
