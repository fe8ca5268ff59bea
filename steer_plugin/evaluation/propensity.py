"""Propensity: log odds of one opening of the answer over another, measured at several strengths of one steering.

    m(x, a) = sum_t log p(positive_t | x, positive before t) - sum_t log p(negative_t | x, negative before t)

under the model steered by `a` times the steering's own strength; both openings are read by teacher forcing, steered as
the same tokens would be while decoding. Source: Tan et al., arXiv 2407.12404, section 3, where openings are one token.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from steer_plugin.adapters import AttachedModel
from steer_plugin.adapters._chat import completion_ids
from steer_plugin.atomic import JSON
from steer_plugin.contrast import ContrastivePair
from steer_plugin.errors import InputError, JobError
from steer_plugin.evaluation.costs import ForcedLogits, forced_logits, nll_per_row
from steer_plugin.intervention import Steerable
from steer_plugin.jsonl import JsonLines, Row
from steer_plugin.processes import Processes

ALPHAS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
# One steering for all inputs, or what makes one from the ids of a batch.
Steering: TypeAlias = Steerable | Callable[[Sequence[str]], Steerable]


def propensities(
    vlm: AttachedModel,
    steering: Steering,
    pairs: Sequence[ContrastivePair],
    alphas: Sequence[float] = ALPHAS,
    *,
    suffix: bool = False,
    batch_size: int = 16,
    progress: bool = True,
    out: Path | str | None = None,
) -> Float[np.ndarray, "input alpha"]:
    """Measure every pair at every strength; resumable in the folder `out`, where several processes meet.

    Raises:
        InputError: no processor, no pairs or ids that repeat, fewer than two strengths, a steering that cannot be
            scaled or that changes from step to step, an opening that melts into the prompt.
        JobError: `out` holds another job, or another steering.
    """
    processes = Processes.current()
    processes.need_folder(out, "measuring propensities")
    strengths = _checked(vlm, pairs, alphas, batch_size)
    chunks = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    book = None if out is None else JsonLines(
        Path(out) / "propensity.jsonl", _job(vlm, steering, pairs, suffix, batch_size), "propensities"
    )  # fmt: skip
    known = {} if book is None else _known(book)
    if known:
        _compare(_Batch(vlm, steering, chunks[0], suffix), known, str(out))
    share, shown = processes.share(chunks), progress and processes.main
    total = sum(map(len, share)) * len(strengths)
    with tqdm(total=total, desc="propensity", unit="pair", disable=not shown) as bar:
        for chunk in share:
            # Half a batch is done again whole: rounding is that of a run which was never interrupted.
            todo = [alpha for alpha in strengths if any((pair.id, alpha) not in known for pair in chunk)]
            batch = _Batch(vlm, steering, chunk, suffix) if todo else None
            for alpha in todo:
                found = [] if batch is None else batch.at(alpha)
                fresh = {(pair.id, alpha): m for pair, m in zip(chunk, found, strict=True)}
                if book is not None:
                    book.add([{"id": i, "alpha": a, "m": m} for (i, a), m in fresh.items() if (i, a) not in known])
                known = {**fresh, **known}
            bar.update(len(chunk) * len(strengths))
    if book is not None:
        order = [(pair.id, alpha) for chunk in chunks for alpha in strengths for pair in chunk]
        place = {one: number for number, one in enumerate(order)}
        book.gather(lambda row: place.get(_place(row), -1))
        known = _known(book)
    return np.array([[known[pair.id, alpha] for alpha in strengths] for pair in pairs])


def _place(row: Row) -> tuple[str, float]:
    return str(row["id"]), cast("float", row["alpha"])


def _known(book: JsonLines) -> dict[tuple[str, float], float]:
    return {_place(row): cast("float", row["m"]) for row in book.rows}


class _Batch:
    """Pairs encoded once, to be read at several strengths."""

    def __init__(self, vlm: AttachedModel, steering: Steering, pairs: Sequence[ContrastivePair], suffix: bool) -> None:
        self.vlm = vlm
        self.ids = [pair.id for pair in pairs]
        self.steering = steering if isinstance(steering, Steerable) else steering(self.ids)
        texts = [_text(pair, suffix) for pair in pairs]
        processor = vlm.processor
        if processor is None:
            raise InputError("propensity needs the model's processor: sp.attach(model, processor=processor).")
        self.openings = tuple(
            [
                completion_ids(processor, text, one.positive if side else one.negative, f"pair {one.id!r}")
                for text, one in zip(texts, pairs, strict=True)
            ]
            for side in (True, False)
        )
        self.inputs = vlm.inputs(texts, [list(pair.load_images()) for pair in pairs])

    def at(self, alpha: float) -> list[float]:
        """Propensity of each pair at one strength."""
        positive, negative = self.openings
        scaled = self.steering * alpha
        found = forced_logits(self.vlm, self.inputs, positive, scaled)
        if all(len(one) == 1 for one in (*positive, *negative)):
            # Both are decided by the same logits.
            last = found.logits[:, -1].float()
            first, second = (last.gather(1, torch.tensor(side, device=last.device)) for side in (positive, negative))
            return (first - second)[:, 0].tolist()
        other = forced_logits(self.vlm, self.inputs, negative, scaled)
        return (_log_p(found) - _log_p(other)).tolist()


def _log_p(found: ForcedLogits) -> Float[Tensor, " row"]:
    """Log-probability of each whole opening."""
    return -nll_per_row(found.logits, found.targets, found.mask) * found.mask.sum(-1)


def _text(pair: ContrastivePair, suffix: bool) -> str:
    return pair.user_text if suffix else pair.prompt


def _checked(
    vlm: AttachedModel, pairs: Sequence[ContrastivePair], alphas: Sequence[float], batch_size: int
) -> list[float]:
    """Refuse, before any work, what cannot be measured."""
    if vlm.processor is None:
        raise InputError("propensity needs the model's processor: sp.attach(model, processor=processor).")
    ids = [pair.id for pair in pairs]
    if not ids or len(set(ids)) < len(ids):
        odd = next((one for one in ids if ids.count(one) > 1), None)
        raise InputError(f"got {len(ids)} pairs, id {odd!r} more than once: expected at least one, each id once.")
    strengths = [float(alpha) for alpha in alphas]
    if len(strengths) < 2 or len(set(strengths)) < len(strengths) or not all(map(math.isfinite, strengths)):
        raise InputError(
            f"alphas are {list(alphas)}: expected two or more finite numbers, each once, such as {ALPHAS}."
        )
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: expected at least 1.")
    return strengths


def _job(
    vlm: AttachedModel, steering: Steering, pairs: Sequence[ContrastivePair], suffix: bool, batch_size: int
) -> dict[str, JSON]:
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update("\x1f".join([pair.id, _text(pair, suffix), pair.positive, pair.negative]).encode())
    one = steering if isinstance(steering, Steerable) else steering([pair.id for pair in pairs[:batch_size]])
    return {
        "model": {**vlm.parts.identity(), "weights": vlm.parts.fingerprint()},
        "writes": [f"{w.kind} {w.site} on {w.positions}, alpha {w.alpha}" for w in one.intervention.writes],
        "pairs": len(pairs),
        "pairs_sha256": digest.hexdigest(),
        # Padding, hence rounding, depends on who shares the batch.
        "batch_size": batch_size,
    }


def _compare(batch: _Batch, known: Mapping[tuple[str, float], float], where: str) -> None:
    """Measure one strength again: a steering refitted since looks the same from outside."""
    done = [alpha for one, alpha in known if one == batch.ids[0]]
    alpha = max(done, key=abs, default=0.0)
    again = batch.at(alpha)
    for one, m in zip(batch.ids, again, strict=True):
        before = known.get((one, alpha), m)
        if not math.isclose(m, before, rel_tol=1e-2, abs_tol=1e-2):
            raise JobError(
                f"{where} holds the propensities of another steering: {one!r} had {before:.4g} at alpha {alpha}, and "
                f"has {m:.4g} now. Choose another folder, or delete it."
            )
