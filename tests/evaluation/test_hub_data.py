"""Tables of the Hub as questions and pairs, answers of a run as a table; all of it local."""

from __future__ import annotations

import json
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import steer_plugin as sp
from steer_plugin.errors import FrameworkError, InputError
from steer_plugin.evaluation.answers import Answer, AnswerLog
from steer_plugin.evaluation.hub_data import answers_dataset, mmsafety_pairs_from, pope_items_from
from steer_plugin.evaluation.pope import read_items

datasets: Any = pytest.importorskip("datasets")

RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (4, 3), colour)


def encoded(colour: tuple[int, int, int]) -> dict[str, Any]:
    buffer = BytesIO()
    picture(colour).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def pope_rows() -> list[dict[str, Any]]:
    """Return rows as lmms-lab/POPE has them: numbers as texts, the picture in each row."""
    rows = [
        ("1", "Is there a dog in the image?", "yes", "COCO_val2014_000000000001", RED, "adversarial"),
        ("2", "Is there a cat in the image?", "no", "COCO_val2014_000000000001", RED, "adversarial"),
        ("1", "Is there a dog in the image?", "yes", "COCO_val2014_000000000001", RED, "popular"),
        ("2", "Is there a cup in the image?", "no", "COCO_val2014_000000000002", BLUE, "popular"),
    ]
    return [
        {
            "id": str(number), "question_id": question, "question": text, "answer": answer, "image_source": source,
            "image": picture(colour), "category": category,
        }
        for number, (question, text, answer, source, colour, category) in enumerate(rows)
    ]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> Any:
    names = [name for name in rows[0] if name != "image"]
    features = {name: datasets.Value("string") for name in names}
    return datasets.Dataset.from_list(rows, features=datasets.Features({**features, "image": datasets.Image()}))


def check_pope(items: list[Any]) -> None:
    assert [(item.id, item.subset, item.group, item.label, item.text) for item in items] == [
        ("adversarial-1", "adversarial", "COCO_val2014_000000000001", True, "Is there a dog in the image?"),
        ("adversarial-2", "adversarial", "COCO_val2014_000000000001", False, "Is there a cat in the image?"),
        ("popular-1", "popular", "COCO_val2014_000000000001", True, "Is there a dog in the image?"),
        ("popular-2", "popular", "COCO_val2014_000000000002", False, "Is there a cup in the image?"),
    ]
    assert [item.load_images()[0].getpixel((0, 0)) for item in items] == [RED, RED, RED, BLUE]
    assert (items[0].pair.positive, items[1].pair.positive) == ("Yes, the image", "No, the image")
    # Asked once: the same picture and question in two subsets.
    assert items[0].key == items[2].key and len({item.key for item in items}) == 3
    assert items[0].pair.images[0] is items[2].pair.images[0]


def test_pope_from_a_table() -> None:
    check_pope(pope_items_from(table(pope_rows())))


@pytest.mark.parametrize("place", ["file", "folder", "disk"])
def test_pope_from_a_path(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows, folder = pope_rows(), tmp_path / "pope"
    folder.mkdir()
    if place == "disk":
        table(rows).save_to_disk(str(folder))
    elif place == "file":
        folder = tmp_path / "pope.parquet"
        table(rows).to_parquet(str(folder))
    else:
        for number in range(2):
            table(rows[2 * number : 2 * number + 2]).to_parquet(str(folder / f"test-0000{number}-of-00002.parquet"))
    check_pope(pope_items_from(folder if place != "file" else str(folder)))


def test_a_table_whose_pictures_have_no_type() -> None:
    """A parquet file that pandas wrote keeps no features: the picture is a plain {bytes, path}."""
    rows = [{**row, "image": encoded(RED if "1" in row["image_source"][-1] else BLUE)} for row in pope_rows()]
    check_pope(pope_items_from(datasets.Dataset.from_list(rows)))


def test_pictures_are_decoded_when_asked_for() -> None:
    (image,) = pope_items_from(table(pope_rows()))[0].pair.images
    assert isinstance(image, Image.Image) and getattr(image, "_im", None) is None  # PIL's pixels, once they are read
    assert image.convert("RGB").getpixel((0, 0)) == RED


def test_the_table_says_what_the_published_files_say(tmp_path: Path) -> None:
    """The same questions in POPE's own layout and in the Hub's."""
    sp.pocket.export(sp.pocket.World(0), tmp_path, ["pope"], pictures=3)
    own = read_items(next(tmp_path.rglob("*pope_popular.json")), next(tmp_path.rglob("images")))
    rows = [
        {
            "id": str(k), "question_id": item.id.removeprefix("popular-"), "question": item.text, "category": "popular",
            "answer": "yes" if item.label else "no", "image_source": item.group, "image": item.load_images()[0],
        }
        for k, item in enumerate(own)
    ]  # fmt: skip
    found = pope_items_from(table(rows))
    assert [(item.id, item.key, item.label, item.subset) for item in found] == [
        (item.id, item.key, item.label, item.subset) for item in own
    ]
    assert [i.load_images()[0].tobytes() for i in found] == [i.load_images()[0].tobytes() for i in own]


def test_bad_tables_are_refused(tmp_path: Path) -> None:
    rows = pope_rows()
    whole = table(rows)
    lost = table([*rows, {**rows[0], "question_id": "9", "image_source": "none", "image": None}])
    broken = datasets.Dataset.from_list([{**rows[0], "image": {"bytes": b"no picture", "path": None}}])
    for bad, message in (
        (whole.rename_column("category", "categories"), r"no column 'category', it has .*Did you mean 'categories'"),
        (whole.remove_columns("image"), "no column 'image', it has"),
        (table([{**rows[0], "answer": "perhaps"}]), "row 0: label is 'perhaps', expected 'yes' or 'no'"),
        (table([*rows, rows[1]]), "'adversarial-2' comes 2 times"),
        (whole.select([]), "no rows"),
        (lost, "row 4 has no picture that can be opened"),
        (broken, "row 0 has no picture that can be opened"),
        (datasets.DatasetDict({"test": whole}), r"is a DatasetDict.*Its splits are \['test'\]: give one"),
        (rows, "the table is a list: expected a datasets.Dataset or a path"),
        (tmp_path, "is no table: expected a parquet file"),
        (tmp_path / "lmms-lab/POPE", "is no table.*datasets.load_dataset"),
    ):
        with pytest.raises(InputError, match=message):
            pope_items_from(bad)
    datasets.DatasetDict({"test": whole}).save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(InputError, match=r"Its splits are \['test'\]"):
        pope_items_from(tmp_path / "dict")


def test_mmsafety() -> None:
    rows = [{"id": str(k), "question": f" Question {k}? ", "image": picture(RED)} for k in range(2)]
    for name in ("Legal_Opinion", "10-Legal_Opinion", "10"):
        pairs = mmsafety_pairs_from(table(rows), name)
        assert [(pair.id, pair.prompt) for pair in pairs] == [
            ("10-Legal_Opinion/0", "Question 0?"),
            ("10-Legal_Opinion/1", "Question 1?"),
        ]
        assert {(pair.positive, pair.negative, pair.behaviour) for pair in pairs} == {("Expert", "AI", "expert")}
    assert mmsafety_pairs_from(table(rows), "10", "qwen")[0].positive == "Consult"
    assert mmsafety_pairs_from(table(rows), "Illegal_Activitiy")[0].load_images()[0].getpixel((0, 0)) == RED
    with pytest.raises(InputError, match="Scenario 'Law' is unknown"):
        mmsafety_pairs_from(table(rows), "Law")
    with pytest.raises(InputError, match="no column 'question'"):
        mmsafety_pairs_from(table(rows).remove_columns("question"), "10")
    with pytest.raises(InputError, match="row 0 has no picture"):  # the table called Text_only
        mmsafety_pairs_from(table([{**rows[0], "image": None}]), "10")


def test_answers_of_a_run(tmp_path: Path) -> None:
    AnswerLog(tmp_path / "answers" / "none.jsonl", {"a": 1}).add(["q1", "q2"], [Answer("yes", (5, 2)), Answer("", ())])
    AnswerLog(tmp_path / "answers" / "deep" / "l2s.jsonl", {"a": 2}).add(["q1"], [Answer("no", (6, 2))])
    found = answers_dataset(tmp_path)
    assert found.to_list() == [
        {"method": "deep/l2s", "id": "q1", "answer": "no", "tokens": [6, 2]},
        {"method": "none", "id": "q1", "answer": "yes", "tokens": [5, 2]},
        {"method": "none", "id": "q2", "answer": "", "tokens": []},
    ]
    alone = answers_dataset(str(tmp_path / "answers" / "none.jsonl"))
    assert alone["method"][:] == ["none", "none"] and alone["answer"][:] == ["yes", ""]


def test_answers_keep_every_field(tmp_path: Path) -> None:
    lines = [{"job": {}}, {"id": "a", "answer": "x"}, {"id": "b", "answer": "y", "seconds": 0.5}]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found = answers_dataset(tmp_path)
    assert found.column_names == ["method", "id", "answer", "seconds"] and found["seconds"][:] == [None, 0.5]


def test_bad_answers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no answers"):
        answers_dataset(tmp_path)
    path = tmp_path / "one.jsonl"
    for second, message in (("{half", "line 2 is not JSON"), ('{"id": "a"}', "line 2 is .*expected an object with id")):
        path.write_text(f'{{"job": {{}}}}\n{second}\n', encoding="utf-8")
        with pytest.raises(InputError, match=message):
            answers_dataset(path)


def test_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FrameworkError, match=r"pip install 'steer-plugin\[data\]'"):
        pope_items_from("anything")
