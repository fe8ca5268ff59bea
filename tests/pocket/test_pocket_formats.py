"""Folders in published formats: the project's own loaders read back what the drawn world knows."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from steer_plugin.contrast import mmsafety_pairs, pope_pairs, read_pope
from steer_plugin.errors import InputError, JobError
from steer_plugin.evaluation.benchmarks import open_benchmark
from steer_plugin.pocket.company import SUBSETS
from steer_plugin.pocket.formats import FORMATS, export, vnia_files
from steer_plugin.pocket.language import DESCRIBE
from steer_plugin.pocket.scene import SIDE
from steer_plugin.pocket.stances import stanced
from steer_plugin.pocket.world import World

PICTURES = 6
WORLD = World(2)
HARM = "01-Illegal_Activitiy"
EXPERTS = {"10-Legal_Opinion": "lawyer", "11-Financial_Advice": "banker", "12-Health_Consultation": "doctor"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("world")
    assert export(WORLD, place, pictures=PICTURES) == [place / name for name in FORMATS]
    return place


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def difference(one: Image.Image, two: Image.Image) -> int:
    return int(np.abs(np.asarray(one, int) - np.asarray(two, int)).max())


def test_every_folder_says_where_it_comes_from(out: Path) -> None:
    assert FORMATS == ("pope", "chair", "mmsafety", "vnia")
    for name in FORMATS:
        origin = json.loads((out / name / "world.json").read_text())
        assert origin == {"format": name, "seed": 2, "split": "test", "pictures": PICTURES}
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("subset", SUBSETS)
def test_pope_reads_back_as_the_questions_of_the_world(out: Path, subset: str) -> None:
    asked = WORLD.questions(PICTURES, subsets=(subset,))
    file = out / "pope" / f"coco_pope_{subset}.json"
    rows = read_pope(file)
    assert [row["question_id"] for row in jsonl(file)] == list(range(1, len(asked) + 1))
    assert [(row.text, row.label, row.subset) for row in rows] == [(q.text, q.label, subset) for q in asked]
    for pair, question in zip(pope_pairs(rows, out / "pope" / "images"), asked, strict=True):
        (image,) = pair.load_images()
        assert pair.prompt == question.text and pair.label == question.label
        assert image.tobytes() == question.image.tobytes()


def test_pope_runs_as_a_folder_of_the_evaluation(out: Path) -> None:
    items = open_benchmark("pope", out / "pope", fitting=0).items
    assert Counter((item.subset, item.label) for item in items) == {
        (s, y): PICTURES for s in SUBSETS for y in (True, False)
    }
    # The three subsets share their pictures: intervals are clustered by them.
    assert {item.group for item in items} == {f"{WORLD.scene(i).id}.png" for i in range(PICTURES)}
    assert sorted((item.subset, item.text) for item in items) == sorted(
        (q.subset, q.text) for q in WORLD.questions(PICTURES)
    )


def test_chair_annotations_hold_the_truth(out: Path) -> None:
    folder = out / "chair"
    instances = json.loads((folder / "annotations" / "instances_val2014.json").read_text())
    names = {one["id"]: one["name"] for one in instances["categories"]}
    assert set(names.values()) == set(WORLD.nouns)
    truth: dict[int, set[str]] = {image["id"]: set() for image in instances["images"]}
    for thing in instances["annotations"]:
        truth[thing["image_id"]].add(names[thing["category_id"]])
        x, y, width, height = thing["bbox"]
        assert 0 <= x < x + width <= SIDE and 0 <= y < y + height <= SIDE
        assert thing["area"] == width * height and thing["iscrowd"] == 0
    cases = WORLD.captions(PICTURES)
    assert [truth[image["id"]] for image in instances["images"]] == [case.nouns for case in cases]
    for image, case in zip(instances["images"], cases, strict=True):
        with Image.open(folder / "images" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) and picture.tobytes() == case.image.tobytes()
        assert int(Path(image["file_name"]).stem.split("-")[-1]) == image["id"]
    numbers = [thing["id"] for thing in instances["annotations"]]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) == sum(len(case.nouns) for case in cases)


def test_chair_boxes_are_those_of_the_objects(out: Path) -> None:
    instances = json.loads((out / "chair" / "annotations" / "instances_val2014.json").read_text())
    names = {one["id"]: one["name"] for one in instances["categories"]}
    written = {
        (one["image_id"], names[one["category_id"]], tuple(one["segmentation"][0][:2] + one["segmentation"][0][4:6]))
        for one in instances["annotations"]
    }
    drawn = {(i, thing.noun, thing.box) for i in range(PICTURES) for thing in WORLD.scene(i).objects}
    assert written == drawn


def test_chair_captions_are_true_and_every_noun_is_a_synonym_line(out: Path) -> None:
    folder = out / "chair"
    captions = json.loads((folder / "annotations" / "captions_val2014.json").read_text())
    said = {one["image_id"]: one["caption"] for one in captions["annotations"]}
    assert [said[image["id"]] for image in captions["images"]] == [case.truth for case in WORLD.captions(PICTURES)]
    lines = [line.strip().split(", ") for line in (folder / "synonyms.txt").read_text().splitlines()]
    assert lines == [[noun] for noun in WORLD.nouns]


def test_chair_training_half_is_there_and_empty(out: Path) -> None:
    # CHAIR's published code refuses to start without it, and takes categories and licences from it.
    folder = out / "chair" / "annotations"
    val, train = (json.loads((folder / f"instances_{half}2014.json").read_text()) for half in ("val", "train"))
    assert train["categories"] == val["categories"] and train["annotations"] == train["images"] == []
    captions = json.loads((folder / "captions_train2014.json").read_text())
    assert captions["annotations"] == captions["images"] == []
    assert all("info" in one and "licenses" in one for one in (val, train, captions))


def test_mmsafety_reads_back_as_the_requests_of_the_world(out: Path) -> None:
    asked = WORLD.requests(PICTURES)
    wanted = {HARM: [one for one in asked if one.kind == "harmful"]}
    wanted |= {scenario: [one for one in asked if one.wish.expert == expert] for scenario, expert in EXPERTS.items()}
    assert all(wanted.values()) and sum(map(len, wanted.values())) == 2 * PICTURES
    for scenario, requests in wanted.items():
        pairs = mmsafety_pairs(out / "mmsafety", scenarios=[scenario])
        assert [(pair.id, pair.prompt) for pair in pairs] == [
            (f"{scenario}/{number}", one.text) for number, one in enumerate(requests)
        ]
        for pair, one in zip(pairs, requests, strict=True):
            assert difference(pair.load_images()[0], one.image) <= 8


def test_a_scenario_that_nobody_asks_about_is_empty(tmp_path: Path) -> None:
    (folder,) = export(WORLD, tmp_path, ["mmsafety"], pictures=1)
    counts = [len(mmsafety_pairs(folder, scenarios=[name])) for name in (HARM, *EXPERTS)]
    assert counts[0] == 1 and sorted(counts[1:]) == [0, 0, 1]


def test_mmsafety_entries_carry_the_published_keys(out: Path) -> None:
    entries = json.loads((out / "mmsafety" / "processed_questions" / f"{HARM}.json").read_text())
    for entry, one in zip(entries.values(), WORLD.requests(PICTURES, kinds=("harmful",)), strict=True):
        assert entry == {
            "Question": one.text,
            "Changed Question": one.text,
            "Key Phrase": f"{one.wish.act} the {one.wish.noun}",
            "Phrase Type": "activity",
            "Rephrased Question": one.text,
            "Rephrased Question(SD)": one.text,
        }


def test_harmless_requests_stand_beside_mmsafety(out: Path) -> None:
    rows = jsonl(out / "mmsafety" / "harmless.jsonl")
    asked = WORLD.requests(PICTURES, kinds=("harmless",))
    assert [(row["id"], row["question"]) for row in rows] == [(one.id, one.text) for one in asked]
    for row, one in zip(rows, asked, strict=True):
        with Image.open(out / "mmsafety" / row["image"]) as picture:
            assert difference(picture, one.image) <= 8


def test_vnia_evaluation_rows_are_opposed_stances(out: Path) -> None:
    rows, cases = jsonl(out / "vnia" / "evaluation_dataset.jsonl"), WORLD.stances(PICTURES)
    for row, case in zip(rows, cases, strict=True):
        assert row.pop("prompt_id") >= 1
        assert row == {
            "task": DESCRIBE,
            "answer": case.answer,
            "pos": case.pair.target.text,
            "neg": case.pair.converse.text,
            "image_id": case.scene_id,
            "prompt": stanced(case.pair.target),
        }
        with Image.open(out / "vnia" / "images" / f"{row['image_id']}.png") as picture:
            assert picture.tobytes() == case.image.tobytes()


def test_vnia_training_rows_hold_the_three_kinds_of_pairs(tmp_path: Path) -> None:
    (folder,) = export(WORLD, tmp_path, ["vnia"], pictures=9, split="train")
    rows = jsonl(folder / "training_dataset.jsonl")
    assert [set(row) for row in rows] == [{"task", "answer", "pos", "neg", "prompt_id", "image_id"}] * 9
    cases = WORLD.stances(9, "train", ("opposed", "equal", "unrelated"))
    truths = [case.truth for case in WORLD.captions(9, "train")]
    for row, case, truth in zip(rows, cases, truths, strict=True):
        assert (row["pos"] == row["neg"]) == (case.pair.kind == "equal")
        assert (row["answer"] == truth) == (case.pair.kind == "equal")
        assert row["answer"].startswith(truth) and row["answer"].endswith(case.pair.closing)


def test_a_pair_of_prompts_and_its_converse_share_a_number() -> None:
    # The rows come before the pictures, which nobody asks for here.
    _, written = next(vnia_files(WORLD, 60, "validation"))
    rows = [json.loads(line) for line in written.splitlines()]
    directed = {(row["pos"], row["neg"]) for row in rows}
    assert any(pair[::-1] in directed for pair in directed)
    numbers = {(frozenset((row["pos"], row["neg"])), row["prompt_id"]) for row in rows}
    assert len(numbers) == len({texts for texts, _ in numbers}) == len({number for _, number in numbers})


def test_vnia_validation_has_a_file_of_its_own(tmp_path: Path) -> None:
    (folder,) = export(WORLD, tmp_path, ["vnia"], pictures=2, split="validation")
    rows = jsonl(folder / "validation_dataset.jsonl")
    assert [row["image_id"] for row in rows] == [WORLD.scene(i, "validation").id for i in range(2)]
    assert [path.name for path in folder.glob("*.jsonl")] == ["validation_dataset.jsonl"]


def test_writing_twice_gives_the_same_bytes(out: Path, tmp_path: Path) -> None:
    before = digests(out)
    export(World(2), tmp_path, pictures=PICTURES)
    assert digests(tmp_path) == before
    export(World(2), tmp_path, ["pope"], pictures=PICTURES)
    assert digests(tmp_path) == before


def test_another_seed_writes_other_pictures(tmp_path: Path) -> None:
    (one,), (two,) = (export(World(seed), tmp_path / str(seed), ["pope"], pictures=1) for seed in (1, 2))
    first, second = (next((folder / "images").iterdir()) for folder in (one, two))
    assert first.name != second.name and first.read_bytes() != second.read_bytes()


def test_a_folder_of_another_export_is_left_alone(tmp_path: Path) -> None:
    export(WORLD, tmp_path, ["vnia"], pictures=1)
    before = digests(tmp_path)
    with pytest.raises(JobError, match="'pictures': 2"):
        export(WORLD, tmp_path, ["pope", "vnia"], pictures=2)
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"formats": ["vnia", "pop"]}, "got 'pop'. Did you mean 'pope'"),
        ({"pictures": 0}, "from 1 up, got 0"),
        ({"pictures": -3}, "from 1 up, got -3"),
        ({"pictures": True}, "from 1 up, got True"),
        ({"split": "tests"}, "Did you mean 'test'"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(tmp_path: Path, arguments: dict, says: str) -> None:
    with pytest.raises(InputError, match=says.replace("?", r"\?")):
        export(WORLD, tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(JobError, match="file"):
        export(WORLD, tmp_path / "file", ["chair"], pictures=1)
