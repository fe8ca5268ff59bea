"""VNIA on the drawn world: captions in the spirit of a target prompt and against its converse.

    target     captions that close with the target's topic and attitude / captions
    converse   captions that close with the converse's / captions
    attitude   captions with the target's attitude, whatever they are about / captions
    recall     true nouns named / true nouns

SteerVLM takes the pairs as they are. What is fitted is told the closings that SteerVLM has to find: for each one, the
closing against its converse after the same task, on training pictures (CAA; its mean over all closings is about none).
A strength is chosen by hit times recall of each caption: the closing alone is no caption.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from steer_plugin.contrast import ContrastivePair
from steer_plugin.demo.benchmarks.source import source_of
from steer_plugin.demo.stances import GROUPS, TOKENS, StanceItem, counted, stance_items
from steer_plugin.errors import InputError, nearest
from steer_plugin.evaluation.benchmark import Benchmark, Metric, Texts, Training, Verdicts
from steer_plugin.evaluation.intervals import ratio
from steer_plugin.pocket import StanceCase, World
from steer_plugin.pocket.language import DESCRIBE
from steer_plugin.pocket.stances import stanced


class StanceBenchmark(Benchmark):
    """Pictures 0 .. n - 1 of a split, each with a pair of opposed prompts of one group of topics and wordings."""

    def __init__(self, world: World, pictures: int, split: str, group: str) -> None:
        self.name = "vnia"
        self.stances = stance_items(world, pictures, split, (group,))
        self.items = self.stances
        self.groups = [item.case.scene_id for item in self.stances]
        self.metrics = [
            Metric("target", scale=1.0, digits=3),
            Metric("converse", better="lower", scale=1.0, digits=3),
            Metric("attitude", scale=1.0, digits=3),
            Metric("recall", ratio, scale=1.0, digits=3),
        ]
        self.headline = "target"
        self.max_new_tokens = TOKENS
        self.pairs = {item.id: (item.case.pair.target.text, item.case.pair.converse.text) for item in self.stances}
        self.worded = {item.id: stanced(item.case.pair.target) for item in self.stances}
        # The prompts are as much a part of what is asked as the task is.
        asked = [StanceItem(item.case, item.group, worded=True) for item in self.stances]
        self.source = {**source_of([world], split, pictures, asked), "group": group}

    def values(self, texts: Texts, verdicts: Verdicts) -> dict[str, Float[np.ndarray, "item column"]]:
        """Read the closing of each caption, and the nouns before it."""
        (rows,) = counted(self.stances, texts).values()
        return {name: rows[name] if name == "recall" else rows[name][:, :1] for name in rows}

    def behaviour(self, texts: Texts) -> list[float]:
        """Hit times recall of each caption, from 0 to 1."""
        found = self.values(texts, {})
        kept = found["recall"][:, 0] / found["recall"][:, 1]
        return [float(value) for value in found["target"][:, 0] * kept]


def stance_benchmark(world: World, pictures: int, train: int, validation: int, group: str) -> StanceBenchmark:
    """Return stances of a group of `demo.stances.GROUPS` on "test"; strengths are chosen on the group "trained".

    `train` is the number of training pictures for each closing. Raises InputError for an unknown group.
    """
    if group not in GROUPS:
        raise InputError(f"the group is {group!r}: expected one of {', '.join(GROUPS)}.{nearest(group, GROUPS)}")
    test = StanceBenchmark(world, pictures, "test", group)
    held = StanceBenchmark(world, validation, "validation", "trained")
    pairs = _closings([item.case for item in (*test.stances, *held.stances)], world.stances(train, "train"))
    held.training = _training(held, pairs, None)
    test.training = _training(test, pairs, held)
    return test


def _training(benchmark: StanceBenchmark, pairs: Sequence[ContrastivePair], held: Benchmark | None) -> Training:
    return Training(
        pairs=pairs,
        oracle=[_pair(item.id, item.case, item.case) for item in benchmark.stances],
        validation=held,
        preset="mse",
        target="average_forced",
        told={item.id: item.case.pair.target.closing for item in benchmark.stances},
    )


def _closings(asked: Sequence[StanceCase], pictures: Sequence[StanceCase]) -> list[ContrastivePair]:
    """Pair each closing that is asked for with its converse, on every training picture."""
    distinct = {case.pair.target.closing: case for case in asked}
    return [
        _pair(f"{picture.scene_id}/{closing}", case, picture)
        for closing, case in distinct.items()
        for picture in pictures
    ]


def _pair(name: str, case: StanceCase, picture: StanceCase) -> ContrastivePair:
    """Return a case's closing against its converse after the task, about a picture."""
    target, converse = case.pair.target.closing, case.pair.converse.closing
    return ContrastivePair(name, (picture.image,), DESCRIBE, target, converse, behaviour=target)
