"""Texts of their own (p+ and p-): read without steering, once per text and model, and kept as long as the model stays.

Read apart, a text's activations hang on nothing but the model, so they serve every call; read behind the picture of the
input, they are read anew with every prompt.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from steer_plugin.adapters._chat import chat_text, special_tokens
from steer_plugin.adapters._parts import ModelParts
from steer_plugin.adapters._replay import Quiet
from steer_plugin.adapters._run import Run
from steer_plugin.context import Aside, AsideTokens
from steer_plugin.errors import InputError
from steer_plugin.layout import TokenLayout
from steer_plugin.sites import Site

KEPT_BYTES = 256 * 2**20
Spelled = tuple[Sequence[int], slice]


def spell(processor: ProcessorMixin | None, text: str, form: str, longest: int) -> Spelled:
    """Return the token ids of a text in its form, and which of them are the text's own.

    Raises:
        InputError: no processor, a tokenizer without offsets, a text without tokens, or longer than the context.
    """
    tokenizer = cast("Any", getattr(processor, "tokenizer", None))
    if processor is None or tokenizer is None:
        raise InputError("prompt pairs are texts: attach the model with its processor, sp.attach(model, processor).")
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} does not say where its tokens lie in a text; load a fast tokenizer."
        )
    whole = chat_text(processor, text, 0) if form == "chat" else text
    begin = whole.rindex(text.strip())
    end = begin + len(text.strip())
    encoded = tokenizer(whole, return_offsets_mapping=True, **special_tokens(processor, whole))
    ids = cast("list[int]", encoded["input_ids"])
    spans = cast("list[tuple[int, int]]", encoded["offset_mapping"])
    own = [i for i, (start, stop) in enumerate(spans) if start < end and stop > begin and stop > start]
    if not own:
        raise InputError(f"the prompt {text!r} has no token; give words that the tokenizer knows.")
    if len(ids) > longest:
        raise InputError(
            f"the prompt {text[:40]!r}... has {len(ids)} tokens, the model's context holds {longest}; shorten it."
        )
    return ids, slice(own[0], own[-1] + 1)


@dataclass
class Reader:
    """Stands in for a run while a text is read: keeps what passes at some sites."""

    sites: list[Site]
    got: dict[Site, Tensor] = field(default_factory=dict)

    def at(self, site: Site, hidden: Tensor) -> Tensor:
        self.got[site] = hidden.detach()
        return hidden


# Puts a reader in place of whatever steers, and yields (embed ids, run the decoder).
Reading = Callable[[Reader], AbstractContextManager[tuple[Callable[..., Tensor], Callable[..., object]]]]


class Asides:
    """Activations of texts, by (text, form) and site; the least lately used go first, all go when a weight changes."""

    def __init__(self, parts: ModelParts, processor: ProcessorMixin | None, kept_bytes: int = KEPT_BYTES) -> None:
        self.parts, self.processor, self.kept_bytes = parts, processor, kept_bytes
        # Each (pos, d_model); a jaxtyping name inside a function would travel with a remote request.
        self._kept = OrderedDict[tuple[str, str], dict[Site, Tensor]]()
        self._version: object = None
        self._spelled: dict[tuple[str, str], Spelled] = {}

    def __len__(self) -> int:
        """Count the texts that are kept."""
        return len(self._kept)

    def clear(self) -> None:
        """Forget all texts."""
        self._kept.clear()
        self._spelled.clear()

    @property
    def nbytes(self) -> int:
        """Memory that the kept activations take."""
        return sum(t.numel() * t.element_size() for kept in self._kept.values() for t in kept.values())

    def spelled(self, text: str, form: str) -> Spelled:
        """Token ids of a text; see `spell`."""
        if (text, form) in self._spelled:
            return self._spelled[text, form]
        longest = int(getattr(self.parts.root.config.get_text_config(), "max_position_embeddings", 0) or 2**31)
        self._spelled[text, form] = spell(self.processor, text, form, longest)
        return self._spelled[text, form]

    def serve(self, run: Run, reading: Reading) -> None:
        """Give a run what its asides need, reading what is not known yet.

        Raises:
            InputError: see `spell`.
        """
        sites_of: dict[Aside, set[Site]] = {}
        for write in run.writes:
            for aside in write.asides:
                sites_of.setdefault(aside, set()).add(write.site)
        texts = {(text, aside.form) for aside in sites_of for text in aside.texts}
        for text, form in sorted(texts):
            self.spelled(text, form)  # refuses before any work
        if texts and (version := self.parts.version()) != self._version:
            self._kept.clear()
            self._version = version
        for aside, sites in sites_of.items():
            for text in dict.fromkeys(aside.texts):
                if aside.picture == "input":
                    self._check_behind_pictures()
                    run.words[text] = self._words(text, reading)
                else:
                    run.asides[text, aside.form] = self._known(text, aside.form, sites, reading)
        while self.nbytes > self.kept_bytes and len(self._kept) > 1:
            self._kept.popitem(last=False)

    def _check_behind_pictures(self) -> None:
        """Behind a picture only plain positions and causal attention can be continued by words of its own.

        Raises:
            InputError: a family with mRoPE, or with masks made for the whole prompt.
        """
        family = self.parts.family
        if family.positions != "mask" or family.replay != "exact":
            raise InputError(
                f"picture='input' cannot be read in family {family.name!r}, whose positions or masks belong to the "
                "whole prompt; use picture='none'."
            )

    def _words(self, text: str, reading: Reading) -> Float[Tensor, "pos d_model"]:
        ids, own = self.spelled(text, "bare")
        with torch.no_grad(), reading(Reader([])) as (embed, _):
            return embed(self._tensor(ids[own]))[0]

    def _known(self, text: str, form: str, sites: set[Site], reading: Reading) -> Mapping[Site, Tensor]:
        known = self._kept.setdefault((text, form), {})
        self._kept.move_to_end((text, form))
        if missing := sites - known.keys():
            known.update(self._read((text, form), missing, reading))
        return dict(known)

    def _tensor(self, ids: Sequence[int]) -> Int[Tensor, "1 pos"]:
        return torch.tensor([list(ids)], device=self.parts.device)

    def _read(self, key: tuple[str, str], sites: Iterable[Site], reading: Reading) -> dict[Site, Tensor]:
        # One text at a time: in a padded batch its last bits would hang on its neighbours.
        ids, own = self.spelled(*key)
        reader, tokens = Reader(sorted(sites, key=lambda site: site.order)), self._tensor(ids)
        with torch.no_grad(), reading(reader) as (embed, decoder):
            decoder(inputs_embeds=embed(tokens), attention_mask=torch.ones_like(tokens), use_cache=False)
        return {site: hidden[0, own].clone() for site, hidden in reader.got.items()}


class BehindPictures:
    """Reads asides behind the pictures of each prompt, at the decoder's boundary."""

    def __init__(self, run: Run, quiet: Quiet) -> None:
        self._run, self.quiet = weakref.ref(run), quiet

    def install(self, run: Run) -> None:
        """Hook the decoder's boundary; the hook goes with the run."""
        run.attend(self, run.parts.decoder, BehindPictures._before)

    def _before(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        run, embeds = self._run(), kwargs.get("inputs_embeds")
        if run is None or run.paused or run.recording is not None or run.nested:
            return
        forward = run.forward
        if isinstance(embeds, Tensor) and forward is not None and forward.step == 0 and not forward.call.pictured:
            for aside in {aside for write in run.writes for aside in write.asides if aside.picture == "input"}:
                forward.call.pictured[aside] = self._read(run, aside, embeds.detach(), forward.call.layout)

    def _read(self, run: Run, aside: Aside, embeds: Tensor, layout: TokenLayout) -> Mapping[Site, AsideTokens]:
        image, rows = layout.named("image"), embeds.shape[0]
        if not bool(image.any(-1).all()):
            row = int((~image.any(-1)).nonzero()[0])
            raise InputError(f"picture='input' reads pairs behind the input's picture, and row {row} has none.")
        words = [run.words[aside.texts[row * len(aside.texts) // rows]] for row in range(rows)]
        ends = torch.where(image, torch.arange(image.shape[1], device=image.device), -1).amax(-1)
        pieces = [
            torch.cat([embeds[row, : int(ends[row]) + 1][layout.real[row, : int(ends[row]) + 1]], words[row]])
            for row in range(rows)
        ]
        # Padded in front, as prompts are, so that each text ends in the last column.
        padded = pad_sequence([piece.flip(0) for piece in pieces], batch_first=True).flip(1)
        mask = _ends(torch.tensor([len(piece) for piece in pieces]), padded.shape[1]).to(embeds.device).long()
        run.recording = {}
        try:
            with self.quiet(run) as decoder, torch.no_grad():
                decoder(
                    inputs_embeds=padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                    use_cache=False,
                )  # fmt: skip
            got = run.recording
        finally:
            run.recording = None
        longest = max(map(len, words))
        real = _ends(torch.tensor([len(own) for own in words]), longest).to(embeds.device)
        return {site: AsideTokens(hidden[:, -longest:], real) for site, hidden in got.items()}


def _ends(lengths: Int[Tensor, " row"], width: int) -> Bool[Tensor, "row pos"]:
    """True in the last `length` columns of each row."""
    return torch.arange(width)[None] >= width - lengths[:, None]


def install_asides(run: Run, quiet: Quiet) -> None:
    """Let a run read its asides behind pictures, if it has such."""
    if any(aside.picture == "input" for write in run.writes for aside in write.asides):
        BehindPictures(run, quiet).install(run)
