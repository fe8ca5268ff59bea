"""CHAIR (Rohrbach et al., arXiv 1809.02156) as a benchmark: describe pictures, count objects that are not there.

    {images}/COCO_val2014_*.jpg                                 {data}/images where none is given
    {data}/annotations/{instances,captions}_val2014.json        COCO's 2014 annotations
    {data}/synonyms.txt                                         one object a line, its names comma-separated

    CHAIR_s = captions with a hallucinated object / captions
    CHAIR_i = hallucinated mentions / mentions, the headline
    recall  = true objects named / true objects

    F1      = mean over captions of that of their precision and recall; strengths are chosen by it

Objects and words per caption stand beside them: who says less hallucinates less.
Learn-to-Steer (arXiv 2508.12815) captions 500 pictures of COCO; which ones is not published, so ours are drawn by a
seed. Their columns are swapped (see `evaluation.chair`). Prompt and longest answer are declared choices of ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from steer_plugin.atomic import JSON
from steer_plugin.contrast.pair import Picture
from steer_plugin.errors import InputError
from steer_plugin.evaluation.benchmark import Benchmark, Metric, Texts, Training, Verdicts
from steer_plugin.evaluation.benchmarks._parts import (
    Question,
    answered,
    digest_of,
    digest_of_pictures,
    digests,
    picture_folder,
    require_folder,
    shuffled,
    unique,
)
from steer_plugin.evaluation.chair import ChairRow, Synonyms, Truth, chair, counts, objects_in
from steer_plugin.evaluation.intervals import ratio
from steer_plugin.evaluation.judges.base import check_count

TEXT = "Please describe this image in detail."
PROMPT = "Name only what can clearly be seen."
PICTURES, CAPTION_TOKENS = 500, 512
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_PUBLISHED = (
    "COCO publishes the pictures (val2014) and their annotations (instances_val2014.json, captions_val2014.json) at "
    "cocodataset.org."
)


class ChairBenchmark(Benchmark):
    """CHAIR on pictures by file name, held against the truth of their annotations.

    `training` is the caller's: CHAIR brings no contrastive pairs. Raises InputError for no pictures, one without
    annotations, an empty text, an answer without a token, and training pairs on pictures that are tested;
    FrameworkError where `inflect` is missing.
    """

    name = "chair"
    headline = "CHAIR_i"

    def __init__(
        self,
        pictures: Mapping[str, Picture],
        truth: Truth,
        *,
        text: str = TEXT,
        prompt: str = PROMPT,
        max_new_tokens: int = CAPTION_TOKENS,
        training: Training | None = None,
        source: Mapping[str, JSON] | None = None,
    ) -> None:
        unique(self.name, list(pictures))
        if not text.strip():
            raise InputError(f"text is {text!r}: expected what the model is asked, such as {TEXT!r}.")
        unique(self.name, [truth.id_of(name) for name in pictures])
        # Asked before any caption is, as it says whether the words can be read at all.
        objects_in("", truth.synonyms)
        _refuse_tested(pictures, training)
        self.items = [Question(name, text, (picture,), name) for name, picture in pictures.items()]
        self.groups = list(pictures)
        self.truth, self.training, self.prompt = truth, training, prompt
        self.max_new_tokens = check_count("max_new_tokens", max_new_tokens)
        self.metrics = [
            Metric("CHAIR_s", better="lower"),
            Metric("CHAIR_i", ratio, "lower"),
            Metric("recall", ratio),
            Metric("F1"),
            Metric("objects per caption", better="neither", scale=1.0),
            Metric("words per caption", better="neither", scale=1.0),
        ]
        true: list[JSON] = [[name, sorted(truth.objects[truth.id_of(name)])] for name in sorted(pictures)]
        self.source = {
            "pictures": len(self.items),
            "pictures_sha256": digest_of_pictures(pictures.values()),
            "truth_sha256": digest_of(true),
            "synonyms_sha256": digest_of(sorted(map(list, truth.synonyms.names.items()))),
            "text": text,
            **(source or {}),
        }

    @classmethod
    def read(
        cls,
        data: Path,
        images: Path | None = None,
        *,
        synonyms: Path | None = None,
        halves: Sequence[str] = ("val",),
        pictures: int | None = PICTURES,
        seed: int = 0,
        text: str = TEXT,
        prompt: str = PROMPT,
        max_new_tokens: int = CAPTION_TOKENS,
        training: Training | None = None,
    ) -> ChairBenchmark:
        """Caption up to `pictures` of the pictures in a folder, drawn by the seed (None: all of them).

        `halves` says which of COCO's annotations are read: ("val",), or ("train", "val") for pictures of both;
        `synonyms` is {data}/synonyms.txt where none is given. Raises InputError for whatever is missing or damaged.
        """
        data = require_folder(data, f"Give the folder that holds annotations/. {_PUBLISHED}")
        folder = picture_folder(data, images, _PUBLISHED)
        if isinstance(halves, str) or not halves or any(half not in ("train", "val") for half in halves):
            raise InputError(f"halves is {halves!r}: expected a list of 'val', 'train' or both.")
        listed = Synonyms.read(data / "synonyms.txt" if synonyms is None else synonyms)
        paths = {
            kind: [data / "annotations" / f"{kind}_{half}2014.json" for half in halves]
            for kind in ("instances", "captions")
        }
        found = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
        if not found:
            raise InputError(f"{folder} holds no pictures ({' '.join(SUFFIXES)}). {_PUBLISHED}")
        limit = len(found) if pictures is None else check_count("pictures", pictures)
        chosen = sorted(shuffled(found, seed)[:limit])
        truth = Truth.from_coco(paths["instances"], paths["captions"], listed)
        source: dict[str, JSON] = {
            "files": digests([*paths["instances"], *paths["captions"]]), "found": len(found), "seed": seed
        }  # fmt: skip
        return cls(
            {name: folder / name for name in chosen}, truth, text=text, prompt=prompt, max_new_tokens=max_new_tokens,
            training=training, source=source,
        )  # fmt: skip

    def values(self, texts: Texts, verdicts: Verdicts) -> dict[str, Float[np.ndarray, "item column"]]:
        """Return what each score is summed up from, one row per caption."""
        said = answered(self.name, self.items, texts)
        captions = {item.id: text for item, text in zip(self.items, said, strict=True)}
        rows = chair(captions, self.truth).rows
        counted = counts(rows)
        columns: dict[str, Sequence[tuple[float, ...]]] = {
            "CHAIR_s": counted["chair_s"],
            "CHAIR_i": counted["chair_i"],
            "recall": counted["recall"],
            "F1": [(_f1(row),) for row in rows],
            "objects per caption": [(len(row.mentioned),) for row in rows],
            "words per caption": [(len(text.split()),) for text in said],
        }
        return {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}

    def behaviour(self, texts: Texts) -> list[float]:
        """Return the F1 of each caption: CHAIR_i has no score per caption, and is best where nothing is named."""
        return [float(value) for value in self.values(texts, {})["F1"][:, 0]]


def _f1(row: ChairRow) -> float:
    """Of the precision of the mentions and the recall of the true objects; 0 where either has no denominator."""
    true, right = len(row.found) + len(row.missed), len(row.mentioned) - len(row.hallucinated)
    precision = right / len(row.mentioned) if row.mentioned else 0.0
    recall = len(row.found) / true if true else 0.0
    return 2 * precision * recall / (precision + recall) if precision and recall else 0.0


def _refuse_tested(pictures: Mapping[str, Picture], training: Training | None) -> None:
    """What is tested must not be fitted on: pictures are known by their file names."""
    for pair in () if training is None else training.pairs:
        for image in pair.images:
            if isinstance(image, Path) and image.name in pictures:
                raise InputError(f"Pair {pair.id!r} is on {image.name}, which is tested too. Fit on other pictures.")
