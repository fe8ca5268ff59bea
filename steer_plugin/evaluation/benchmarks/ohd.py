"""OHD as a benchmark: POPE's questions on pictures of COCO, Flickr30K and nocaps (OHD-Caps, arXiv 2410.03176).

    {data}/{coco,flickr,nocaps}_pope_{random,popular,adversarial}.json     9 files of 3,000 questions on 500 pictures
    {images}/{coco,flickr,nocaps}/{image}                                  {data}/images where none is given

    "{subset} accuracy", "{subset} F1"     over the questions of a subset, all sources
    "overall accuracy", "overall F1" ...   over all questions, each weighing the same: the headline
    "{source} accuracy"                    over the three subsets of a source

These are the columns of SteerVLM's table (arXiv 2510.26769), which does not say whether its overall F1 pools or
averages the subsets. Whoever runs SteerVLM gives its prompt pair: this benchmark has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from pathlib import Path

import numpy as np
from jaxtyping import Float

from steer_plugin.atomic import JSON
from steer_plugin.contrast.pope import SUBSETS
from steer_plugin.errors import InputError
from steer_plugin.evaluation.asking import ANSWER_TOKENS
from steer_plugin.evaluation.benchmark import Benchmark, Metric, Texts, Training, Verdicts
from steer_plugin.evaluation.benchmarks._parts import (
    FITTING,
    VALIDATION,
    answered,
    digests,
    only,
    require_folder,
    split_pictures,
    unique,
)
from steer_plugin.evaluation.benchmarks.pope import (
    MEASURES,
    PROMPT,
    digest_of_items,
    digest_of_items_pictures,
    is_shown,
    items_in,
    parts_of,
    split_source,
    tested,
    yes_no_columns,
)
from steer_plugin.evaluation.judges.base import check_count
from steer_plugin.evaluation.ohd import SOURCES, read_ohd
from steer_plugin.evaluation.pope import PopeItem

_PUBLISHED = (
    "The questions on COCO are POPE's (github.com/RUCAIBox/POPE, output/coco), those on Flickr30K and nocaps are "
    "published in github.com/Yufang-Liu/clip_hallucination, data/POPE; the pictures come from each data set's own site."
)
_OVERALL = "overall"
# What is told of a part besides its accuracy and F1: of all questions everything, of a source the accuracy alone.
_OF_A_SUBSET, _OF_A_SOURCE = ("accuracy", "F1"), ("accuracy",)


class OhdBenchmark(Benchmark):
    """OHD on items by source, as `read_ohd` returns them; see `split` and `read` for a training part beside it.

    Raises InputError for no items, ids that come twice, items without a label or subset, an answer without a token.
    """

    name = "ohd"
    headline = "overall accuracy"

    def __init__(
        self,
        items: Mapping[str, Sequence[PopeItem]],
        *,
        training: Training | None = None,
        prompt: str = PROMPT,
        max_new_tokens: int = ANSWER_TOKENS,
        source: Mapping[str, JSON] | None = None,
    ) -> None:
        every = [item for part in items.values() for item in part]
        unique(self.name, [item.id for item in every])
        self.items, self.groups = every, [item.group for item in every]
        self.training, self.prompt = training, prompt
        self.max_new_tokens = check_count("max_new_tokens", max_new_tokens)
        self._labels = np.array([item.label for item in every])
        self._asked = parts_of(every, _OVERALL)
        if clash := [name for name in items if name in self._asked]:
            raise InputError(f"A source and a subset are both called {clash[0]!r}: rename the source.")
        wanted: dict[str, tuple[str, ...]] = dict.fromkeys(self._asked, _OF_A_SUBSET)
        wanted |= dict.fromkeys(items, _OF_A_SOURCE)
        wanted[_OVERALL] = tuple(measure for measure, _, _ in MEASURES)
        self._asked |= {
            name: np.array([name == source for source, part in items.items() for _ in part]) for name in items
        }
        ways = {measure: Metric(measure, statistic, better) for measure, statistic, better in MEASURES}
        found = [(part, measure) for part, chosen in wanted.items() for measure in chosen]
        # What is special to the whole comes last.
        found.sort(key=lambda one: one[1] not in _OF_A_SUBSET)
        self._wanted = found
        self.metrics = [
            replace(ways[measure], name=f"{part} {measure}", shown=is_shown(measure, part == _OVERALL))
            for part, measure in found
        ]
        self.source = {
            "questions_sha256": digest_of_items(every),
            "questions": {name: len(part) for name, part in items.items()},
            **(source or {}),
        }

    @classmethod
    def split(
        cls,
        items: Mapping[str, Sequence[PopeItem]],
        *,
        fitting: float | int = FITTING,
        validation: float | int = VALIDATION,
        seed: int = 0,
        prompt: str = PROMPT,
        max_new_tokens: int = ANSWER_TOKENS,
        source: Mapping[str, JSON] | None = None,
    ) -> OhdBenchmark:
        """Split the pictures of every source as `PopeBenchmark.split` does, COCO's into the very same parts.

        Raises InputError as it does.
        """
        parts = reduce(
            or_,
            (
                split_pictures((item.group for item in part), fitting, validation, seed, prefix=f"{name}/")
                for name, part in items.items()
            ),
        )

        def part(name: str, pictures: frozenset[str], training: Training | None) -> OhdBenchmark:
            known = {**(source or {}), "split": split_source(parts, name, fitting, validation, seed, training)}
            chosen = {name: items_in(part, pictures) for name, part in items.items()}
            return cls(chosen, training=training, prompt=prompt, max_new_tokens=max_new_tokens, source=known)

        return tested([item for part in items.values() for item in part], parts, part)

    @classmethod
    def read(
        cls,
        data: Path,
        images: Path | Mapping[str, Path] | None = None,
        *,
        sources: Sequence[str] = SOURCES,
        whole: bool = True,
        fitting: float | int = FITTING,
        validation: float | int = VALIDATION,
        seed: int = 0,
        prompt: str = PROMPT,
        max_new_tokens: int = ANSWER_TOKENS,
    ) -> OhdBenchmark:
        """Read the files of some sources, with a folder of pictures for each in `images`, and split them by picture.

        `images` is a folder that holds one for each source, or maps sources to theirs; `whole` insists on the published
        counts. Raises InputError for whatever is missing, damaged or incomplete, and as `split` does.
        """
        data = require_folder(data, f"Give the folder of OHD's question files. {_PUBLISHED}")
        given = data / "images" if images is None else images
        for folder in given.values() if isinstance(given, Mapping) else [given]:
            require_folder(folder, f"Give the pictures' folder, with one folder for each source in it. {_PUBLISHED}")
        if isinstance(sources, str):
            raise InputError(f"sources is {sources!r}: expected a list of some of {SOURCES}.")
        items = read_ohd(data, given, sources, whole=whole)
        every = [item for part in items.values() for item in part]
        paths = [data / f"{name}_pope_{subset}.json" for name in sources for subset in SUBSETS]
        source = {"files": digests(paths), "pictures_sha256": digest_of_items_pictures(every)}
        return cls.split(
            items, fitting=fitting, validation=validation, seed=seed, prompt=prompt, max_new_tokens=max_new_tokens,
            source=source,
        )  # fmt: skip

    def values(self, texts: Texts, verdicts: Verdicts) -> dict[str, Float[np.ndarray, "item column"]]:
        """Return the rows of every metric."""
        columns = yes_no_columns(answered(self.name, self.items, texts), self._labels)
        return {f"{part} {measure}": only(self._asked[part], *columns[measure]) for part, measure in self._wanted}
