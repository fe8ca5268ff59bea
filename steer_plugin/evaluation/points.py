"""Points of a curve over strengths (and layers): what a steering does for a behaviour, and what damage it does.

    behaviour = mean over items of a score of the answers, higher is better
    damage    = mean over items of KL(steered || unsteered) per token along the unsteered model's own answer  (KLBound)
    damage    = 1 - mean quality of the steered answers / mean quality of the unsteered ones             (QualityBound)

Prompts run once (`vlm.prefix`): steerings that touch the last prompt token and the answer alone go on from there. A
quality loss below 10 % is the bound of Learning to Steer (arXiv 2508.12815). Several processes share the batches of
items, and meet in the log.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from steer_plugin.adapters._prefix import Prefix
from steer_plugin.atomic import JSON
from steer_plugin.errors import InputError
from steer_plugin.evaluation.asking import Asked, distinct
from steer_plugin.evaluation.bounds import (
    UNSTEERED,
    Behaviour,
    KLBound,
    Point,
    QualityBound,
    Scores,
    Where,
    at_strength,
)
from steer_plugin.evaluation.costs import answer_tokens, forced_logits, kl_per_row
from steer_plugin.evaluation.intervals import Interval, Statistic, Values, bootstrap_interval, mean, paired_difference
from steer_plugin.evaluation.task import Task
from steer_plugin.intervention import Steerable
from steer_plugin.jsonl import JsonLines, Row
from steer_plugin.processes import Processes


@dataclass
class Batch:
    """Items that are asked together: their prompts, what the unsteered model said, and its logits there."""

    items: Sequence[Asked]
    prefix: Prefix
    tokens: Sequence[Sequence[int]]
    plain: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Memory that keeping it takes."""
        tensors = [*self.prefix.inputs.values(), *([] if self.plain is None else [self.plain])]
        return self.prefix.nbytes + sum(one.nbytes for one in tensors)


class Points:
    """Evaluates points of a task, each batch of items once per point; keeps prompts, answers and logits.

    Attributes:
        asked, ran: prompt tokens that would have been run from the beginning, and those that were.
    """

    def __init__(self, task: Task) -> None:
        self.task, self._processes = task, Processes.current()
        self._processes.need_folder(task.out, "choosing a strength")
        self.asked = self.ran = 0
        asked, size = distinct(task.items), task.batch_size
        self._items = [asked[start : start + size] for start in range(0, len(asked), size)]
        self._log = None if task.out is None else JsonLines(Path(task.out), task.described, "points")
        self._rows: dict[tuple[str, float, int], Row] = {}
        self._order: dict[tuple[str, float, int], int] = {}  # in which one process would come to them
        self._done: dict[Where, Point] = {}
        self._batches: dict[int, Batch] = {}
        self._last: tuple[int, Batch] | None = None
        self._told: dict[tuple[int, int, str, float], tuple[Point, Point, Interval]] = {}
        for row in [] if self._log is None else self._log.rows:
            self._take(row)

    @property
    def reused(self) -> float:
        """Share of prompt tokens that this process did not run again."""
        return 1 - self.ran / self.asked if self.asked else 0.0

    @cached_property
    def unsteered(self) -> Point:
        """Strength 0."""
        return self.at([UNSTEERED])[0]

    def at(self, wanted: Sequence[Where]) -> list[Point]:
        """Evaluate (name, strength) points; rows that are on disk are not computed again.

        Raises:
            InputError, SiteError, PositionError: what the model cannot host, scores of another number than the items.
        """
        places = [UNSTEERED if alpha == 0 else (name, float(alpha)) for name, alpha in wanted]
        # The same in every process: all of them meet where there is anything new, and nowhere else.
        if fresh := [where for where in dict.fromkeys(places) if where not in self._done]:
            self._evaluate(fresh)
            for where in fresh:
                self._done[where] = self._point(where)
        return [self._done[where] for where in places]

    def difference(
        self, first: Point, second: Point, what: str = "scores", level: float | int | None = None
    ) -> Interval:
        """Return first - second with its paired interval, over the items that count for both."""
        one, other = getattr(first, what), getattr(second, what)
        both, groups = np.isfinite(one) & np.isfinite(other), self.task.groups
        chosen = None if groups is None else [str(groups[i]) for i in np.flatnonzero(both).tolist()]
        level = self.task.level if level is None else level
        # By the points themselves: a search asks again and again for the same ones.
        key = (id(first), id(second), what, level)
        if key not in self._told:
            gap = paired_difference(one[both], other[both], chosen, seed=self.task.seed, level=level)
            self._told[key] = (first, second, gap)
        return self._told[key][2]

    def _evaluate(self, places: Sequence[Where]) -> None:
        """Run what is not on disk of this process's batches, and take in what the others ran."""
        share, shown = self._processes.share(range(len(self._items))), self.task.progress and self._processes.main
        bar = tqdm(total=len(places) * len(share), desc="points", unit="batch", disable=not shown, leave=False)
        for index in share:
            for where in places:
                if (*where, index) not in self._rows:
                    self._run(where, index)
                bar.update()
        bar.close()
        self._last = None
        for index in range(len(self._items)):
            for where in (UNSTEERED, *places):
                self._order.setdefault((*where, index), len(self._order))
        if self._log is not None:
            self._log.gather(lambda row: self._order.get(_place(row), -1))
            for row in self._log.rows:
                self._take(row)

    # -- running -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _run(self, where: Where, index: int) -> None:
        name, alpha = where
        if where == UNSTEERED:
            self._batch(index)
            return
        batch, vlm = self._batch(index), self.task.vlm
        made = at_strength(self.task.steerings[name], alpha)
        steering = made if made is None or isinstance(made, Steerable) else made([one.id for one in batch.items])
        ids = batch.prefix.generate(steering, max_new_tokens=self.task.max_new_tokens, do_sample=False)
        row: dict[str, JSON] = {"texts": vlm.decode(ids[:, batch.prefix.width :])}
        if self.task.bound.kind == "kl":
            row["kl"] = self._kl(batch, steering)
        self._count(batch)
        self._add({"name": name, "alpha": alpha, "batch": index, **row})

    def _batch(self, index: int) -> Batch:
        """Prompts and unsteered answers of a batch: the last one, and what fits into memory, are kept."""
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        if index in self._batches:
            return self._batches[index]
        task, items, known = self.task, self._items[index], self._rows.get((*UNSTEERED, index))
        self._last = None  # its prompts must not lie in memory beside the next ones
        inputs = task.vlm.inputs([one.text for one in items], [list(one.load_images()) for one in items])
        prefix = task.vlm.prefix(inputs, do_sample=False, max_new_tokens=task.max_new_tokens if known is None else 1)
        if known is None:
            texts = task.vlm.decode(prefix.ids[:, prefix.width :])
            tokens = answer_tokens(task.vlm, inputs, prefix.ids)
            self._add({"name": "", "alpha": 0.0, "batch": index, "texts": texts, "tokens": tokens})
        else:
            tokens = cast("list[list[int]]", known["tokens"])
        batch = Batch(items, prefix, tokens)
        if task.bound.kind == "kl":
            batch.plain = self._along(batch, None)
        self._count(batch)
        self._last = index, batch
        if sum(one.nbytes for one in self._batches.values()) + batch.nbytes <= task.keep_bytes:
            self._batches[index] = batch
        return batch

    def _kl(self, batch: Batch, steering: Steerable | None) -> list[JSON]:
        """KL of each answer in nats per token; null where the logits are beyond all numbers."""
        steered, plain = self._along(batch, steering), cast("Tensor", batch.plain)
        lengths = torch.tensor([len(answer) for answer in batch.tokens], device=plain.device)
        mask = torch.arange(plain.shape[1], device=plain.device) < lengths[:, None]
        found = kl_per_row(steered, plain, mask).tolist()
        return [value if math.isfinite(value) else None for value in found]

    def _along(self, batch: Batch, steering: Steerable | None) -> Float[Tensor, "row pos vocab"]:
        """Logits that decide each token of the unsteered answers, from the left."""
        prefix = batch.prefix
        if prefix.serves(steering):
            return prefix.forced(batch.tokens, steering)[0]
        prefix.asked, prefix.ran = prefix.asked + prefix.width, prefix.ran + prefix.width
        whole = forced_logits(self.task.vlm, prefix.inputs, batch.tokens, steering)
        out = torch.zeros_like(whole.logits)
        out[whole.mask.flip(1)] = whole.logits[whole.mask]
        return out

    def _count(self, batch: Batch) -> None:
        rows, prefix = len(batch.items), batch.prefix
        self.asked, self.ran = self.asked + rows * prefix.asked, self.ran + rows * prefix.ran
        prefix.asked = prefix.ran = 0

    # -- rows and points -----------------------------------------------------------------------------------------

    def _add(self, row: Row) -> None:
        if self._log is not None:
            self._log.add([row])
        self._take(row)

    def _take(self, row: Row) -> None:
        self._rows[_place(row)] = row

    def _values(self, where: Where, key: str) -> dict[str, JSON]:
        """One value per key of what was asked."""
        rows = [(items, self._rows[(*where, index)]) for index, items in enumerate(self._items)]
        return {
            item.key: value
            for items, row in rows
            for item, value in zip(items, cast("Sequence[JSON]", row[key]), strict=True)
        }

    def _point(self, where: Where) -> Point:
        task = self.task
        texts = {key: str(text) for key, text in self._values(where, "texts").items()}
        scores = self._scored(task.behaviour, texts, "behaviour")
        behaviour = self._interval(scores)
        costs, damage = self._damage(where, texts)
        feasible = damage.value <= task.bound.limit
        counted = int(np.isfinite(scores).sum())
        return Point(*where, behaviour, damage, feasible, counted, scores, costs, texts)

    def _damage(self, where: Where, texts: Mapping[str, str]) -> tuple[Scores, Interval]:
        bound, zero = self.task.bound, np.zeros(len(self.task.items))
        if isinstance(bound, KLBound):
            if where == UNSTEERED:
                return zero, Interval(0.0, 0.0, 0.0, self.task.level)
            kl = {key: math.inf if value is None else float(cast("float", value))
                  for key, value in self._values(where, "kl").items()}  # fmt: skip
            costs = np.array([kl[item.key] for item in self.task.items])
            if not np.isfinite(costs).all():
                return costs, Interval(math.inf, math.inf, math.inf, self.task.level)
            return costs, self._interval(costs)
        own = self._scored(bound.quality, texts, "quality")
        before = own if where == UNSTEERED else self._quality
        both = np.stack([before, own], axis=1)
        if np.nanmean(before) <= 0:
            raise InputError(
                f"the unsteered answers have a mean quality of {np.nanmean(before):.3g}; a relative loss needs "
                "one above 0."
            )
        return before - own, self._interval(both, _loss)

    @cached_property
    def _quality(self) -> Scores:
        bound = cast("QualityBound", self.task.bound)
        return self._scored(bound.quality, self.unsteered.texts, "quality")

    def _scored(self, score: Behaviour, texts: Mapping[str, str], what: str) -> Scores:
        values = np.asarray(score(texts), dtype=np.float64)
        if values.shape != (len(self.task.items),) or np.isinf(values).any() or np.isnan(values).all():
            raise InputError(
                f"{what} returned values of shape {values.shape} for {len(self.task.items)} items, "
                f"{int(np.isinf(values).sum())} infinite, {int(np.isnan(values).sum())} NaN; expected one number per "
                "item, NaN where one does not count."
            )
        return values

    def _interval(self, values: Float[np.ndarray, "row *column"], statistic: Statistic = mean) -> Interval:
        task, counted = self.task, np.isfinite(values).reshape(len(values), -1).all(axis=1)
        groups = None if task.groups is None else [str(task.groups[i]) for i in np.flatnonzero(counted).tolist()]
        return bootstrap_interval(values[counted], groups, statistic, seed=task.seed, level=task.level)


def _place(row: Row) -> tuple[str, float, int]:
    return str(row["name"]), float(cast("float", row["alpha"])), int(cast("int", row["batch"]))


def _loss(values: Float[np.ndarray, "row 2"], weights: Float[np.ndarray, "resample row"]) -> Values:
    """Statistic: the share of the first column's sum that the second lacks; 0 where the first has none."""
    before, after = (weights @ values).T
    return np.divide(before - after, before, out=np.zeros(len(before)), where=before > 0)
