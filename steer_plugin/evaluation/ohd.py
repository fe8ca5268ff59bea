"""OHD: the questions of POPE on pictures of COCO, Flickr30K and nocaps, published with OHD-Caps (arXiv 2410.03176).

    {folder}/{coco,flickr,nocaps}_pope_{random,popular,adversarial}.json = 9 files of 3,000 questions, half of them yes,
    on 500 pictures a source

The questions stand as published, "imange" included. Scores: `benchmarks.ohd`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from steer_plugin.contrast.pope import SUBSETS, PopeQuestion, pope_pairs, read_pope
from steer_plugin.errors import InputError, nearest
from steer_plugin.evaluation.pope import PopeItem

SOURCES = ("coco", "flickr", "nocaps")
QUESTIONS, YESES, PICTURES = 3000, 1500, 500

_PUBLISHED = {
    "coco": "It is POPE's own, published in github.com/RUCAIBox/POPE, output/coco.",
    "flickr": "It is published with OHD-Caps in github.com/Yufang-Liu/clip_hallucination, data/POPE.",
    "nocaps": "It is published with OHD-Caps in github.com/Yufang-Liu/clip_hallucination, data/POPE.",
}


def read_ohd(
    folder: Path, images: Path | Mapping[str, Path], sources: Sequence[str] = SOURCES, *, whole: bool = True
) -> dict[str, list[PopeItem]]:
    """Read the three files of each source as POPE items, by source; ids are "{source}-{subset}-{question_id}".

    `images` holds a folder of pictures for each source, or maps sources to theirs. `whole` insists on the published
    numbers of questions, yeses and pictures: turn it off for a part of them. Raises InputError for an unknown source, a
    missing, damaged or incomplete file, and a missing picture.
    """
    for source in sources:
        if source not in SOURCES:
            raise InputError(f"source is {source!r}, expected one of {SOURCES}.{nearest(source, SOURCES)}")
    if not sources:
        raise InputError(f"sources is empty: expected at least one of {SOURCES}.")
    questions = {source: _questions(Path(folder), source, whole) for source in sources}
    return {source: _items(source, questions[source], _pictures(images, source)) for source in sources}


def _questions(folder: Path, source: str, whole: bool) -> list[PopeQuestion]:
    found: list[PopeQuestion] = []
    for subset in SUBSETS:
        path = folder / f"{source}_pope_{subset}.json"
        if not path.is_file():
            raise InputError(f"There is no OHD file {path}. {_PUBLISHED[source]}")
        questions = read_pope(path, f"{source}-{subset}")
        if whole:
            _check_whole(path, source, questions)
        found += questions
    return found


def _check_whole(path: Path, source: str, questions: Sequence[PopeQuestion]) -> None:
    counts = len(questions), sum(question.label for question in questions), len({one.image for one in questions})
    if counts != (QUESTIONS, YESES, PICTURES):
        raise InputError(
            f"{path} has {counts[0]} questions, {counts[1]} of them yes, on {counts[2]} pictures: expected "
            f"{QUESTIONS}, {YESES} and {PICTURES}. {_PUBLISHED[source]} "
            "Download it again, or pass whole=False for a part of it."
        )


def _pictures(images: Path | Mapping[str, Path], source: str) -> Path:
    if not isinstance(images, Mapping):
        return Path(images) / source
    if source not in images:
        raise InputError(f"images has folders for {sorted(images)} and none for {source!r}. Add it.")
    return Path(images[source])


def _items(source: str, questions: Sequence[PopeQuestion], pictures: Path) -> list[PopeItem]:
    pairs = pope_pairs(questions, pictures)
    # The source is part of the group: equal file names of two sources are two pictures.
    return [
        PopeItem(pair, subset=one.subset.removeprefix(f"{source}-"), group=f"{source}/{one.image}")
        for pair, one in zip(pairs, questions, strict=True)
    ]
