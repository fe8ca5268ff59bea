"""VNIA rows keep the file's order and get unique ids; absent pictures are one message, broken lines are named."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path

import pytest
from PIL import Image

from steer_plugin.contrast import SteeringRow, read_vnia, vnia_pairs, vnia_prompts
from steer_plugin.contrast.vnia import normalised
from steer_plugin.errors import InputError


def row(image: str = "7_11", **changes: object) -> dict[str, object]:
    texts = {"task": "Describe the scene.", "answer": "A calm one.", "pos": "Be calm.", "neg": "Be tense."}
    return {**texts, "prompt_id": 3, "image_id": image, **changes}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def draw(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (3 + number, 2), (40 * number, 0, 0)).save(folder / name)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw(tmp_path / "images", "7_11.jpg", "8_12.jpeg", "9_13.png", "10_14.webp", "other.jpg")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don\u2019t", "Don't"),
        ("\u2018so\u2019 and \u201cso\u201d", "'so' and \"so\""),
        (" two\t words \n\u00a0here ", "two words here"),
        ("plain 'and' \"as it is\" \u2014", "plain 'and' \"as it is\" \u2014"),
        ("", ""),
    ],
)
def test_normalised(text: str, expected: str):
    assert normalised(text) == expected == normalised(expected)


def test_rows_in_order(tmp_path: Path, pictures: Path):
    path = write(
        tmp_path / "vnia.jsonl",
        row("10_14", task=" Where? "),
        row("7_11", pos="Don\u2019t  be\ntense. ", neg=" Say \u201cno\u201d"),
        row("9_13"),
        row("7_11", answer="It\u2019s  calm. \n"),
        row("8_12"),
    )
    rows = read_vnia(path, pictures)
    assert [r.id for r in rows] == ["000001-10_14", "000002-7_11", "000003-9_13", "000004-7_11", "000005-8_12"]
    assert [Path(str(r.image)).name for r in rows] == ["10_14.webp", "7_11.jpg", "9_13.png", "7_11.jpg", "8_12.jpeg"]
    assert rows[0] == SteeringRow(
        "000001-10_14", pictures / "10_14.webp", "Where?", "Be calm.", "Be tense.", "A calm one."
    )
    assert (rows[1].p_plus, rows[1].p_minus) == ("Don't be tense.", 'Say "no"')
    assert rows[3].answer == "It\u2019s  calm.", "an answer is a training target: only its ends are stripped"
    assert [r.load_image().size for r in rows] == [(6, 2), (3, 2), (5, 2), (3, 2), (4, 2)]
    assert read_vnia(str(path), str(pictures)) == rows


def test_line_numbers_count_blank_lines(tmp_path: Path, pictures: Path):
    path = tmp_path / "vnia.jsonl"
    odd = row("9_13", task="one\u2028line")
    del odd["prompt_id"]
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(row()).encode() + b"\r\n\r\n" + json.dumps(odd, ensure_ascii=False).encode()
    )
    rows = read_vnia(path, pictures)
    assert [r.id for r in rows] == ["000001-7_11", "000003-9_13"]
    assert rows[1].task == "one\u2028line"


def test_of_two_files_the_first_ending_counts(tmp_path: Path):
    folder = draw(tmp_path / "images", "1_1.png", "1_1.JPG", "2_2.webp", "2_2.png", "3_3.gif")
    (folder / "4_4.jpg").mkdir()
    path = write(tmp_path / "vnia.jsonl", row("1_1"), row("2_2"))
    assert [Path(str(r.image)).name for r in read_vnia(path, folder)] == ["1_1.JPG", "2_2.png"]
    path = write(tmp_path / "vnia.jsonl", row("1_1"), row("3_3"), row("4_4"))
    with pytest.raises(InputError, match=r"2 of 3 rows have no image .*Missing: 3_3, 4_4\. "):
        read_vnia(path, folder)


def test_the_folder_is_listed_once(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "vnia.jsonl", *(row(name) for name in ("7_11", "8_12", "9_13") * 20))
    listed, stats = [], []
    scandir, stat = os.scandir, os.stat
    monkeypatch.setattr(os, "scandir", lambda folder: (listed.append(folder), scandir(folder))[1])
    monkeypatch.setattr(os, "stat", lambda *args, **more: (stats.append(args), stat(*args, **more))[1])
    assert len(read_vnia(path, pictures)) == 60
    assert listed == [pictures] and len(stats) < 10


def test_pairs_in_order_of_appearance(tmp_path: Path, pictures: Path):
    path = write(
        tmp_path / "vnia.jsonl",
        row(pos="It's b", neg="a", prompt_id=1),
        row(pos="a", neg="It\u2019s b", prompt_id=1),
        row(pos="It\u2019s  b ", neg="a", prompt_id=2),
        row(pos="c", neg="d", prompt_id=1),
    )
    expected = [("It's b", "a"), ("a", "It's b"), ("c", "d")]
    assert vnia_pairs(read_vnia(path, pictures)) == expected
    picture = Image.new("RGB", (2, 2))
    assert vnia_pairs(SteeringRow(n, picture, "t", "\u201cx\u201d", n, "z") for n in ("y", " y")) == [('"x"', "y")]
    assert vnia_pairs([]) == []


def test_missing_images_are_one_message(tmp_path: Path, pictures: Path):
    names = ["7_11", "a_1", "a_2", "a_1", "a_3", "a_4", "a_5", "a_6", "a_7", "8_12"]
    path = write(tmp_path / "vnia.jsonl", *(row(name) for name in names))
    expected = (
        f"{path}: 8 of 10 rows have no image in {pictures}, where a file is called <image_id> with one of .jpg .jpeg "
        ".png .webp. Missing: a_1, a_2, a_3, a_4, a_5 and 2 more ids. The images are those of Conceptual Captions 3M, "
        "image_id is {row}_{crc32(url)}."
    )
    with pytest.raises(InputError) as caught:
        read_vnia(path, pictures)
    assert str(caught.value) == f"{expected} Download them, or leave these rows out with missing='skip'."
    with pytest.warns(UserWarning) as warned:
        rows = read_vnia(path, pictures, missing="skip")
    assert [r.id for r in rows] == ["000001-7_11", "000010-8_12"], "ids do not move when rows are left out"
    assert [str(w.message) for w in warned] == [f"{expected} These rows are left out."]


def test_skip_is_silent_when_nothing_is_missing(tmp_path: Path, pictures: Path):
    path = write(tmp_path / "vnia.jsonl", row(), row("8_12"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_vnia(path, pictures, missing="skip") == read_vnia(path, pictures)


@pytest.mark.parametrize("missing", ["error", "skip"])
def test_all_missing_is_an_error(tmp_path: Path, pictures: Path, missing: str):
    path = write(tmp_path / "vnia.jsonl", row("a_1"), row("a_2"))
    with pytest.raises(InputError, match=r"2 of 2 rows have no image .*Missing: a_1, a_2\. .*Give the folder"):
        read_vnia(path, pictures, missing=missing)
    with pytest.raises(InputError, match=r"no folder of images .*nowhere"):
        read_vnia(path, tmp_path / "nowhere", missing=missing)


def test_an_unknown_choice_is_refused_first(tmp_path: Path):
    with pytest.raises(InputError, match=r"missing is 'skp', expected 'error' or 'skip'\. Did you mean 'skip'"):
        read_vnia(tmp_path / "nowhere.jsonl", tmp_path, missing="skp")


@pytest.mark.parametrize("name", ["task", "answer", "pos", "neg", "image_id"])
@pytest.mark.parametrize("value", ["", " \n", None, 3, ["a"]])
def test_empty_values_are_named(tmp_path: Path, pictures: Path, name: str, value: object):
    path = write(tmp_path / "vnia.jsonl", row(), row(**{name: value}))
    message = rf"vnia\.jsonl, line 2: {name} is {re.escape(repr(value))}, expected a text .* Fill it in"
    with pytest.raises(InputError, match=message):
        read_vnia(path, pictures)
    with pytest.raises(InputError, match=message):
        vnia_prompts(path)


@pytest.mark.parametrize("name", ["task", "answer", "pos", "neg", "image_id"])
def test_absent_keys_are_named(tmp_path: Path, pictures: Path, name: str):
    damaged = row()
    damaged[f"{name}s"] = damaged.pop(name)
    path = write(tmp_path / "vnia.jsonl", row(), damaged)
    with pytest.raises(InputError, match=rf"line 2 has no '{name}', it has \[.*Did you mean '{name}s'\? Add it"):
        read_vnia(path, pictures)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{broken", r"line 2 is not JSON: .* Write one JSON object per line"),
        ("[" * 100_000, "line 2 is not JSON"),
        ("1" * 5_000, "line 2 is not JSON"),
        ("[1]", r"line 2 is \[1\], expected a JSON object with task, answer, pos, neg, image_id"),
    ],
)
def test_broken_lines_come_before_missing_images(tmp_path: Path, content: str, message: str):
    path = tmp_path / "vnia.jsonl"
    path.write_text(f"{json.dumps(row())}\n{content}\n", encoding="utf-8")
    with pytest.raises(InputError, match=rf"vnia\.jsonl, {message}"):
        read_vnia(path, tmp_path)


def test_broken_files_are_named(tmp_path: Path):
    path = tmp_path / "vnia.jsonl"
    for read in (vnia_prompts, lambda path: read_vnia(path, tmp_path)):
        path.unlink(missing_ok=True)
        with pytest.raises(InputError, match=r"no VNIA file .*vnia\.jsonl"):
            read(path)
        path.write_text(" \n")
        with pytest.raises(InputError, match=r"vnia\.jsonl is empty"):
            read(path)
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(InputError, match="not UTF-8"):
            read(path)


def test_prompts_by_row_id(tmp_path: Path, pictures: Path):
    path = write(tmp_path / "vnia.jsonl", row(prompt="Calmly: where? "), row("8_12", prompt="Tensely: where?"))
    prompts = vnia_prompts(path)
    assert prompts == {"000001-7_11": "Calmly: where?", "000002-8_12": "Tensely: where?"}
    assert list(prompts) == [r.id for r in read_vnia(path, pictures)] and vnia_prompts(str(path)) == prompts


def test_prompts_are_in_every_row_or_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"has no 'prompt' on any of its 2 lines\. Give VNIA's evaluation file"):
        vnia_prompts(write(tmp_path / "vnia.jsonl", row(), row()))
    with pytest.raises(InputError, match=r"line 2 has no 'prompt', it has .* Add it"):
        vnia_prompts(write(tmp_path / "vnia.jsonl", row(prompt="p"), row()))
    with pytest.raises(InputError, match="line 2: prompt is ' ', expected a text"):
        vnia_prompts(write(tmp_path / "vnia.jsonl", row(prompt="p"), row(prompt=" ")))


@pytest.fixture(scope="session")
def published(shared: Path) -> tuple[Path, Path]:
    paths = (
        shared / "data" / "vnia" / "evaluation_dataset.jsonl",
        shared / "data" / "vnia" / "validation_dataset.jsonl",
    )
    for path in paths:
        if not path.is_file():
            pytest.skip(f"the shared material has no {path.name}")
    return paths


def stand_ins(folder: Path, path: Path) -> Path:
    """Put an empty file where each picture of a VNIA file would be: reading opens none."""
    folder.mkdir(exist_ok=True)
    for line in path.read_text(encoding="utf-8").splitlines():
        (folder / f"{json.loads(line)['image_id']}.jpg").touch()
    return folder


def test_the_published_rows(published: tuple[Path, Path], tmp_path: Path):
    folder = stand_ins(tmp_path / "images", published[0])
    # Every picture of the validation file is one of the evaluation file's.
    evaluation, validation = (read_vnia(path, folder) for path in published)
    assert (len(evaluation), len(validation)) == (382, 43)
    assert len({r.id for r in evaluation}) == 382 and len({r.image for r in evaluation}) == 326
    assert evaluation[0].id.startswith("000001-") and evaluation[-1].id.startswith("000382-")
    assert not any(set("\u2018\u2019\u201c\u201d") & set(r.p_plus + r.p_minus) for r in evaluation + validation)


def test_the_published_pairs(published: tuple[Path, Path], tmp_path: Path):
    folder = stand_ins(tmp_path / "images", published[0])
    evaluation, validation = (read_vnia(path, folder) for path in published)
    pairs = vnia_pairs(evaluation)
    assert len(pairs) == 74 and len({frozenset(pair) for pair in pairs}) == 42
    assert sum((minus, plus) in pairs for plus, minus in pairs) == 64, "32 pairs stand in both directions, 10 in one"
    assert len(vnia_pairs(validation)) == 31
    assert vnia_pairs(evaluation + validation) == pairs, "validation adds none: one differs in its apostrophe alone"
    # Validation is not held out: each row's picture and pair are in the evaluation file.
    seen = {(r.image, r.p_plus, r.p_minus) for r in evaluation}
    assert len(seen) == 382 and all((r.image, r.p_plus, r.p_minus) in seen for r in validation)


def test_the_published_prompts(published: tuple[Path, Path], tmp_path: Path):
    evaluation, validation = published
    rows = read_vnia(evaluation, stand_ins(tmp_path / "images", evaluation))
    prompts = vnia_prompts(evaluation)
    assert list(prompts) == [r.id for r in rows] and all(prompts.values())
    with pytest.raises(InputError, match="no 'prompt' on any of its 43 lines"):
        vnia_prompts(validation)


@pytest.mark.parametrize("missing", ["error", "skip"])
def test_the_published_file_without_pictures(published: tuple[Path, Path], tmp_path: Path, missing: str):
    with pytest.raises(InputError, match=r"382 of 382 rows have no image .* and 321 more ids\. .*Conceptual Captions"):
        read_vnia(published[0], tmp_path, missing=missing)
