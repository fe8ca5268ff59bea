"""POPE on a steered model: parse and score; every method on the same questions, intervals clustered by picture.

Source: POPE (arXiv 2305.10355) for questions and parsing; the L2S authors' accuracy under a name of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image

from steer_plugin.adapters import AttachedModel
from steer_plugin.contrast import ContrastivePair, pope_pairs, read_pope
from steer_plugin.errors import InputError
from steer_plugin.evaluation.asking import distinct
from steer_plugin.evaluation.intervals import Interval, bootstrap_interval, f1, paired_difference
from steer_plugin.evaluation.parsing import clear_answer, l2s_correct, pope_answer


@dataclass(frozen=True)
class PopeItem:
    """One question of one subset; items with the same picture and prompt are asked once.

    Attributes:
        pair: picture, prompt, the true label, and the two openings (for P2S).
        subset: "random", "popular" or "adversarial".
        group: the picture, for clustered intervals.
    """

    pair: ContrastivePair
    subset: str
    group: str

    @property
    def label(self) -> bool:
        """The true answer.

        Raises:
            InputError: the pair has none.
        """
        if self.pair.label is None:
            raise InputError(f"pair {self.pair.id!r} has no label; a POPE question needs yes or no.")
        return self.pair.label

    @property
    def key(self) -> str:
        """Identity of what is asked."""
        return f"{self.group}|{self.text}"

    @property
    def id(self) -> str:
        """The pair's id."""
        return self.pair.id

    @property
    def text(self) -> str:
        """The question."""
        return self.pair.user_text

    def load_images(self) -> Sequence[Image.Image]:
        """Open the question's pictures."""
        return self.pair.load_images()


@torch.no_grad()
def margins(vlm: AttachedModel, items: Sequence[PopeItem], batch_size: int = 32) -> Float[np.ndarray, " question"]:
    """Unsteered logit(yes) - logit(no) of the first answer token for each item; the scalar control works on it."""
    tokenizer = cast(Any, vlm.processor).tokenizer
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No"))
    asked = distinct(items)
    found: dict[str, float] = {}
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        inputs = vlm.inputs([i.text for i in batch], [list(i.load_images()) for i in batch])
        logits = cast(Any, vlm.root)(**inputs, logits_to_keep=1).logits[:, -1].float()
        for item, value in zip(batch, (logits[:, yes] - logits[:, no]).tolist(), strict=True):
            found[item.key] = value
    return np.array([found[item.key] for item in items])


@dataclass(frozen=True)
class MethodScores:
    """What one method scored on one subset (or their mean); intervals are bootstrapped over pictures."""

    accuracy: Interval
    f1: Interval
    yes_ratio: float
    accuracy_l2s: float
    wellformed: float
    n: int


def scores(
    items: Sequence[PopeItem],
    predictions: NDArray[np.bool_],
    texts: Sequence[str] | None,
    *,
    seed: int,
    wellformed: Callable[[str], bool] = lambda text: clear_answer(text) is not None,
) -> dict[str, MethodScores]:
    """Score one method on every subset and over all of them ("mean"); texts are None for the scalar control.

    `wellformed` judges whole answers: a strength that breaks the text after its first word must not count as a success.
    """
    labels = np.array([item.label for item in items])
    subsets = list(dict.fromkeys(item.subset for item in items))
    out: dict[str, MethodScores] = {}
    for subset in [*subsets, "mean"]:
        chosen = np.array([subset in ("mean", item.subset) for item in items])
        groups = [item.group for item, use in zip(items, chosen, strict=True) if use]
        said, true = predictions[chosen], labels[chosen]
        spoken = None if texts is None else [t for t, use in zip(texts, chosen, strict=True) if use]
        out[subset] = MethodScores(
            accuracy=bootstrap_interval(said == true, groups, seed=seed),
            f1=bootstrap_interval(np.stack([said, true], 1), groups, f1, seed=seed),
            yes_ratio=float(said.mean()),
            accuracy_l2s=float((said == true).mean())
            if spoken is None
            else float(np.mean([l2s_correct(t, bool(y)) for t, y in zip(spoken, true, strict=True)])),
            wellformed=1.0 if spoken is None else float(np.mean([wellformed(t) for t in spoken])),
            n=int(chosen.sum()),
        )
    return out


def predictions(items: Sequence[PopeItem], texts: Mapping[str, str]) -> NDArray[np.bool_]:
    """Parse the answer to each item the standard POPE way."""
    return np.array([pope_answer(texts[item.key]) for item in items])


def difference(
    items: Sequence[PopeItem], first: NDArray[np.bool_], second: NDArray[np.bool_], *, seed: int
) -> Interval:
    """Accuracy of the first method minus that of the second over all items, paired and clustered by picture."""
    labels = np.array([item.label for item in items])
    return paired_difference(first == labels, second == labels, [item.group for item in items], seed=seed)


def read_items(path: Path, images: Path) -> list[PopeItem]:
    """Read one POPE file of JSON lines; the subset is taken from its name.

    Raises:
        InputError: unreadable file, or a row without its fields.
    """
    subset = next((name for name in ("random", "popular", "adversarial") if name in path.stem), path.stem)
    questions = read_pope(path, subset)
    pairs = pope_pairs(questions, images)
    return [PopeItem(pair, subset, str(q.image)) for pair, q in zip(pairs, questions, strict=True)]
