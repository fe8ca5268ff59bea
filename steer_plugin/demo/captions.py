"""Captions: objects that are not there (CHAIR) against objects found (recall), unsteered and steered.

P2S contrasts "there" with "maybe", after which the model names what one would expect too. CHAIR_i = false mentions /
mentions, CHAIR_s = captions with one / captions, recall = found / true nouns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import cast

import numpy as np
from jaxtyping import Float
from PIL import Image

from steer_plugin.atomic import JSON
from steer_plugin.contrast import pocket_caption_pairs
from steer_plugin.demo.bench import PROMPT, Bench
from steer_plugin.evaluation.asking import Method
from steer_plugin.evaluation.intervals import Interval, bootstrap_interval, paired_difference, ratio
from steer_plugin.intervention import Steerable
from steer_plugin.methods import L2S, P2S, MeanSteering, NormRandom
from steer_plugin.pocket import CaptionCase, is_caption, mentioned
from steer_plugin.shifts import Shifts
from steer_plugin.training.config import preset

METHODS = ("none", "prompt", "norm_rnd", "mean", "l2s", "p2s")
METRICS = ("chair_i", "chair_s", "recall", "wellformed")
TOKENS = 24


@dataclass(frozen=True)
class CaptionConfig:
    """Sizes and choices of the caption part; a strength that costs more recall than `recall_floor` is not chosen."""

    train_pictures: int = 400
    validation_pictures: int = 150
    test_pictures: int = 300
    layers: tuple[tuple[int, int], ...] = ((1, 3), (2, 3))
    positions: str = "last_prompt|generated"
    alphas: tuple[float, ...] = (0.05, 0.1, 0.2, 0.35, 0.5, 1.0)
    learning_rate: float = 1e-3
    recall_floor: float = -0.01
    wellformed_floor: float = 0.98


@dataclass(frozen=True)
class CaptionItem:
    """A picture as something to describe."""

    case: CaptionCase

    @property
    def id(self) -> str:
        """The picture's name."""
        return self.case.scene_id

    @property
    def text(self) -> str:
        """The task."""
        return self.case.task

    @property
    def key(self) -> str:
        """Identity of what is asked."""
        return self.case.scene_id

    def load_images(self) -> Sequence[Image.Image]:
        """Return the picture."""
        return [self.case.image]


@dataclass
class CaptionResult:
    """What the report shows."""

    config: CaptionConfig
    write: int
    read: int
    alphas: dict[str, float]
    scores: dict[str, dict[str, Interval]]
    differences: dict[str, dict[str, Interval]]
    validation: dict[str, dict[str, dict[str, float]]]
    texts: dict[str, dict[str, str]]
    items: list[CaptionItem]


def run_captions(bench: Bench, config: CaptionConfig) -> CaptionResult:
    """Run the caption part; what an interrupted run has extracted and asked is used again."""
    return _Captions(bench, config).run()


@dataclass
class _Captions:
    bench: Bench
    config: CaptionConfig

    def run(self) -> CaptionResult:
        bench, config = self.bench, self.config
        networks = {where: self._fit(*where) for where in config.layers}
        (write, read), alphas, table = bench.timed("choose", lambda: self._choose(networks))
        test = self._items(config.test_pictures, "test")
        methods = {
            name: self._method(name, networks[write, read], "test", alphas.get(name, 0.0), write, read)
            for name in METHODS
        }
        job: dict[str, JSON] = {"config": cast(JSON, asdict(config)), "layers": [write, read], "seed": bench.seed}
        texts = bench.timed(
            "test", lambda: {name: bench.ask(test, one, "captions", job, TOKENS) for name, one in methods.items()}
        )
        rows = {name: counted(test, found) for name, found in texts.items()}
        scored = {
            name: {m: bootstrap_interval(row[m], None, ratio, seed=bench.seed) for m in METRICS}
            for name, row in rows.items()
        }
        gaps = {
            name: {m: paired_difference(rows[name][m], rows["none"][m], None, ratio, seed=bench.seed) for m in METRICS}
            for name in METHODS if name != "none"
        }  # fmt: skip
        return CaptionResult(config, write, read, alphas, scored, gaps, table, texts, test)

    def _items(self, pictures: int, split: str) -> list[CaptionItem]:
        return [CaptionItem(case) for case in self.bench.world.captions(pictures, split)]

    def _shifts(self, split: str, pictures: int, write: int, read: int) -> Shifts:
        pairs = pocket_caption_pairs(item.case for item in self._items(pictures, split))
        return self.bench.extract(pairs, f"captions-{split}-write{write}-read{read}", write, read)

    def _fit(self, write: int, read: int) -> L2S:
        """Fit on pictures that tempt; the others get the zero vector, as there a guess names nothing false."""
        shifts, complete = self._tempting("train", self.config.train_pictures, write, read)
        config, seed = preset("safety", learning_rate=self.config.learning_rate), self.bench.seed
        fit = lambda: L2S.fit(shifts, config, neutral=complete, seed=seed, positions=self.config.positions)  # noqa: E731
        return self.bench.timed("fit", fit)

    def _tempting(self, split: str, pictures: int, write: int, read: int) -> tuple[Shifts, Shifts]:
        """Shifts of pictures where a companion misses, and of those where none does."""
        every = self._shifts(split, pictures, write, read)
        named = list(enumerate(every.behaviours))
        return (every.select([i for i, name in named if name == "tempting"]),
                every.select([i for i, name in named if name == "complete"]))  # fmt: skip

    def _choose(
        self, networks: Mapping[tuple[int, int], L2S]
    ) -> tuple[tuple[int, int], dict[str, float], dict[str, dict[str, dict[str, float]]]]:
        """Layers and alpha of L2S, then the alphas of the others: the fewest false mentions at no cost in recall."""
        held = self._items(self.config.validation_pictures, "validation")
        base = self._rates(held, Method("none"))
        table: dict[str, dict[str, dict[str, float]]] = {"none": {"": base}}
        for (write, read), network in networks.items():
            table[f"l2s.write{write}.read{read}"] = self._sweep(held, "l2s", network, write, read)
        best = {where: self._best(table[f"l2s.write{where[0]}.read{where[1]}"], base) for where in networks}
        where = min(networks, key=lambda one: best[one][1])
        chosen = {"l2s": best[where][0]}
        for name in ("mean", "p2s"):
            table[name] = self._sweep(held, name, networks[where], *where)
            chosen[name] = self._best(table[name], base)[0]
        chosen["norm_rnd"] = chosen["l2s"]
        return where, chosen, table

    def _sweep(
        self, held: Sequence[CaptionItem], name: str, network: L2S, write: int, read: int
    ) -> dict[str, dict[str, float]]:
        return {
            str(alpha): self._rates(held, self._method(name, network, "validation", alpha, write, read))
            for alpha in self.config.alphas
        }

    def _best(self, tried: Mapping[str, dict[str, float]], base: Mapping[str, float]) -> tuple[float, float]:
        """(alpha, chair_i) of the strength to take; the least one where all cost too much."""
        fine = {
            alpha: found["chair_i"]
            for alpha, found in tried.items()
            if found["recall"] - base["recall"] >= self.config.recall_floor
            and found["wellformed"] >= self.config.wellformed_floor
        }
        if not fine:
            return float(next(iter(tried))), float("inf")
        alpha = min(fine, key=lambda one: fine[one])
        return float(alpha), fine[alpha]

    def _rates(self, items: Sequence[CaptionItem], method: Method) -> dict[str, float]:
        rows = counted(items, self.bench.try_out(items, method, TOKENS))
        return {metric: float(row[:, 0].sum() / max(1.0, row[:, 1].sum())) for metric, row in rows.items()}

    def _method(self, name: str, network: L2S, split: str, alpha: float, write: int, read: int) -> Method:
        """A method by name; whatever is read from disk is read here once, not again for every batch."""
        where, note = self.config.positions, {"alpha": alpha, "positions": self.config.positions}
        if name in ("p2s", "norm_rnd"):
            pictures = self.config.validation_pictures if split == "validation" else self.config.test_pictures
            tempting, complete = self._tempting(split, pictures, write, read)
            known, seed = tempting.with_neutral(complete), self.bench.seed
            if name == "p2s":
                return Method(name, lambda ids: P2S.rows(known, ids, where, alpha), note=note)
            return Method(name, lambda ids: NormRandom.rows(known, ids, seed, where, alpha), note=note)
        steering: Steerable | None = None
        if name == "mean":
            tempting, _ = self._tempting("train", self.config.train_pictures, write, read)
            steering = MeanSteering.fit(tempting, positions=where, alpha=alpha)
        elif name == "l2s":
            steering = network.with_alpha(alpha)
        return Method(name, lambda ids: steering, PROMPT if name == "prompt" else "", note)


def counted(items: Sequence[CaptionItem], texts: Mapping[str, str]) -> dict[str, Float[np.ndarray, "row 2"]]:
    """For each metric a numerator and a denominator per caption."""
    rows: dict[str, list[tuple[float, float]]] = {metric: [] for metric in METRICS}
    for item in items:
        said, true = texts[item.key], item.case.nouns
        named = mentioned(said)
        false = sum(noun not in true for noun in named)
        rows["chair_i"].append((false, len(named)))
        rows["chair_s"].append((float(false > 0), 1))
        rows["recall"].append((len(set(named) & true), len(true)))
        rows["wellformed"].append((float(is_caption(said)), 1))
    return {metric: np.array(row, dtype=np.float64) for metric, row in rows.items()}
