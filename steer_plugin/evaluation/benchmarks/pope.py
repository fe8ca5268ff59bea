"""POPE (arXiv 2305.10355) as a benchmark, from the files that its authors publish and a folder of pictures.

    {data}/coco_pope_{random,popular,adversarial}.json     JSON lines {question_id, image, text, label}
    {images}/{image}                                       COCO val2014; {data}/images where none is given

    "{subset} accuracy" ...   over the questions of a subset
    "mean accuracy" ...       the mean of the subsets': the headline
    "... (L2S)"               the Learn-to-Steer authors' accuracy and F1 = 2a / (1 + a), not POPE's (arXiv 2508.12815)

The split into pictures for fitting, for choosing strengths and for testing is ours. That of the Learn-to-Steer authors
(about 1,200 training questions, 643 test questions a subset) is not published.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float

from steer_plugin.atomic import JSON
from steer_plugin.contrast.pair import ContrastivePair
from steer_plugin.contrast.pope import SUBSETS
from steer_plugin.errors import InputError, nearest
from steer_plugin.evaluation.asking import ANSWER_TOKENS, distinct
from steer_plugin.evaluation.benchmark import Benchmark, Metric, Texts, Training, Verdicts
from steer_plugin.evaluation.benchmarks._parts import (
    FITTING,
    VALIDATION,
    Split,
    answered,
    digest_of,
    digest_of_pictures,
    digests,
    only,
    picture_folder,
    require_folder,
    split_pictures,
    unique,
)
from steer_plugin.evaluation.benchmarks.yes_no import (
    MEASURES,
    WHOLE,
    is_shown,
    mean_rows,
    of_part,
    parts_of,
    yes_no_columns,
)
from steer_plugin.evaluation.judges.base import check_count
from steer_plugin.evaluation.pope import PopeItem, read_items

Made = TypeVar("Made", bound=Benchmark)
Part = Callable[[str, frozenset[str], Training | None], Made]

PROMPT = "Be careful."
_PUBLISHED = (
    "The questions are published in github.com/RUCAIBox/POPE, output/coco; the pictures are COCO's val2014, published "
    "at cocodataset.org."
)


class PopeBenchmark(Benchmark):
    """POPE on items: scores per subset and over all; see `split` and `read` for a training part beside it.

    Subsets keep the order of their first item. Raises InputError for no items, ids that come twice, items without a
    label or subset, and an answer without a token.
    """

    name = "pope"
    headline = "mean accuracy"

    def __init__(
        self,
        items: Sequence[PopeItem],
        *,
        training: Training | None = None,
        prompt: str = PROMPT,
        max_new_tokens: int = ANSWER_TOKENS,
        source: Mapping[str, JSON] | None = None,
    ) -> None:
        unique(self.name, [item.id for item in items])
        self.items = list(items)
        self.groups = [item.group for item in items]
        self.training, self.prompt = training, prompt
        self.max_new_tokens = check_count("max_new_tokens", max_new_tokens)
        self._labels = np.array([item.label for item in items])
        self._parts = parts_of(items)
        names = {measure: [f"{part} {measure}" for part in self._parts] for measure, _, _ in MEASURES}
        every = {
            f"{part} {measure}": Metric(
                f"{part} {measure}", of_part(part, measure, statistic), better, shown=is_shown(measure, part == "mean")
            )
            for part in self._parts
            for measure, statistic, better in MEASURES
        }
        # Accuracy and F1 of every part come first, then what else is known of each part.
        first = [name for pair in zip(names["accuracy"], names["F1"], strict=True) for name in pair]
        self.metrics = [every[name] for name in dict.fromkeys([*first, *every])]
        self.source = {"questions_sha256": digest_of_items(items), "questions": len(items), **(source or {})}

    @classmethod
    def split(
        cls,
        items: Sequence[PopeItem],
        *,
        fitting: float | int = FITTING,
        validation: float | int = VALIDATION,
        seed: int = 0,
        prompt: str = PROMPT,
        max_new_tokens: int = ANSWER_TOKENS,
        source: Mapping[str, JSON] | None = None,
    ) -> PopeBenchmark:
        """Test on a part of the pictures; fit on others, and choose strengths on others still.

        `fitting` is the share of the pictures that is not tested on, `validation` the share of these that strengths
        are chosen on; `fitting` 0 tests on all and fits nothing. Raises InputError for shares that leave a part empty.
        """
        parts = split_pictures((item.group for item in items), fitting, validation, seed)

        def part(name: str, pictures: frozenset[str], training: Training | None) -> PopeBenchmark:
            known = {**(source or {}), "split": split_source(parts, name, fitting, validation, seed, training)}
            chosen = items_in(items, pictures)
            return cls(chosen, training=training, prompt=prompt, max_new_tokens=max_new_tokens, source=known)

        return tested(items, parts, part)

    @classmethod
    def read(
        cls,
        data: Path,
        images: Path | None = None,
        *,
        files: str = "coco",
        subsets: Sequence[str] = SUBSETS,
        fitting: float | int = FITTING,
        validation: float | int = VALIDATION,
        seed: int = 0,
        prompt: str = PROMPT,
        max_new_tokens: int = ANSWER_TOKENS,
    ) -> PopeBenchmark:
        """Read {data}/{files}_pope_{subset}.json with the pictures in `images` ({data}/images), and split them.

        Raises InputError for a missing folder, file or picture, a damaged file, and as `split` does.
        """
        data = require_folder(data, f"Give the folder of POPE's question files. {_PUBLISHED}")
        unknown = [name for name in subsets if name not in SUBSETS]
        if unknown or not subsets or isinstance(subsets, str):
            near = nearest(unknown[0], SUBSETS) if unknown and not isinstance(subsets, str) else ""
            raise InputError(f"subsets is {subsets!r}: expected a list of some of {SUBSETS}.{near}")
        paths = [data / f"{files}_pope_{subset}.json" for subset in subsets]
        for path in paths:
            if not path.is_file():
                raise InputError(f"There is no POPE file {path}. {_PUBLISHED}")
        folder = picture_folder(data, images, _PUBLISHED)
        items = [item for path in paths for item in read_items(path, folder)]
        source = {"files": digests(paths), "pictures_sha256": digest_of_items_pictures(items)}
        return cls.split(
            items, fitting=fitting, validation=validation, seed=seed, prompt=prompt, max_new_tokens=max_new_tokens,
            source=source,
        )  # fmt: skip

    def values(self, texts: Texts, verdicts: Verdicts) -> dict[str, Float[np.ndarray, "item column"]]:
        """Return the rows of every measure for every subset and for all questions."""
        columns = yes_no_columns(answered(self.name, self.items, texts), self._labels)
        found = {
            f"{part} {measure}": only(asked, *rows)
            for part, asked in self._parts.items()
            for measure, rows in columns.items()
        }
        return found | mean_rows(columns, [asked for part, asked in self._parts.items() if part != WHOLE])


def tested(items: Sequence[PopeItem], split: Split, part: Part[Made]) -> Made:
    """Make the test part of a split, fitted on the fitting part, beside a validation part that is fitted alike.

    `part` makes a benchmark of some pictures, from its name, the pictures and its training. Raises InputError as
    `yes_no_training` does.
    """
    if not split.fitting:
        return part("test", split.test, None)
    fitted, chosen_on, test = (items_in(items, pictures) for pictures in (split.fitting, split.validation, split.test))
    held = None
    if chosen_on:
        held = part("validation", split.validation, yes_no_training(fitted, chosen_on, None))
    return part("test", split.test, yes_no_training(fitted, test, held))


def yes_no_training(fitting: Sequence[PopeItem], test: Sequence[PopeItem], held: Benchmark | None) -> Training:
    """Return balanced pairs for fitting, the test's own pairs as the oracle, and the test's labels as what is told.

    Raises InputError when no picture has both a yes and a no question.
    """
    pairs = balanced(fitting)
    if not pairs:
        raise InputError("No picture for fitting has both a yes and a no question. Set fitting=0 to fit nothing.")
    return Training(
        pairs=pairs,
        oracle=[item.pair for item in distinct(test)],
        validation=held,
        preset="pope",
        target="average_forced",
        context="last_prompt",
        told={item.id: "yes" if item.label else "no" for item in test},
    )


def balanced(items: Sequence[PopeItem]) -> list[ContrastivePair]:
    """Take one yes and one no question from each picture and subset, in the files' order, no question twice.

    Subsets share their yes questions, so each takes another one; a subset that finds no yes or no no left gives none.
    Each picture starts with another subset, so that where there is but one yes, the kinds of its no take turns.
    """
    chosen: list[ContrastivePair] = []
    pictures = groupby(sorted(items, key=lambda item: item.group), key=lambda item: item.group)
    for number, (_, found) in enumerate(pictures):
        questions = list(found)
        subsets = sorted({item.subset for item in questions})
        used: set[str] = set()
        for at in range(len(subsets)):
            subset = subsets[(number + at) % len(subsets)]
            left = [item for item in questions if item.subset == subset and item.key not in used]
            yes, no = (next((item for item in left if item.label is label), None) for label in (True, False))
            if yes is not None and no is not None:
                chosen += [yes.pair, no.pair]
                used |= {yes.key, no.key}
    return chosen


def items_in(items: Sequence[PopeItem], pictures: frozenset[str]) -> list[PopeItem]:
    """Return the questions on some pictures, in their order."""
    return [item for item in items if item.group in pictures]


def split_source(
    split: Split, part: str, fitting: float | int, validation: float | int, seed: int, training: Training | None = None
) -> dict[str, JSON]:
    """Describe a split by picture, and which part of it this is."""
    pairs: dict[str, JSON] = {} if training is None else {"pairs": len(training.pairs)}
    shares: dict[str, JSON] = {"fitting": fitting, "validation": validation}
    return {"by": "picture", "part": part, "seed": seed, "shares": shares, "pictures": split.counts(), **pairs}


def digest_of_items(items: Sequence[PopeItem]) -> str:
    """SHA-256 of what is asked and what is true."""
    return digest_of([[item.id, item.key, item.subset, item.label] for item in items])


def digest_of_items_pictures(items: Sequence[PopeItem]) -> str:
    """SHA-256 of the pictures' names and sizes."""
    return digest_of_pictures(picture for item in distinct(items) for picture in item.pair.images)
