"""What steering costs, to stand beside what it gains: how far it moves the model, and what becomes of the text.

    KL(steered || unsteered) = sum over v of p_s(v) (log p_s(v) - log p_u(v)),  at every token of a given answer
    perplexity = exp(- sum over answer tokens t of log p_u(t | prompt, answer before t) / count)
    distinct-n = different n-grams / n-grams                                            (arXiv 1510.03055)

Both models read the same prompt and the same answer (teacher forcing). Answers that the steered model wrote give its
own KL, and the perplexity says how odd they look to the unsteered one. All logarithms are natural.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steer_plugin.adapters import AttachedModel
from steer_plugin.adapters._completions import forced_inputs, until_eos
from steer_plugin.adapters._inputs import with_positions
from steer_plugin.context import Read
from steer_plugin.errors import InputError, PositionError
from steer_plugin.intervention import Intervention, Steerable, Write


@dataclass(frozen=True)
class ForcedLogits:
    """Logits that decide each token of the answers; rows are right-aligned, `mask` is True on answer tokens."""

    logits: Float[Tensor, "row pos vocab"]
    targets: Int[Tensor, "row pos"]
    mask: Bool[Tensor, "row pos"]


@dataclass(frozen=True)
class ForcedCosts:
    """Costs of each answer (row), in nats per answer token; add several of them to join batches.

    Attributes:
        kl: mean over the answer's tokens of KL(steered || unsteered).
        nll_steered, nll_unsteered: mean of -log p of the answer's tokens under either model.
        tokens: how many tokens each answer has, end of sequence included.
    """

    kl: tuple[float, ...]
    nll_steered: tuple[float, ...]
    nll_unsteered: tuple[float, ...]
    tokens: tuple[int, ...]

    def __add__(self, other: ForcedCosts) -> ForcedCosts:
        """Rows of both."""
        return ForcedCosts(
            self.kl + other.kl,
            self.nll_steered + other.nll_steered,
            self.nll_unsteered + other.nll_unsteered,
            self.tokens + other.tokens,
        )

    @property
    def mean_kl(self) -> float:
        """Mean over answers, long and short alike."""
        return sum(self.kl) / len(self.kl)

    @property
    def perplexity(self) -> float:
        """Perplexity of the answers under the unsteered model, over all their tokens."""
        return math.exp(sum(n * t for n, t in zip(self.nll_unsteered, self.tokens, strict=True)) / sum(self.tokens))


@dataclass(frozen=True)
class TextCosts:
    """What answers look like: mean lengths, shares between 0 and 1.

    Attributes:
        tokens: mean number of tokens, end of sequence left out.
        words: mean number of words between white space.
        empty: share of answers without any character but white space.
        unfinished: share without an end of sequence, so cut off; None for a model that has no such token.
        distinct_1, distinct_2: distinct-n over the words of all answers; compare it between equally many answers only.
    """

    tokens: float
    words: float
    empty: float
    unfinished: float | None
    distinct_1: float
    distinct_2: float
    n: int


# -- on logits: pure torch -------------------------------------------------------------------------------------------


def kl_per_row(
    steered: Float[Tensor, "row pos vocab"],
    unsteered: Float[Tensor, "row pos vocab"],
    mask: Bool[Tensor, "row pos"],
) -> Float[Tensor, " row"]:
    """Mean KL(steered || unsteered) over the masked tokens of each row, in nats; raises InputError for an empty row."""
    # Row by row: a batch of long answers over a large vocabulary, in float32, is gigabytes at every step.
    found = [_kl(one, other) for one, other in zip(steered, unsteered, strict=True)]
    return _masked_mean(torch.stack(found), mask)


def nll_per_row(
    logits: Float[Tensor, "row pos vocab"], targets: Int[Tensor, "row pos"], mask: Bool[Tensor, "row pos"]
) -> Float[Tensor, " row"]:
    """Mean of -log p(target) over the masked tokens of each row, in nats; raises InputError for an empty row."""
    chosen = [
        row.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0] for row, ids in zip(logits, targets, strict=True)
    ]
    return _masked_mean(-torch.stack(chosen), mask)


def _kl(steered: Float[Tensor, "pos vocab"], unsteered: Float[Tensor, "pos vocab"]) -> Float[Tensor, " pos"]:
    log_s, log_u = steered.float().log_softmax(-1), unsteered.float().log_softmax(-1)
    # A word that is impossible when steered adds nothing, whatever the other model thinks of it.
    terms = torch.where(log_s == -torch.inf, 0.0, log_s.exp() * (log_s - log_u))
    # No KL is below 0; rounding may put one there.
    return terms.sum(-1).clamp(min=0)


def perplexity(
    logits: Float[Tensor, "row pos vocab"], targets: Int[Tensor, "row pos"], mask: Bool[Tensor, "row pos"]
) -> float:
    """Perplexity of all masked tokens together; raises InputError for an empty row."""
    counts = mask.sum(-1)
    return math.exp(float((nll_per_row(logits, targets, mask) * counts).sum() / counts.sum()))


# -- on an attached model --------------------------------------------------------------------------------------------


def forced_costs(
    vlm: AttachedModel, inputs: Mapping[str, Tensor], answers: Sequence[Sequence[int]], steering: Steerable
) -> ForcedCosts:
    """Read the answers steered and unsteered, in one forward each; (row, pos) prompts, one list of token ids per row.

    `answer_tokens` makes the lists from what `vlm.generate` returned. Raises InputError for an answer without tokens
    or a strength that changes from step to step, PositionError for a write that matched no token.
    """
    steered = forced_logits(vlm, inputs, answers, steering)
    plain = forced_logits(vlm, inputs, answers)
    kl = kl_per_row(steered.logits, plain.logits, steered.mask)
    own, other = (nll_per_row(one.logits, one.targets, one.mask) for one in (steered, plain))
    tokens = tuple(len(answer) for answer in answers)
    return ForcedCosts(tuple(kl.tolist()), tuple(own.tolist()), tuple(other.tolist()), tokens)


@torch.no_grad()
def forced_logits(
    vlm: AttachedModel,
    inputs: Mapping[str, Tensor],
    answers: Sequence[Sequence[int]],
    steering: Steerable | None = None,
) -> ForcedLogits:
    """Run prompts with their answers once, by torch hooks on the Hugging Face model; errors as for `forced_costs`."""
    rows, lengths = inputs["input_ids"].shape[0], [len(answer) for answer in answers]
    if len(answers) != rows:
        raise InputError(f"Got {len(answers)} answers for {rows} prompts: expected one list of token ids per prompt.")
    if 0 in lengths:
        raise InputError(f"Answer {lengths.index(0)} has no token: expected at least its end of sequence.")
    full = with_positions(vlm.parts, _joined(vlm, inputs, answers))
    added = Intervention(()) if steering is None else forced(steering)
    width = max(lengths)
    with vlm.steering_root(added, completion_tokens=lengths) as root:
        out = cast("Any", root)(**full, use_cache=False, logits_to_keep=width + 1)
        _check_counts(added, vlm.counts)
    ids = full["input_ids"][:, -width:]
    mask = torch.arange(width, device=ids.device) >= width - torch.tensor(lengths, device=ids.device)[:, None]
    # The column before a token decides it.
    return ForcedLogits(out.logits[:, -width - 1 : -1], ids.to(out.logits.device), mask.to(out.logits.device))


def forced(steering: Steerable) -> Intervention:
    """Return a steering that treats a forced answer as it would the same tokens while decoding.

    What is fed back while decoding is the completion of one forward, and values are read on the prompt alone. Raises
    InputError for a strength that changes from step to step: one forward has no steps.
    """
    return Intervention(tuple(_forced(write) for write in steering.intervention.writes))


def answer_tokens(vlm: AttachedModel, inputs: Mapping[str, Tensor], ids: Int[Tensor, "row pos"]) -> list[list[int]]:
    """Cut the answers out of what `vlm.generate(**inputs, ...)` returned, up to and with the end of sequence."""
    new = ids[:, inputs["input_ids"].shape[1] :]
    alive = until_eos(new, vlm.root)
    return [row[keep].tolist() for row, keep in zip(new, alive, strict=True)]


def eos_tokens(vlm: AttachedModel) -> tuple[int, ...]:
    """Token ids that end an answer of this model; () when it has none."""
    eos = cast("Any", vlm.root).generation_config.eos_token_id
    return () if eos is None else (int(eos),) if isinstance(eos, int) else tuple(int(one) for one in eos)


# -- on texts --------------------------------------------------------------------------------------------------------


def text_costs(texts: Sequence[str], answers: Sequence[Sequence[int]], eos: Sequence[int] = ()) -> TextCosts:
    """Describe answers, given as texts and as token ids; `eos` is what `eos_tokens(vlm)` says.

    Raises InputError for no answers, or unequally many texts and token lists.
    """
    if not texts or len(texts) != len(answers):
        raise InputError(f"Got {len(texts)} texts and {len(answers)} token lists: expected one of each per answer.")
    words = [text.split() for text in texts]
    return TextCosts(
        tokens=sum(sum(token not in eos for token in answer) for answer in answers) / len(answers),
        words=sum(map(len, words)) / len(words),
        empty=empty_rate(texts),
        unfinished=unfinished_rate(answers, eos) if eos else None,
        distinct_1=distinct_n(words, 1),
        distinct_2=distinct_n(words, 2),
        n=len(texts),
    )


def distinct_n(answers: Sequence[Sequence[Hashable]], n: int) -> float:
    """Share of different n-grams among those of all answers (words or token ids), 0 without any; InputError if n < 1.

    It falls with the amount of text, so only equally many answers of like length compare.
    """
    if n < 1:
        raise InputError(f"n is {n}: expected n-grams of 1 or more words.")
    grams = [tuple(answer[k : k + n]) for answer in answers for k in range(len(answer) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def empty_rate(texts: Sequence[str]) -> float:
    """Share of answers that hold nothing but white space; raises InputError for no answers."""
    if not texts:
        raise InputError("Got no answers: expected at least one text.")
    return sum(not text.strip() for text in texts) / len(texts)


def unfinished_rate(answers: Sequence[Sequence[int]], eos: Sequence[int]) -> float:
    """Share of answers (token ids) without an end of sequence; raises InputError for no answers or no such token."""
    if not answers or not eos:
        raise InputError(
            f"Got {len(answers)} answers and the end-of-sequence ids {list(eos)}: expected at least one of each. A "
            "model without such a token never finishes."
        )
    return sum(not set(eos) & set(answer) for answer in answers) / len(answers)


def _masked_mean(values: Float[Tensor, "row pos"], mask: Bool[Tensor, "row pos"]) -> Float[Tensor, " row"]:
    counts = mask.sum(-1)
    if bool((counts == 0).any()):
        row = int((counts == 0).nonzero()[0])
        raise InputError(f"Row {row} of the mask selects no token: expected at least one token of every answer.")
    # Not values * mask: what stands under padding may be infinite.
    return torch.where(mask, values, 0.0).sum(-1) / counts


def _joined(vlm: AttachedModel, inputs: Mapping[str, Tensor], answers: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    given = {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}
    return forced_inputs(given, answers, vlm.parts.family.answer_type)[0]


def _forced(write: Write) -> Write:
    if callable(write.alpha):
        raise InputError(
            f"the strength of the write at {write.site} changes from step to step, and a forced answer is read in one "
            "step; give a number."
        )
    reads = tuple(Read(read.site, read.positions & "prompt") for read in write.reads)
    return replace(write, positions=write.positions.forced(), reads=reads)


def _check_counts(added: Intervention, counts: Sequence[Sequence[int]]) -> None:
    """Refuse a write that ran and changed nothing; those of outer blocks come first in `counts`."""
    writes = [write for write in added.writes if not write.silent]
    for write, tokens in zip(writes, list(counts)[len(counts) - len(writes) :], strict=True):
        if not write.site.in_vision and not sum(tokens):
            raise PositionError(
                f"the write at {write.site} on {str(write.positions)!r} matched no token of the prompts and answers: "
                "nothing was steered. Name tokens that these prompts have."
            )
