"""POPE and OHD on the drawn world: existence questions of one world, or of three that stand for OHD's three sources.

Figures and training are those of the benchmarks on files (`evaluation.benchmarks`). A text is well-formed when it is
word for word an answer that the model learned. A strength is chosen by the answers that are right and whole: "no lacks
lacks lacks" is right by every parser. What is told of an item, for one mean per behaviour, is its answer: "mean_ba" is
an oracle here, as "p2s" is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from steer_plugin.contrast import ContrastivePair
from steer_plugin.demo.bench import PROMPT
from steer_plugin.demo.benchmarks.source import source_of
from steer_plugin.demo.data import fitting_items, held_out_items, wellformed
from steer_plugin.evaluation.asking import Asked
from steer_plugin.evaluation.benchmark import Benchmark, Texts, Training, Verdicts
from steer_plugin.evaluation.benchmarks.ohd import OhdBenchmark
from steer_plugin.evaluation.benchmarks.pope import PopeBenchmark, yes_no_training
from steer_plugin.evaluation.pope import PopeItem
from steer_plugin.pocket import World

Rows = Mapping[str, Float[np.ndarray, "item column"]]

# For SteerVLM and ActAdd, as only VNIA brings pairs. In words of the pocket VLM's vocabulary; it heard the first one in
# training and the second one never.
CARE_PAIR = (PROMPT, "Be quick.")
# The authors' 5e-5 is for d_model 4096, where weights are far larger in number.
LEARNING_RATE = 1e-3
_WELLFORMED = "well-formed"


class PocketPope(PopeBenchmark):
    """POPE, its well-formed answers being those that the pocket VLM learned."""

    def values(self, texts: Texts, verdicts: Verdicts) -> dict[str, Float[np.ndarray, "item column"]]:
        """Return the rows of every measure for every subset and for all questions."""
        return _learned(super().values(texts, verdicts), self.items, texts)

    def behaviour(self, texts: Texts) -> list[float]:
        """1 for an answer that is right and whole, else 0."""
        return _right_and_whole(self.values(texts, {}), "mean")


class PocketOhd(OhdBenchmark):
    """OHD, its well-formed answers being those that the pocket VLM learned."""

    def values(self, texts: Texts, verdicts: Verdicts) -> dict[str, Float[np.ndarray, "item column"]]:
        """Return the rows of every metric."""
        return _learned(super().values(texts, verdicts), self.items, texts)

    def behaviour(self, texts: Texts) -> list[float]:
        """1 for an answer that is right and whole, else 0."""
        return _right_and_whole(self.values(texts, {}), "overall")


def pope_benchmark(world: World, pictures: int, train: int, validation: int) -> PocketPope:
    """Return the questions of "test", fitted on a yes and a no question about each picture of "train"."""
    fitting = fitting_items(world, train)

    def part(split: str, number: int, held: Benchmark | None) -> PocketPope:
        items = held_out_items(world, number, split)
        source = source_of([world], split, number, items)
        found = PocketPope(items, training=_training(fitting, items, held), prompt=PROMPT, source=source)
        found.pairs = {item.id: CARE_PAIR for item in items}
        return found

    return part("test", pictures, part("validation", validation, None))


def ohd_benchmark(world: World, pictures: int, train: int, validation: int) -> PocketOhd:
    """Return the questions on this world and on those of the next two seeds, `pictures` of each.

    What is fitted is fitted on this world alone; the other two show the same nouns on pictures of their own.
    """
    worlds = [world, *(World(world.seed + i) for i in (1, 2))]
    fitting = fitting_items(world, train)

    def part(split: str, number: int, held: Benchmark | None) -> PocketOhd:
        items = {f"world {one.seed}": held_out_items(one, number, split) for one in worlds}
        every = [item for found in items.values() for item in found]
        source = source_of(worlds, split, number, every)
        found = PocketOhd(items, training=_training(fitting, every, held), prompt=PROMPT, source=source)
        found.pairs = {item.id: CARE_PAIR for item in every}
        return found

    return part("test", pictures, part("validation", validation, None))


def _training(fitting: Sequence[PopeItem], items: Sequence[PopeItem], held: Benchmark | None) -> Training:
    oracle: list[ContrastivePair] = [item.pair for item in items]
    return replace(yes_no_training(fitting, items, held), oracle=oracle, learning_rate=LEARNING_RATE)


def _learned(found: Rows, items: Sequence[Asked], texts: Texts) -> dict[str, Float[np.ndarray, "item column"]]:
    """Judge whole answers by what the model learned, in place of their first word; what is not asked stays NaN."""
    whole = np.array([[wellformed(texts[item.key])] for item in items], dtype=np.float64)
    return {
        name: np.where(np.isnan(rows), np.nan, whole) if name.endswith(_WELLFORMED) else rows
        for name, rows in found.items()
    }


def _right_and_whole(found: Rows, part: str) -> list[float]:
    return [float(value) for value in (found[f"{part} accuracy"] * found[f"{part} {_WELLFORMED}"])[:, 0]]
