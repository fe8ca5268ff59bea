"""What each method's answers cost, item by item, on disk and resumable: KL, surprise to the unsteered model, looks.

    {"id": key, "kl": nats per token or null, "nll": nats per token, "tokens": n}

KL has a meaning only where both models read the same prompt: for an instruction in words it is left out (null).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from tqdm import tqdm

from steer_plugin.adapters import AttachedModel
from steer_plugin.artefact import sha256
from steer_plugin.atomic import JSON, json_bytes
from steer_plugin.evaluation.answers import Answer
from steer_plugin.evaluation.asking import Asked, Method, distinct
from steer_plugin.evaluation.costs import TextCosts, eos_tokens, forced_costs, forced_logits, nll_per_row, text_costs
from steer_plugin.evaluation.intervals import Interval, bootstrap_interval
from steer_plugin.jsonl import JsonLines
from steer_plugin.processes import Processes


class ItemCost(NamedTuple):
    """Costs of one answer, in nats per token: `kl` to the unsteered model (or None), `nll` under it."""

    kl: float | None
    nll: float
    tokens: int


@dataclass(frozen=True)
class MethodCosts:
    """Costs of a method: what its texts look like, over all answers, and over `n` of them what a forward tells.

    Attributes:
        kl: mean over answers of KL(steered || unsteered) along the method's own answers, in nats per token; None for an
            instruction in words, and where none was measured.
        perplexity: of the answers under the unsteered model without that instruction; None where none was measured.
        text: lengths, empty and unfinished answers, distinct-n.
    """

    kl: Interval | None
    perplexity: float | None
    text: TextCosts
    n: int

    def as_json(self) -> dict[str, JSON]:
        """Every figure."""
        return {
            "kl": None if self.kl is None else [self.kl.value, self.kl.low, self.kl.high],
            "perplexity": self.perplexity, "n": self.n, **cast("dict[str, JSON]", asdict(self.text)),
        }  # fmt: skip


def item_costs(
    vlm: AttachedModel,
    items: Sequence[Asked],
    method: Method,
    answers: Mapping[str, Answer],
    *,
    batch_size: int = 32,
    log: Path | None = None,
    job: Mapping[str, JSON] | None = None,
    progress: bool = True,
) -> dict[str, ItemCost]:
    """Read every different item's answer again, steered and unsteered; {key: cost}, resumable when `log` is given.

    Several processes share the batches and need a log; each calls this and gets all costs.

    Raises:
        JobError: `log` belongs to other answers, or another process has ended.
        InputError: a strength that changes from step to step; several processes without a log.
    """
    processes = Processes.current()
    processes.need_folder(log, "measuring costs")
    asked = distinct(items)
    said = [[item.key, list(answers[item.key].tokens)] for item in asked]
    # Another steering may give the same answers at another KL.
    described: dict[str, JSON] = {
        **(job or {}), "method": method.name, "note": method.note, "answers": sha256(json_bytes(said, "answers"))
    }  # fmt: skip
    book = None if log is None else JsonLines(log, described, "costs")
    known = {} if book is None else _known(book)
    share = processes.share([asked[start : start + batch_size] for start in range(0, len(asked), batch_size)])
    with tqdm(
        total=sum(map(len, share)), desc=f"{method.name}: costs", disable=not (progress and processes.main), leave=False
    ) as bar:
        for batch in share:
            if todo := [item for item in batch if item.key not in known]:
                fresh = _batch(vlm, todo, method, [answers[item.key].tokens for item in todo])
                if book is not None:
                    book.add([{"id": item.key, **one._asdict()} for item, one in zip(todo, fresh, strict=True)])
                known.update(zip((item.key for item in todo), fresh, strict=True))
            bar.update(len(batch))
    if book is not None:
        place = {item.key: number for number, item in enumerate(asked)}
        book.gather(lambda row: place.get(str(row["id"]), -1))
        known = _known(book)
    return {item.key: known[item.key] for item in asked}


def method_costs(
    vlm: AttachedModel,
    answers: Mapping[str, Answer],
    costs: Mapping[str, ItemCost],
    groups: Mapping[str, str],
    *,
    seed: int,
) -> MethodCosts:
    """Sum the costs of a method up; `groups` names the picture of each key, `costs` may be of some of the answers."""
    found, pictures = list(costs.values()), [groups[key] for key in costs]
    kls = [cost.kl for cost in found if cost.kl is not None]
    kl = bootstrap_interval(np.array(kls), pictures, seed=seed) if found and len(kls) == len(found) else None
    total = sum(cost.nll * cost.tokens for cost in found) / sum(cost.tokens for cost in found) if found else None
    spoken = list(answers.values())
    text = text_costs([one.text for one in spoken], [one.tokens for one in spoken], eos_tokens(vlm))
    return MethodCosts(kl, None if total is None else math.exp(total), text, len(found))


def _batch(
    vlm: AttachedModel, batch: Sequence[Asked], method: Method, tokens: Sequence[Sequence[int]]
) -> list[ItemCost]:
    inputs = vlm.inputs([item.text for item in batch], [list(item.load_images()) for item in batch])
    lengths = [len(one) for one in tokens]
    steering = method.steering([item.id for item in batch])
    same_words = not method.prefix and method.worded is None
    if steering is None or not same_words or all(write.silent for write in steering.intervention.writes):
        plain = forced_logits(vlm, inputs, tokens)
        nll = nll_per_row(plain.logits, plain.targets, plain.mask).tolist()
        return [ItemCost(0.0 if same_words else None, one, n) for one, n in zip(nll, lengths, strict=True)]
    found = forced_costs(vlm, inputs, tokens, steering)
    return [ItemCost(kl, nll, n) for kl, nll, n in zip(found.kl, found.nll_unsteered, found.tokens, strict=True)]


def _known(book: JsonLines) -> dict[str, ItemCost]:
    try:
        return {str(row["id"]): _cost(row) for row in book.rows}
    except (KeyError, TypeError, ValueError) as error:
        raise book.broken(error) from error


def _cost(row: Mapping[str, JSON]) -> ItemCost:
    kl, nll = cast("float | None", row["kl"]), cast("float", row["nll"])
    return ItemCost(None if kl is None else float(kl), float(nll), int(cast("int", row["tokens"])))
