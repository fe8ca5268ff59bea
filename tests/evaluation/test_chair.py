"""CHAIR by hand: every rule of reading captions, truth from COCO's layout, the three scores, damaged files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from _figures import PICTURE
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from steer_plugin.errors import FrameworkError, InputError
from steer_plugin.evaluation import synonyms as reading
from steer_plugin.evaluation.benchmarks import ChairBenchmark
from steer_plugin.evaluation.chair import ChairRow, Synonyms, Truth, chair, objects_in
from steer_plugin.evaluation.comparing import gap
from steer_plugin.evaluation.intervals import Interval
from steer_plugin.pocket.evaluation import chair as pocket_chair
from steer_plugin.pocket.formats import export
from steer_plugin.pocket.world import World

Values = dict[str, NDArray[np.float64]]
needs_inflect = pytest.importorskip("inflect", reason="inflect is not installed")

LINES = """\
person, man, child, children, people, baby, adult, passenger
airplane, jet
train
bird, duck
cat, kitten
dog, puppy
bear
cow, calf
chair, seat
toilet
tie, bow, bow tie
sports ball, ball
hot dog
wine glass
skis, ski
motorcycle,  motor bike
cell phone, iPhone
dining table, table
oven, stove, stove top oven
bus
sheep
scissors
"""


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Synonyms:
    path = tmp_path_factory.mktemp("synonyms") / "synonyms.txt"
    path.write_text(LINES, encoding="utf-8")
    return Synonyms.read(path)


def names(caption: str, known: Synonyms) -> list[str]:
    return [mention.name for mention in objects_in(caption, known)]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        # Synonyms, repeats and order.
        ("A puppy chases a dog past a kitten.", ["dog", "dog", "cat"]),
        ("CATS and Dogs", ["cat", "dog"]),
        # Plurals, regular, irregular, and words that are their own.
        ("two cats, three puppies, men and women", ["cat", "dog", "person"]),
        ("calves, buses, sheep, knives", ["cow", "bus", "sheep"]),
        ("children and people", ["person", "person"]),
        ("a pair of skis, one ski, scissors", ["skis", "skis", "scissors"]),
        ("a bus on the grass", ["bus"]),
        # Names of several words, in the plural too.
        ("hot dogs on the dining table", ["hot dog", "dining table"]),
        ("wine glasses, but no glasses", ["wine glass"]),
        ("a sports ball and a ball", ["sports ball", "sports ball"]),
        ("a motor bike", ["motorcycle"]),
        ("a stove top oven", ["oven"]),
        ("My IPHONE", ["cell phone"]),
        # A mark or a break between two words parts them, a line's end does not.
        ("it is hot. dog", ["dog"]),
        ("a hot, dog", ["dog"]),
        ("a hot\ndog", ["hot dog"]),
        # Rules: the young of animals, vehicles for passengers, seats of toilets, ties, bases and tracks.
        ("a baby bird beside an adult cow and baby elephants", ["bird", "cow"]),
        ("a baby animal", []),
        ("a baby and a bird", ["person", "bird"]),
        ("passenger trains and a passenger jet", ["train", "airplane"]),
        ("a passenger on the train", ["person", "train"]),
        ("a toilet seat", ["toilet"]),
        ("the toilet has a white seat, beside a chair", ["toilet", "chair"]),
        ("the seats", ["chair"]),
        ("a bow tie", ["tie"]),
        ("train tracks without a train", ["train"]),
        ("home plate", []),
        # No words, unknown words, words within words.
        ("", []),
        (" \n", []),
        ("...!?", []),
        ("a unicorn catalogue, a cat-shaped cushion, doghouse", []),
        ("the dog's bowl; the cat\u2019s tail", ["dog", "cat"]),
        ("dog/cat", ["dog", "cat"]),
        ("12 dogs, 3s, naïve 猫 cat", ["dog", "cat"]),
    ],
)
def test_objects_in(caption: str, expected: list[str], known: Synonyms) -> None:
    assert names(caption, known) == expected


def test_a_mention_says_where_it_stands(known: Synonyms) -> None:
    caption = "Some Baby  Birds eat hot dogs."
    found = objects_in(caption, known)
    assert [(one.name, one.word, caption[one.start : one.end]) for one in found] == [
        ("bird", "bird", "Baby  Birds"),
        ("hot dog", "hot dog", "hot dogs"),
    ]


def test_names_of_the_list_go_before_the_rules() -> None:
    own = Synonyms({"train": "train", "train track": "rails", "baby bird": "chick", "bird": "bird", "t-shirt": "shirt"})
    assert names("a train track, a baby bird, an adult bird, T-shirts", own) == ["rails", "chick", "bird", "shirt"]
    assert names("a toilet seat", own) == []


@given(st.text())
def test_any_text_can_be_read(text: str) -> None:
    own = Synonyms({"dog": "dog", "hot dog": "hot dog"})
    for mention in objects_in(text, own):
        assert "dog" in text[mention.start : mention.end].lower()


def test_the_published_list(shared: Path) -> None:
    path = shared / "data" / "chair_synonyms.txt"
    if not path.is_file():
        pytest.skip("the published synonyms are not beside the project")
    published = Synonyms.read(path)
    assert len(set(published.names.values())) == 80
    # The authors' pairs that are no rule of ours are names of their own list.
    pairs = """motor bike, motor cycle, air plane, traffic light, street light, traffic signal, stop light,
        fire hydrant, stop sign, parking meter, suit case, sports ball, baseball bat, baseball glove, tennis racket,
        wine glass, hot dog, cell phone, mobile phone, teddy bear, hair drier, potted plant, bow tie, laptop computer"""
    for pair in (" ".join(pair.split()) for pair in pairs.split(",")):
        assert [one.word for one in objects_in(f"the {plural(pair)}", published)] == [pair]
    # Every canonical name is found again, alone and as a plural.
    for name in set(published.names.values()):
        several = name if name in ("skis", "scissors") else plural(name)
        assert names(f"a {name}.", published) == names(f"two {several} here", published) == [name]
    caption = "A man and two women ride bikes past a street light; puppies, teddy bears and three couches."
    assert ", ".join(names(caption, published)) == "person, person, bicycle, traffic light, dog, teddy bear, couch"


def plural(name: str) -> str:
    found = needs_inflect.engine().plural_noun(name)
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no synonyms.*LisaAnne/Hallucination"),
        (" \n\n", "has no synonyms"),
        ("cat, kitten\ndog,, puppy\n", "line 2: a name is empty"),
        ("cat, kitten\ndog, Kitten\n", "line 2: 'kitten' is a name of 'cat' too"),
        (b"\xff\xfe\x00", "is not UTF-8"),
    ],
)
def test_damaged_synonyms(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "synonyms.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        Synonyms.read(path)


def test_missing_synonyms_are_named_with_their_place(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.txt.*data/synonyms\.txt in github\.com/LisaAnne/Hallucination"):
        Synonyms.read(tmp_path / "none.txt")


@pytest.fixture
def without_inflect(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    reading._singulars.cache_clear()
    monkeypatch.setitem(sys.modules, "inflect", None)
    yield
    reading._singulars.cache_clear()


@pytest.mark.usefixtures("without_inflect")
def test_without_inflect_the_extra_is_named(known: Synonyms) -> None:
    with pytest.raises(FrameworkError, match=r"steer-plugin\[eval\]"):
        objects_in("a dog", known)


# Three pictures: 1 has a cat and (by its captions) a person, 2 a dog, 3 nothing.
def test_by_hand(known: Synonyms) -> None:
    truth = Truth.from_objects({1: ["kitten", "person"], 2: ["dog"], 3: []}, known)
    found = chair({1: "A dog and a man with a dog.", 2: "", 3: "A cat?"}, truth)
    assert found.rows == (
        ChairRow(1, ("dog", "person", "dog"), ("dog", "dog"), ("person",), ("cat",)),
        ChairRow(2, (), (), (), ("dog",)),
        ChairRow(3, ("cat",), ("cat",), (), ()),
    )
    assert (found.chair_s, found.chair_i, found.recall) == (2 / 3, 3 / 4, 1 / 3)
    intervals = found.intervals(seed=0, resamples=200)
    assert {name: interval.value for name, interval in intervals.items()} == {
        "chair_s": pytest.approx(2 / 3),
        "chair_i": 3 / 4,
        "recall": pytest.approx(1 / 3),
    }
    assert all(one.low <= one.value <= one.high for one in intervals.values())


def test_no_mention_and_no_object_score_zero(known: Synonyms) -> None:
    found = chair({"a": "nothing"}, Truth.from_objects({"a": []}, known))
    assert (found.chair_s, found.chair_i, found.recall) == (0.0, 0.0, 0.0)
    with pytest.raises(InputError, match="at least two pictures"):
        found.intervals(seed=0)


def test_differences_are_paired_whatever_the_order(known: Synonyms) -> None:
    benchmark = ChairBenchmark(
        dict.fromkeys("123", PICTURE), Truth.from_objects({1: ["cat"], 2: ["dog"], 3: ["bus"]}, known)
    )
    keys = {item.id: item.key for item in benchmark.items}
    first = {keys["1"]: "a cat", keys["2"]: "a cat", keys["3"]: "a bus"}
    second = {keys["3"]: "a bus", keys["2"]: "a dog", keys["1"]: "a cat"}
    runs = [benchmark.values(said, {}) for said in (first, second)]

    def differences(other: Values) -> dict[str, Interval]:
        return {
            name: gap(benchmark.metric(name), benchmark.groups, [runs[0]], [other], seed=0)[0]
            for name in ("CHAIR_s", "CHAIR_i", "recall")
        }

    assert {name: pytest.approx(one.value) for name, one in differences(runs[1]).items()} == {
        "CHAIR_s": 1 / 3,
        "CHAIR_i": 1 / 3,
        "recall": -1 / 3,
    }
    assert all(one.value == one.low == one.high == 0 for one in differences(runs[0]).values())
    with pytest.raises(InputError, match=r"'2' .* has no answer"):
        benchmark.values({keys["1"]: "a cat"}, {})


def test_bad_captions(known: Synonyms) -> None:
    truth = Truth.from_objects({42: ["cat"]}, known)
    assert chair({"000042": "a cat"}, truth).recall == 1
    with pytest.raises(InputError, match="0 captions"):
        chair({}, truth)
    with pytest.raises(InputError, match=r"Picture 7 is not among the 1 .*\(42"):
        chair({7: "a cat"}, truth)
    with pytest.raises(InputError, match="2 captions of 1 pictures"):
        chair({"42": "a cat", "042": "a cat"}, truth)
    with pytest.raises(InputError, match=r"picture 1: 'kiten' .*'kitten'"):
        Truth.from_objects({1: ["kiten"]}, known)


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def coco(folder: Path, half: str, first: int) -> tuple[Path, Path]:
    """Write one half: picture `first` has a cat (a crowd too) and two captions, the next a caption, a third nothing."""
    images = [{"id": first + k, "file_name": f"COCO_{half}_{first + k:012d}.jpg", "width": 9} for k in range(3)]
    outline = {"segmentation": [[1.5, 2.0, 3.0]], "bbox": [0, 0, 1, 1], "iscrowd": 0}
    crowd = {"segmentation": {"counts": [1, 2], "size": [3, 3]}, "iscrowd": 1}
    instances = {
        "images": images,
        "categories": [{"id": 17, "name": "cat", "supercategory": "animal"}, {"id": 1, "name": "person"}],
        "annotations": [
            {"id": 1, "image_id": first, "category_id": 17, **outline},
            {"id": 2, "image_id": first, "category_id": 1, **crowd},
        ],
    }
    spoken = [(first, "A kitten."), (first, "Two puppies play."), (first + 1, "a unicorn")]
    captions = {
        "images": images,
        "annotations": [{"id": k, "image_id": image, "caption": text} for k, (image, text) in enumerate(spoken)],
    }
    return write(folder / f"instances_{half}.json", instances), write(folder / f"captions_{half}.json", captions)


def test_truth_of_coco(tmp_path: Path, known: Synonyms) -> None:
    instances, captions = coco(tmp_path, "val2014", 40)
    truth = Truth.from_coco(instances, captions, known)
    assert truth.objects == {"40": {"cat", "person", "dog"}, "41": set(), "42": set()}
    found = chair({40: "a cat", "COCO_val2014_000000000041.jpg": "a cat"}, truth)
    assert (found.chair_s, found.chair_i, found.recall) == (0.5, 0.5, 1 / 3)
    halves = [coco(tmp_path, "val2014", 40), coco(tmp_path, "train2014", 50)]
    both = Truth.from_coco([half[0] for half in halves], [half[1] for half in halves], known)
    assert list(both.objects) == ["40", "41", "42", "50", "51", "52"]
    assert both.objects["50"] == {"cat", "person", "dog"}


def test_damaged_coco(tmp_path: Path, known: Synonyms) -> None:
    instances, captions = coco(tmp_path, "val2014", 40)
    with pytest.raises(InputError, match=r"none\.json.*cocodataset\.org"):
        Truth.from_coco(tmp_path / "none.json", captions, known)
    with pytest.raises(InputError, match=r"no list 'categories'.*swapped"):
        Truth.from_coco(captions, instances, known)
    with pytest.raises(InputError, match="'person' is not among the synonyms"):
        Truth.from_coco(instances, captions, Synonyms({"cat": "cat"}))
    truncated = tmp_path / "truncated.json"
    truncated.write_bytes(instances.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"truncated\.json is damaged"):
        Truth.from_coco(truncated, captions, known)
    truncated.write_bytes(b"\xff{}")
    with pytest.raises(InputError, match="is damaged"):
        Truth.from_coco(truncated, captions, known)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds a list"),
        ({"annotations": []}, "no list 'images'"),
        ({"images": [], "annotations": [7]}, r"annotations\[0\] is 7"),
        ({"images": [], "annotations": [{"image_id": 1}]}, r"annotations\[0\]: caption is None"),
        ({"images": [], "annotations": [{"image_id": True, "caption": "a"}]}, r"image_id is True"),
        ({"images": [{"file_name": "a.jpg"}], "annotations": []}, r"images\[0\]: id is None"),
    ],
)
def test_damaged_captions(content: object, message: str, tmp_path: Path, known: Synonyms) -> None:
    instances, _ = coco(tmp_path, "val2014", 40)
    with pytest.raises(InputError, match=message):
        Truth.from_coco(instances, write(tmp_path / "captions.json", content), known)


def test_unknown_category(tmp_path: Path, known: Synonyms) -> None:
    instances, captions = coco(tmp_path, "val2014", 40)
    content = json.loads(instances.read_text(encoding="utf-8"))
    content["annotations"][1]["category_id"] = 99
    with pytest.raises(InputError, match=r"annotations\[1\]: category_id 99"):
        Truth.from_coco(write(instances, content), captions, known)


def test_the_pocket_world_exports_what_this_reads(tmp_path: Path) -> None:
    world, pictures = World(2), 6
    (folder,) = export(world, tmp_path, ["chair"], pictures=pictures)
    annotations = folder / "annotations"
    truth = Truth.from_coco(
        [annotations / f"instances_{half}2014.json" for half in ("val", "train")],
        [annotations / f"captions_{half}2014.json" for half in ("val", "train")],
        Synonyms.read(folder / "synonyms.txt"),
    )
    cases = world.captions(pictures, "test")
    assert [truth.objects[str(k)] for k in range(pictures)] == [set(case.nouns) for case in cases]
    # One picture's caption read for the next: both ways of counting agree.
    spoken = [cases[k - 1].truth for k in range(pictures)]
    found = chair({f"{case.scene_id}.png": text for case, text in zip(cases, spoken, strict=True)}, truth)
    assert found.chair_s > 0
    assert {"chair_i": found.chair_i, "chair_s": found.chair_s, "recall": found.recall} == pocket_chair(
        spoken, [case.nouns for case in cases]
    )
