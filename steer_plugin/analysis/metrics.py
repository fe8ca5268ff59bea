"""What a patch or a steering is measured by: plain callables of the logits, one number per row.

    metric(logits: (row, pos, vocab)) -> (row,)

Prompts are padded on the left, so that [:, -1] decides the first answer token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor

from steer_plugin.adapters import AttachedModel
from steer_plugin.adapters._observe import Observed
from steer_plugin.errors import InputError

Metric: TypeAlias = Callable[[Tensor], Tensor]


def token_id(vlm: AttachedModel, answer: str | int) -> int:
    """Id of an answer's first token, the answer read alone: give " yes" where a space belongs to the word.

    Raises:
        InputError: no processor, a text without tokens or of unknown ones, an id out of range.
    """
    size = int(vlm.root.config.get_text_config().vocab_size)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    if isinstance(answer, int):
        if not 0 <= answer < size:
            raise InputError(f"token id {answer} is out of range: the vocabulary has {size} tokens, 0 to {size - 1}.")
        return answer
    tokenizer = getattr(vlm.processor, "tokenizer", None)
    if tokenizer is None:
        raise InputError(f"the token of {answer!r} needs the model's processor; or give the token's id.")
    ids = cast("list[int]", tokenizer(answer, add_special_tokens=False)["input_ids"])
    if not ids:
        raise InputError(f"the answer {answer!r} has no token.")
    if ids[0] == tokenizer.unk_token_id and answer != tokenizer.unk_token:
        raise InputError(f"the vocabulary has no token for {answer!r}; give another word, or a token id.")
    return ids[0]


@dataclass(frozen=True)
class LogitDifference:
    """metric = logit of one token minus logit of another, at the last prompt token.

    Attributes:
        first, second: token ids.
        name: what axes say.
    """

    first: int
    second: int
    name: str

    def __call__(self, logits: Float[Tensor, "row pos vocab"]) -> Float[Tensor, " row"]:
        """One number per row."""
        last = logits[:, -1].float()
        return last[:, self.first] - last[:, self.second]


@dataclass(frozen=True)
class LogProbability:
    """metric = log of the probability that the first answer token is one of some tokens.

    Attributes:
        tokens: their ids.
        name: what axes say.
    """

    tokens: tuple[int, ...]
    name: str

    def __call__(self, logits: Float[Tensor, "row pos vocab"]) -> Float[Tensor, " row"]:
        """One number per row."""
        return logits[:, -1].float().log_softmax(-1)[:, list(self.tokens)].logsumexp(-1)


def logit_difference(vlm: AttachedModel, first: str | int, second: str | int) -> LogitDifference:
    """Make the metric "yes against no": texts (their first token) or token ids.

    Raises:
        InputError: both are one token, or a text that cannot be read.
    """
    one, two = token_id(vlm, first), token_id(vlm, second)
    if one == two:
        raise InputError(f"{first!r} and {second!r} begin with the same token {one}; their difference is always 0.")
    return LogitDifference(one, two, f"logit of {first} minus {second}")


def log_probability(vlm: AttachedModel, answers: str | int | Sequence[str | int]) -> LogProbability:
    """Make the metric "how likely is one of these first tokens".

    Raises:
        InputError: no answers, or a text that cannot be read.
    """
    asked = [answers] if isinstance(answers, (str, int)) else list(answers)
    if not asked:
        raise InputError("log_probability needs at least one answer.")
    ids = tuple(dict.fromkeys(token_id(vlm, one) for one in asked))
    return LogProbability(ids, f"log probability of {' or '.join(map(str, asked))}")


def name_of(metric: Metric) -> str:
    """What an axis says of a metric: its `name`, or its function's."""
    return str(getattr(metric, "name", getattr(metric, "__name__", type(metric).__name__)))


def measured(metric: Metric, seen: Observed) -> Float[Tensor, " row"]:
    """Apply a metric to a run's logits and check what it gave.

    Raises:
        InputError: prompts padded on the right, whose last column decides nothing; not one finite number per row.
    """
    if not bool(seen.layout.real[:, -1].all()):
        row = int((~seen.layout.real[:, -1]).nonzero()[0])
        raise InputError(
            f"row {row} is padded on the right, so the last column, which metrics look at, decides nothing; build "
            "the inputs with vlm.inputs(...), or pad on the left."
        )
    found = metric(seen.logits)
    rows = seen.logits.shape[0]
    if not isinstance(found, Tensor) or tuple(found.shape) != (rows,):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(
            f"the metric {name_of(metric)!r} gave {shape}; expected a tensor of {rows} numbers, one per row."
        )
    if not bool(torch.isfinite(found).all()):
        raise InputError(f"the metric {name_of(metric)!r} gave NaN or infinite values.")
    return found.float()
