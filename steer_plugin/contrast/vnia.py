"""VNIA, the SteerVLM authors' training data (arXiv 2510.26769): JSON lines, one picture with a pair of prompts a line.

    {"task": ..., "answer": ..., "pos": p+, "neg": p-, "prompt_id": ..., "image_id": ...[, "prompt": ...]}

`prompt` is the text of the prompting baseline, in the evaluation file alone. Up to four pairs of prompts share a
prompt_id, so it is never read: a pair is known by its normalised texts. The pictures do not come with the files: they
are those of Conceptual Captions 3M, image_id = {row}_{crc32(url)}, in a folder as {image_id}.jpg (.jpeg, .png, .webp).
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import NamedTuple, cast

from steer_plugin.atomic import JSON
from steer_plugin.contrast.rows import SteeringRow
from steer_plugin.errors import InputError, nearest

REQUIRED = ("task", "answer", "pos", "neg", "image_id")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

# Left and right single quotes, left and right double ones.
_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
_NAMED = 5


class _Line(NamedTuple):
    id: str
    where: str
    image: str
    row: Mapping[str, JSON]

    def text(self, name: str) -> str:
        return _text(self.row, name, self.where)


def normalised(text: str) -> str:
    """Return `text` with typographic quotes made plain, runs of white space made one space, and the ends stripped.

    Pairs of VNIA (arXiv 2510.26769) are compared so: one of them is written with both kinds of apostrophe.
    """
    return " ".join(text.translate(_QUOTES).split())


def read_vnia(path: Path | str, images: Path | str, missing: str = "error") -> list[SteeringRow]:
    """Read a VNIA file (arXiv 2510.26769) in its order, with ids "{line number, six digits}-{image_id}".

    `images` is the folder of pictures, listed once. The prompts of the pair come normalised, task and answer with their
    ends stripped. `missing` says what rows without a picture do: "error" raises, "skip" leaves them out with one
    warning.

    Raises InputError naming file and line for a line that is not JSON or has an absent or empty value; one InputError
    that counts the rows without a picture, naming the first five; the same for "skip" too when none has its picture.
    """
    path, folder = Path(path), Path(images)
    if missing not in ("error", "skip"):
        raise InputError(
            f"missing is {missing!r}, expected 'error' or 'skip'.{nearest(str(missing), ('error', 'skip'))}"
        )
    lines = list(_lines(path))
    found = _pictures(folder, {line.image for line in lines})
    lost = [line.image for line in lines if line.image not in found]
    if lost:
        report = _missing(path, folder, lost, len(lines))
        if len(lost) == len(lines):
            raise InputError(f"{report} Give the folder that holds them, or download them.")
        if missing == "error":
            raise InputError(f"{report} Download them, or leave these rows out with missing='skip'.")
        warnings.warn(f"{report} These rows are left out.", stacklevel=2)
    return [
        SteeringRow(
            id=line.id,
            image=found[line.image],
            task=line.text("task").strip(),
            p_plus=normalised(line.text("pos")),
            p_minus=normalised(line.text("neg")),
            answer=line.text("answer").strip(),
        )
        for line in lines
        if line.image in found
    ]


def vnia_pairs(rows: Iterable[SteeringRow]) -> list[tuple[str, str]]:
    """Return the distinct (p+, p-) of the rows, normalised, in order of first appearance.

    Direction counts: (a, b) and (b, a) are two pairs. VNIA (arXiv 2510.26769) has most of its pairs in both.
    """
    return list(dict.fromkeys((normalised(row.p_plus), normalised(row.p_minus)) for row in rows))


def vnia_prompts(path: Path | str) -> dict[str, str]:
    """Return the prompting baseline's text of every row, by the row's id in `read_vnia`; needs no pictures.

    VNIA (arXiv 2510.26769) has `prompt` in its evaluation file alone. Raises InputError for a file without it, for a
    line that lacks it where others have it or has it empty, and for every bad line that `read_vnia` refuses.
    """
    path = Path(path)
    lines = list(_lines(path))
    if not any("prompt" in line.row for line in lines):
        raise InputError(
            f"{path} has no 'prompt' on any of its {len(lines)} lines. "
            "Give VNIA's evaluation file, or write the prompts of your baseline yourself."
        )
    return {line.id: line.text("prompt").strip() for line in lines}


def _pictures(folder: Path, wanted: Set[str]) -> dict[str, Path]:
    """Find the wanted pictures in one listing: the whole of CC3M may lie there, and the folder may be a network's."""
    if not folder.is_dir():
        raise InputError(f"There is no folder of images {folder}. Give the folder that holds <image_id>.jpg and so on.")
    ranked: dict[str, tuple[int, str]] = {}
    with os.scandir(folder) as listing:
        for entry in listing:
            stem, dot, ending = entry.name.rpartition(".")
            suffix = dot + ending.lower()
            if stem in wanted and suffix in SUFFIXES and entry.is_file():
                # The order of a listing is nobody's promise: of two files for one id, rank and name decide.
                rank = (SUFFIXES.index(suffix), entry.name)
                ranked[stem] = min(ranked.get(stem, rank), rank)
    return {stem: folder / name for stem, (_, name) in ranked.items()}


def _missing(path: Path, folder: Path, lost: list[str], rows: int) -> str:
    names = list(dict.fromkeys(lost))
    more = f" and {len(names) - _NAMED} more ids" if len(names) > _NAMED else ""
    return (
        f"{path}: {len(lost)} of {rows} rows have no image in {folder}, where a file is called <image_id> with one of "
        f"{' '.join(SUFFIXES)}. Missing: {', '.join(names[:_NAMED])}{more}. "
        "The images are those of Conceptual Captions 3M, image_id is {row}_{crc32(url)}."
    )


def _lines(path: Path) -> Iterator[_Line]:
    if not path.is_file():
        raise InputError(f"There is no VNIA file {path}. Give the path of a file such as evaluation_dataset.jsonl.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}). Give a VNIA file of JSON lines.") from error
    if not text.strip():
        raise InputError(f"{path} is empty: expected one JSON object per line with {', '.join(REQUIRED)}.")
    # Not splitlines: JSON strings may hold U+2028 and its kin unescaped.
    for number, content in enumerate(text.split("\n"), 1):
        if content.strip():
            yield _line(content, number, f"{path}, line {number}")


def _line(content: str, number: int, where: str) -> _Line:
    try:
        value = cast("JSON", json.loads(content))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}. Write one JSON object per line.") from error
    if not isinstance(value, dict):
        raise InputError(
            f"{where} is {value!r}, expected a JSON object with {', '.join(REQUIRED)}. Write {{'task': ..., ...}}."
        )
    image = {name: _text(value, name, where).strip() for name in REQUIRED}["image_id"]
    return _Line(f"{number:06d}-{image}", where, image, value)


def _text(row: Mapping[str, JSON], name: str, where: str) -> str:
    if name not in row:
        raise InputError(f"{where} has no {name!r}, it has {sorted(row)}.{nearest(name, row)} Add it.")
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {name} is {value!r}, expected a text that is not empty. Fill it in.")
    return value
