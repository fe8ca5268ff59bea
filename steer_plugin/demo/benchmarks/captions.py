"""CHAIR on the drawn world: objects that captions name and their pictures lack, against objects found.

    CHAIR_s = captions with a false mention / captions     CHAIR_i = false mentions / mentions
    recall  = true nouns named / true nouns                F1 of a caption: of its precision and its recall

Nouns are read as the drawn world reads them, which agrees with CHAIR's own rules on its captions. CHAIR_i has no score
per caption, and is best where nothing is named at all: a strength is chosen by the F1, 0 for a text that is no caption.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from steer_plugin.contrast import ContrastivePair, pocket_caption_pairs
from steer_plugin.demo.bench import PROMPT
from steer_plugin.demo.benchmarks.questions import CARE_PAIR
from steer_plugin.demo.benchmarks.source import source_of
from steer_plugin.demo.captions import TOKENS, CaptionItem, counted
from steer_plugin.evaluation.benchmark import Benchmark, Metric, Texts, Training, Verdicts, column
from steer_plugin.evaluation.intervals import ratio
from steer_plugin.pocket import World

LEARNING_RATE = 1e-3


class CaptionBenchmark(Benchmark):
    """Pictures 0 .. n - 1 of a split, to describe."""

    def __init__(
        self,
        world: World,
        pictures: int,
        split: str,
        pairs: Sequence[ContrastivePair],
        validation: Benchmark | None = None,
    ) -> None:
        self.name = "chair"
        self._captions = [CaptionItem(case) for case in world.captions(pictures, split)]
        self.items = self._captions
        self.groups = [item.id for item in self._captions]
        self.metrics = [
            Metric("CHAIR_s", better="lower"),
            Metric("CHAIR_i", ratio, better="lower"),
            Metric("recall", ratio),
            Metric("F1"),
            Metric("well-formed"),
        ]
        self.headline = "CHAIR_i"
        self.max_new_tokens = TOKENS
        self.prompt = PROMPT
        self.pairs = {item.id: CARE_PAIR for item in self.items}
        self.source = source_of([world], split, pictures, self.items)
        self.training = Training(
            pairs=pairs,
            oracle=pocket_caption_pairs(item.case for item in self._captions),
            validation=validation,
            preset="safety",
            learning_rate=LEARNING_RATE,
            target="average_forced",
            neutral=("complete",),
        )

    def values(self, texts: Texts, verdicts: Verdicts) -> dict[str, Float[np.ndarray, "item column"]]:
        """Count each caption's false and true mentions."""
        rows = counted(self._captions, texts)
        whole = rows["wellformed"][:, 0]
        named, present = rows["chair_i"][:, 1], rows["recall"][:, 1]
        false, found = rows["chair_i"][:, 0], rows["recall"][:, 0]
        precision = np.divide(named - false, named, out=np.zeros(len(named)), where=named > 0)
        recall = found / present
        both = precision + recall
        f1 = np.divide(2 * precision * recall, both, out=np.zeros(len(both)), where=both > 0)
        return {
            "CHAIR_s": rows["chair_s"][:, :1],
            "CHAIR_i": rows["chair_i"],
            "recall": rows["recall"],
            "F1": (f1 * whole)[:, None],
            "well-formed": column(list(whole)),
        }

    def behaviour(self, texts: Texts) -> list[float]:
        """Return the F1 of each caption, 0 where the text is none."""
        return [float(value) for value in self.values(texts, {})["F1"][:, 0]]


def caption_benchmark(world: World, pictures: int, train: int, validation: int) -> CaptionBenchmark:
    """Return captions of "test", fitted on "train": pictures that tempt, the complete ones with the zero vector."""
    pairs = pocket_caption_pairs(world.captions(train, "train"))
    held = CaptionBenchmark(world, validation, "validation", pairs)
    return CaptionBenchmark(world, pictures, "test", pairs, held)
