"""Evaluation data as Hugging Face `datasets`: published tables in, answers of our own runs out.

    POPE             id, question_id, question, answer, image_source, image, category    lmms-lab/POPE
    MM-SafetyBench   id, question, image; a table per scenario and kind of picture       PKU-Alignment/MM-SafetyBench

A table is a `datasets.Dataset`, a parquet file, a folder of them, or what `save_to_disk` wrote: nothing is downloaded.
Pictures stay encoded as the table has them, and are decoded each time that a question is asked.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from PIL import Image

from steer_plugin.atomic import JSON
from steer_plugin.contrast.mmsafety import SCENARIOS, safety_template, scenario_name
from steer_plugin.contrast.pair import ContrastivePair, Picture
from steer_plugin.contrast.pope import pope_pairs, pope_question
from steer_plugin.errors import FrameworkError, InputError, nearest
from steer_plugin.evaluation.pope import PopeItem

# `datasets` is an optional package that writes no types down.
Table: TypeAlias = Any
Source: TypeAlias = "Path | str | Table"

POPE_COLUMNS = ("question_id", "question", "answer", "image_source", "image", "category")
SAFETY_COLUMNS = ("id", "question", "image")


def pope_items_from(source: Source) -> list[PopeItem]:
    """Read POPE from a table as published on the Hub: subset = category, group = image_source.

    Ids are "{category}-{question_id}". Pictures are decoded when asked for. Raises InputError naming a missing column,
    a row whose answer is neither yes nor no or that has no picture, and an id that comes twice; FrameworkError without
    `datasets`.
    """
    table = read_table(source, POPE_COLUMNS)
    items: list[PopeItem] = []
    pictures: dict[str, Picture] = {}  # the table repeats a picture for each of its questions
    for where, row in _rows(table):
        subset, name = str(row["category"]), str(row["image_source"])
        asked = {"question_id": row["question_id"], "image": name, "text": row["question"], "label": row["answer"]}
        question = pope_question(cast("dict[str, JSON]", asked), subset, where)
        if name not in pictures:
            pictures[name] = _picture(row, where)
        (pair,) = pope_pairs([question], pictures)
        items.append(PopeItem(pair, subset, name))
    _check_ids([item.id for item in items])
    return items


def mmsafety_pairs_from(
    source: Source, scenario: str, preset: Literal["llava", "qwen"] = "llava"
) -> list[ContrastivePair]:
    """Read one scenario of MM-SafetyBench from its table of SD_TYPO pictures on the Hub; ids are "{scenario}/{id}".

    `scenario` is named as published ("10-Legal_Opinion"), as on the Hub ("Legal_Opinion") or by its number ("10").
    Raises InputError as `pope_items_from`, and for an unknown scenario; FrameworkError without `datasets`.
    """
    name = next((known for known in SCENARIOS if known[3:] == scenario), scenario)
    name, template = scenario_name(name), safety_template(scenario_name(name), preset)
    pairs = [
        ContrastivePair(
            id=f"{name}/{row['id']}",
            images=(_picture(row, where),),
            prompt=str(row["question"]).strip(),
            positive=template.positive,
            negative=template.negative,
            suffix=template.suffix,
            behaviour=template.behaviour,
        )
        for where, row in _rows(read_table(source, SAFETY_COLUMNS))
    ]
    _check_ids([pair.id for pair in pairs])
    return pairs


def answers_dataset(path: Path | str) -> Table:
    """Return answers that an evaluation wrote as a `datasets.Dataset`: one file, or all under a folder's answers/.

    Columns: "method" (the file's place under answers/, without its ending), "id", "answer", and whatever else the lines
    hold; None where a line lacks it. Raises InputError for no such file or a damaged line, FrameworkError without
    `datasets`.
    """
    path = Path(path)
    top = path / "answers" if (path / "answers").is_dir() else path
    files = [path] if path.is_file() else sorted(top.rglob("*.jsonl"))
    if not files:
        raise InputError(f"{path} holds no answers: expected a file of JSON lines, or a folder with answers/*.jsonl.")
    rows: list[dict[str, JSON]] = []
    for file in files:
        method = file.stem if path.is_file() else file.relative_to(top).with_suffix("").as_posix()
        rows += [{"method": method, **row} for row in _answer_rows(file)]
    names = dict.fromkeys(name for row in [{"method": "", "id": "", "answer": ""}, *rows] for name in row)
    return _datasets().Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


def read_table(source: Source, columns: Sequence[str]) -> Table:
    """Open a table that has these columns, pictures left encoded.

    Raises InputError for another object or place, and naming the columns that are missing and those that are there;
    FrameworkError without `datasets`.
    """
    library = _datasets()
    table = _opened(library, Path(source)) if isinstance(source, (str, Path)) else source
    if not isinstance(table, library.Dataset):
        splits = f" Its splits are {sorted(table)}: give one." if isinstance(table, Mapping) else ""
        raise InputError(f"the table is a {type(table).__name__}: expected a datasets.Dataset or a path.{splits}")
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise InputError(
            f"the table has no column {missing[0]!r}, it has {table.column_names}."
            f"{nearest(missing[0], table.column_names)} Expected {', '.join(columns)}: rename its columns."
        )
    undecoded = library.Image(decode=False)
    typed = "image" in columns and isinstance(table.features["image"], library.Image)
    return table.cast_column("image", undecoded) if typed else table


def _opened(library: Table, path: Path) -> Table:
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return library.load_from_disk(str(path))
    files = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    if not files or any(file.suffix != ".parquet" for file in files):
        raise InputError(
            f"{path} is no table: expected a parquet file, a folder of them, or what save_to_disk wrote. Download it "
            "first; a name on the Hub is opened with datasets.load_dataset."
        )
    return library.Dataset.from_parquet([str(file) for file in files])


def _rows(table: Table) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(cast("Iterable[dict[str, Any]]", table)):
        yield f"row {number}", row


def _picture(row: Mapping[str, Any], where: str) -> Image.Image:
    """Open a picture that the table holds as {bytes, path}; its pixels are not read yet."""
    given = row["image"] or {}
    if isinstance(given, Image.Image):
        return given
    try:
        return Image.open(BytesIO(given["bytes"]) if given["bytes"] is not None else given["path"])
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where} has no picture that can be opened ({error!r}): expected {{bytes, path}}.") from error


def _check_ids(ids: Sequence[str]) -> None:
    if not ids:
        raise InputError("the table has no rows: expected at least one question.")
    most, times = Counter(ids).most_common(1)[0]
    if times > 1:
        raise InputError(f"{most!r} comes {times} times in the table. Ids are unique: give each table by itself.")


def _answer_rows(file: Path) -> list[dict[str, JSON]]:
    rows: list[dict[str, JSON]] = []
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = cast("JSON", json.loads(line))
        except ValueError as error:
            raise InputError(
                f"{file}, line {number} is not JSON: {error}. Run the evaluation again; it resumes."
            ) from error
        if not isinstance(row, dict) or (number > 1 and not {"id", "answer"} <= set(row)):
            raise InputError(f"{file}, line {number} is {line[:80]!r}: expected an object with id and answer.")
        rows += [row] if "id" in row else []
    return rows


def _datasets() -> Table:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise FrameworkError("tables need the datasets package: pip install 'steer-plugin[data]'.") from error
