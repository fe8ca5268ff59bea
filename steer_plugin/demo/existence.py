"""Existence questions: extract P2S, fit L2S, choose layer and alpha on validation questions, compare on held-out ones.

Nothing is chosen on test questions. The control `threshold` is one scalar yes/no offset fitted on the questions that
L2S is fitted on: what no steering has to beat to have any use here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import cast

import numpy as np
from numpy.typing import NDArray

from steer_plugin.atomic import JSON
from steer_plugin.demo.bench import PROMPT, Bench, gentlest
from steer_plugin.demo.data import fitting_items, held_out_items, wellformed
from steer_plugin.evaluation.asking import Method, distinct
from steer_plugin.evaluation.pope import (
    MethodScores,
    PopeItem,
    difference,
    margins,
    predictions,
    scores,
)
from steer_plugin.evaluation.threshold import apply_threshold, fit_threshold
from steer_plugin.intervention import Steerable
from steer_plugin.methods import L2S, P2S, MeanSteering, NormRandom
from steer_plugin.shifts import Shifts
from steer_plugin.training.config import preset

METHODS = ("none", "prompt", "threshold", "norm_rnd", "mean", "l2s", "p2s")


@dataclass(frozen=True)
class ExistenceConfig:
    """Sizes and choices; layers and alphas are what validation chooses from.

    Existence is decided at the last prompt token, so that token alone is steered: steering the generated ones too, at
    strengths that matter here, breaks what follows the first word (the report measures it).
    """

    train_pictures: int = 700
    validation_pictures: int = 120
    test_pictures: int = 400
    layers: tuple[tuple[int, int], ...] = ((1, 1), (1, 2), (2, 3))
    alphas: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    positions: str = "last_prompt"
    learning_rate: float = 1e-3
    wellformed_floor: float = 0.98


@dataclass
class ExistenceResult:
    """Everything that the report and the figures show."""

    config: ExistenceConfig
    write: int
    read: int
    alphas: dict[str, float]
    threshold: float
    scores: dict[str, dict[str, MethodScores]]
    differences: dict[str, dict[str, dict[str, float]]]
    texts: dict[str, dict[str, str]]
    items: list[PopeItem]
    shifts: Shifts
    fit: dict[str, JSON]
    validation: dict[str, dict[str, float]]
    paper_positions: dict[str, float]


def run_existence(bench: Bench, config: ExistenceConfig) -> ExistenceResult:
    """Run the existence part; what an interrupted run has extracted and asked is used again."""
    return _Existence(bench, config).run()


@dataclass
class _Existence:
    bench: Bench
    config: ExistenceConfig
    fitting: list[PopeItem] = field(default_factory=list[PopeItem])
    held: list[PopeItem] = field(default_factory=list[PopeItem])

    def run(self) -> ExistenceResult:
        config, bench = self.config, self.bench
        seed = bench.seed
        self.fitting = bench.timed("draw", lambda: fitting_items(bench.world, config.train_pictures))
        self.held = bench.timed("draw", lambda: held_out_items(bench.world, config.validation_pictures, "validation"))
        test = bench.timed("draw", lambda: held_out_items(bench.world, config.test_pictures, "test"))
        networks = {where: self._fit(self._shifts(self.fitting, "train", *where)) for where in config.layers}
        (write, read), chosen, table = bench.timed("choose", lambda: self._choose(networks))
        network, shifts = networks[write, read], self._shifts(self.fitting, "train", write, read)
        oracle = self._shifts(distinct(test), "test", write, read)
        everywhere = bench.timed("choose", lambda: self._paper_positions(network, chosen["l2s"]))
        threshold = fit_threshold(margins(bench.vlm, self.fitting), [item.label for item in self.fitting])
        methods = [
            Method("none"),
            Method("prompt", prefix=PROMPT),
            *(_method(name, shifts, oracle, chosen[name], config, seed) for name in ("norm_rnd", "mean", "p2s")),
            Method("l2s", lambda ids: network.with_alpha(chosen["l2s"]), note={"alpha": chosen["l2s"]}),
        ]
        job: dict[str, JSON] = {"config": cast(JSON, asdict(config)), "layers": [write, read], "seed": seed}
        texts = bench.timed("test", lambda: {one.name: bench.ask(test, one, "existence", job) for one in methods})
        said = {name: predictions(test, found) for name, found in texts.items()}
        said["threshold"] = apply_threshold(margins(bench.vlm, test), threshold)
        network.with_alpha(chosen["l2s"]).save(bench.out / "l2s")
        return ExistenceResult(
            config, write, read, chosen, threshold, _scored(test, said, texts, seed), _compared(test, said, seed),
            texts, test, shifts, {} if network.report is None else network.report.as_json(), table, everywhere,
        )  # fmt: skip

    def _shifts(self, items: Sequence[PopeItem], split: str, write: int, read: int) -> Shifts:
        folder = f"{split}-write{write}-read{read}"
        return self.bench.extract([item.pair for item in items], folder, write, read)

    def _fit(self, shifts: Shifts) -> L2S:
        # The authors' preset for POPE; its rate of 5e-5 is for d_model 4096, where weights are far larger in number.
        config = preset("pope", learning_rate=self.config.learning_rate)
        fit = lambda: L2S.fit(shifts, config, seed=self.bench.seed, positions=self.config.positions)  # noqa: E731
        return self.bench.timed("fit", fit)

    def _choose(
        self, networks: Mapping[tuple[int, int], L2S]
    ) -> tuple[tuple[int, int], dict[str, float], dict[str, dict[str, float]]]:
        """Layers and alpha of L2S together, then the alphas of the others at that layer; on validation questions."""
        table: dict[str, dict[str, float]] = {}
        for (write, read), network in networks.items():
            tried = self._sweep(lambda a, n=network: Method("l2s", lambda ids: n.with_alpha(a)))
            table[f"l2s.write{write}.read{read}"] = tried
        where = max(networks, key=lambda one: max(table[f"l2s.write{one[0]}.read{one[1]}"].values()))
        shifts = self._shifts(self.fitting, "train", *where)
        oracle = self._shifts(distinct(self.held), "validation", *where)
        n = len(self.held)
        chosen = {"l2s": gentlest(table[f"l2s.write{where[0]}.read{where[1]}"], n)}
        for name in ("norm_rnd", "mean", "p2s"):
            tried = self._sweep(lambda a, one=name: _method(one, shifts, oracle, a, self.config, self.bench.seed))
            table[name] = tried
            chosen[name] = gentlest(tried, n)
        # The random control is matched in size to what it controls for, hence at L2S's own strength.
        chosen["norm_rnd"] = chosen["l2s"]
        return where, chosen, table

    def _sweep(self, make: Callable[[float], Method]) -> dict[str, float]:
        """Accuracy by alpha; a strength that breaks the text scores nothing."""
        out: dict[str, float] = {}
        for alpha in self.config.alphas:
            texts = self.bench.try_out(self.held, make(alpha))
            spoken = [texts[item.key] for item in self.held]
            whole = np.mean([wellformed(text) for text in spoken]) >= self.config.wellformed_floor
            out[str(alpha)] = _accuracy(self.held, texts) if whole else 0.0
        return out

    def _paper_positions(self, network: L2S, alpha: float) -> dict[str, float]:
        """The same L2S with the generated tokens steered too, on validation: accuracy, and what is left of the text."""
        steering = network.with_alpha(alpha).with_positions("paper")
        texts = self.bench.try_out(self.held, Method("l2s", lambda ids: steering))
        return {
            "accuracy": _accuracy(self.held, texts),
            "wellformed": float(np.mean([wellformed(texts[item.key]) for item in self.held])),
        }


def _accuracy(items: Sequence[PopeItem], texts: Mapping[str, str]) -> float:
    return float((predictions(items, texts) == np.array([item.label for item in items])).mean())


def _scored(
    items: Sequence[PopeItem],
    said: Mapping[str, NDArray[np.bool_]],
    texts: Mapping[str, Mapping[str, str]],
    seed: int,
) -> dict[str, dict[str, MethodScores]]:
    spoken = {name: [found[item.key] for item in items] for name, found in texts.items()}
    return {name: scores(items, said[name], spoken.get(name), seed=seed, wellformed=wellformed) for name in METHODS}


def _compared(
    items: Sequence[PopeItem], said: Mapping[str, NDArray[np.bool_]], seed: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Differences of every method from none, mean and threshold in points, with paired intervals."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for name in METHODS:
        for other in ("none", "mean", "threshold"):
            if other != name:
                gap = difference(items, said[name], said[other], seed=seed)
                out.setdefault(name, {})[other] = {
                    "value": 100 * gap.value, "low": 100 * gap.low, "high": 100 * gap.high
                }  # fmt: skip
    return out


def _method(name: str, shifts: Shifts, oracle: Shifts, alpha: float, config: ExistenceConfig, seed: int) -> Method:
    where = config.positions
    mean = MeanSteering.fit(shifts, positions=where, alpha=alpha)
    makers: dict[str, Callable[[Sequence[str]], Steerable]] = {
        "mean": lambda ids: mean,
        "norm_rnd": lambda ids: NormRandom.rows(oracle, ids, seed, where, alpha),
        "p2s": lambda ids: P2S.rows(oracle, ids, where, alpha),
    }
    return Method(name, makers[name], note={"alpha": alpha})
