"""CHAIR (Rohrbach et al., arXiv 1809.02156): objects that a caption names and its picture lacks.

    chair_s = captions with a hallucinated object / captions
    chair_i = hallucinated mentions / mentions     an object named twice counts twice, as in the authors' script
    recall  = true objects named / true objects    each once per picture; later scripts report it beside the two

A ratio without a denominator is 0. Learn-to-Steer (arXiv 2508.12815) published its two columns swapped: of the 17.31
and 52.80 of its unsteered model, 17.31 is chair_i and 52.80 is chair_s. How captions are read: see synonyms.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, cast

from steer_plugin.atomic import JSON
from steer_plugin.errors import InputError
from steer_plugin.evaluation.intervals import Interval, bootstrap_interval, mean, ratio
from steer_plugin.evaluation.synonyms import Mention, Synonyms, objects_in

__all__ = ["ChairRow", "ChairScores", "Mention", "Synonyms", "Truth", "chair", "counts", "objects_in"]

Picture: TypeAlias = "str | int"
Captions: TypeAlias = "Mapping[str, str] | Mapping[int, str] | Mapping[Picture, str]"
Objects: TypeAlias = "Mapping[str, Collection[str]] | Mapping[int, Collection[str]] | Mapping[Picture, Collection[str]]"
Where: TypeAlias = Callable[[], str]

_COCO = "COCO publishes instances_val2014.json and captions_val2014.json at cocodataset.org, 2014 annotations."

# All else is dropped while parsing: outlines make up most of the half gigabyte of COCO's training instances.
_KEPT = frozenset(
    ("images", "annotations", "categories", "id", "name", "file_name", "image_id", "category_id", "caption")
)


@dataclass(frozen=True)
class Truth:
    """The objects truly there: picture id -> canonical names; `files` maps the pictures' file names to their ids."""

    objects: Mapping[str, frozenset[str]]
    synonyms: Synonyms
    files: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())

    @classmethod
    def from_objects(cls, objects: Objects, synonyms: Synonyms) -> Truth:
        """Take the true objects by picture, under any of their names; raises InputError for an unknown one."""
        return cls(
            {
                _key(picture): frozenset(synonyms.canonical(name, f"picture {picture!r}") for name in names)
                for picture, names in objects.items()
            },
            synonyms,
        )

    @classmethod
    def from_coco(cls, instances: Path | Sequence[Path], captions: Path | Sequence[Path], synonyms: Synonyms) -> Truth:
        """Unite the objects annotated in COCO's instances with those that its reference captions name.

        Give several files, such as COCO's two halves, as lists; the pocket world exports the same layout. Raises
        InputError naming file and entry for whatever is missing or damaged, and for a category without synonyms.
        """
        found: dict[str, set[str]] = {}
        files: dict[str, str] = {}
        for path in _paths(instances):
            contents = _json(path)
            _note_images(contents, path, found, files)
            kinds = {
                _entry(row, "id", at): synonyms.canonical(str(_entry(row, "name", at)), at())
                for row, at in _rows(contents, "categories", path)
            }
            for row, at in _rows(contents, "annotations", path):
                kind = _entry(row, "category_id", at)
                if kind not in kinds:
                    raise InputError(f"{at()}: category_id {kind!r} is not among the file's categories. Mend the file.")
                found.setdefault(_key(_entry(row, "image_id", at)), set()).add(kinds[kind])
        for path in _paths(captions):
            contents = _json(path)
            _note_images(contents, path, found, files)
            for row, at in _rows(contents, "annotations", path):
                named = objects_in(str(_entry(row, "caption", at)), synonyms)
                found.setdefault(_key(_entry(row, "image_id", at)), set()).update(mention.name for mention in named)
        return cls({picture: frozenset(names) for picture, names in found.items()}, synonyms, files)

    def id_of(self, picture: Picture) -> str:
        """Return the id of a picture given by id (42, "42", "000042") or file name; raises InputError for others."""
        found = self.files.get(str(picture), _key(picture))
        if found not in self.objects:
            known = ", ".join(list(self.objects)[:3])
            raise InputError(
                f"Picture {picture!r} is not among the {len(self.objects)} with annotations ({known}, ...). Name "
                "pictures by their COCO id or file name, and read the annotations of their half of COCO."
            )
        return found


@dataclass(frozen=True)
class ChairRow:
    """One caption's objects by canonical name; the first two in text order with repeats, the others each once.

    Attributes:
        picture: as the caller named it.
        mentioned: all that the caption names.
        hallucinated: those that are not there.
        found: those that are there, in text order.
        missed: what is there and not named, in alphabetical order.
    """

    picture: Picture
    mentioned: tuple[str, ...]
    hallucinated: tuple[str, ...]
    found: tuple[str, ...]
    missed: tuple[str, ...]


@dataclass(frozen=True)
class ChairScores:
    """A row per caption and the scores over all of them, as shares in 0..1."""

    rows: tuple[ChairRow, ...]
    chair_s: float
    chair_i: float
    recall: float

    def intervals(self, *, seed: int, resamples: int = 2000, level: float = 0.95) -> dict[str, Interval]:
        """Return chair_s, chair_i and recall with bootstrap intervals over captions; InputError for a single one."""
        return {
            name: bootstrap_interval(
                values, statistic=mean if name == "chair_s" else ratio, seed=seed, resamples=resamples, level=level
            )
            for name, values in counts(self.rows).items()
        }


def chair(captions: Captions, truth: Truth) -> ChairScores:
    """Score captions, {picture: caption}, with the picture's id or file name; an empty caption names nothing.

    Raises InputError for no captions, a picture without truth or given twice, and FrameworkError without `inflect`.
    """
    given = cast("Mapping[Picture, str]", captions)
    ids = {truth.id_of(picture) for picture in given}
    if not given or len(ids) < len(given):
        raise InputError(f"Got {len(given)} captions of {len(ids)} pictures: expected one per picture, at least one.")
    rows = tuple(_row(picture, caption, truth) for picture, caption in given.items())
    sums = {name: tuple(map(sum, zip(*values, strict=True))) for name, values in counts(rows).items()}
    (wrong_s,), (wrong_i, named), (found, true) = sums["chair_s"], sums["chair_i"], sums["recall"]
    return ChairScores(rows, wrong_s / len(rows), wrong_i / max(named, 1), found / max(true, 1))


def counts(rows: Sequence[ChairRow]) -> dict[str, list[tuple[int, ...]]]:
    """Return what chair_s, chair_i and recall are summed up from: for each caption (part,), or (part, whole)."""
    return {
        "chair_s": [(int(bool(row.hallucinated)),) for row in rows],
        "chair_i": [(len(row.hallucinated), len(row.mentioned)) for row in rows],
        "recall": [(len(row.found), len(row.found) + len(row.missed)) for row in rows],
    }


def _row(picture: Picture, caption: str, truth: Truth) -> ChairRow:
    true = truth.objects[truth.id_of(picture)]
    named = tuple(mention.name for mention in objects_in(caption, truth.synonyms))
    return ChairRow(
        picture,
        mentioned=named,
        hallucinated=tuple(name for name in named if name not in true),
        found=tuple(dict.fromkeys(name for name in named if name in true)),
        missed=tuple(sorted(true - set(named))),
    )


def _key(picture: object) -> str:
    """Return the id as text, so that 42, "42" and "000042" are one picture."""
    text = str(picture)
    return str(int(text)) if text.isdecimal() else text


def _paths(given: Path | Sequence[Path]) -> list[Path]:
    return [Path(given)] if isinstance(given, (str, Path)) else [Path(path) for path in given]


def _json(path: Path) -> Mapping[str, JSON]:
    if not path.is_file():
        raise InputError(f"There is no file of annotations {path}. {_COCO}")
    try:
        with path.open(encoding="utf-8-sig") as file:
            contents: object = json.load(file, object_hook=lambda found: {k: found[k] for k in found.keys() & _KEPT})
    except ValueError as error:  # no JSON, or no UTF-8
        raise InputError(f"{path} is damaged ({error}). Download or export it again. {_COCO}") from error
    if not isinstance(contents, dict):
        raise InputError(f"{path} holds a {type(contents).__name__}, expected a JSON object. {_COCO}")
    return cast("Mapping[str, JSON]", contents)


def _rows(contents: Mapping[str, JSON], name: str, path: Path) -> Iterator[tuple[Mapping[str, JSON], Where]]:
    """Yield a list's entries, each with a function that says where it stands: messages for half a million are slow."""
    rows = contents.get(name)
    if not isinstance(rows, list):
        raise InputError(f"{path} has no list {name!r}. Are instances and captions swapped? {_COCO}")
    for number, row in enumerate(rows):

        def where(number: int = number) -> str:
            return f"{path}, {name}[{number}]"

        if not isinstance(row, dict):
            raise InputError(f"{where()} is {row!r}, expected a JSON object. Download the file again.")
        yield cast("Mapping[str, JSON]", row), where


def _entry(row: Mapping[str, JSON], name: str, where: Where) -> str | int:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise InputError(f"{where()}: {name} is {value!r}, expected a text or whole number. Download the file again.")
    return value


def _note_images(contents: Mapping[str, JSON], path: Path, found: dict[str, set[str]], files: dict[str, str]) -> None:
    """Take the listed pictures: one without any annotation is there too, and shows none of the objects."""
    for row, where in _rows(contents, "images", path):
        key = _key(_entry(row, "id", where))
        found.setdefault(key, set())
        if "file_name" in row:
            files[str(_entry(row, "file_name", where))] = key
