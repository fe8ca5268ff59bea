"""OHD: nine files by source and subset, their published numbers, POPE's scores per source and pooled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from _figures import figure

from steer_plugin.contrast.pope import SUBSETS
from steer_plugin.errors import InputError
from steer_plugin.evaluation.benchmark import asked_rows
from steer_plugin.evaluation.benchmarks import OhdBenchmark
from steer_plugin.evaluation.ohd import PICTURES, QUESTIONS, SOURCES, read_ohd


def write(folder: Path, source: str, pictures: int = 2, each: int = 2) -> None:
    """Write a source's three files, the answers yes and no by turns, and empty pictures."""
    (folder / source).mkdir(parents=True, exist_ok=True)
    for number in range(pictures):
        (folder / source / f"{number}.jpg").touch()
    for subset in SUBSETS:
        rows = [
            {
                "question_id": number + 1,
                "image": f"{number // each}.jpg",
                "text": f"Is there a {subset} thing {number % each} in the imange?",
                "label": "no" if number % 2 else "yes",
            }
            for number in range(pictures * each)
        ]
        path = folder / f"{source}_pope_{subset}.json"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for source in SOURCES:
        write(tmp_path, source)
    return tmp_path


def test_read(folder: Path) -> None:
    items = read_ohd(folder, folder, whole=False)
    assert list(items) == list(SOURCES)
    assert [(item.id, item.subset, item.group, item.label) for item in items["flickr"][:3]] == [
        ("flickr-random-1", "random", "flickr/0.jpg", True),
        ("flickr-random-2", "random", "flickr/0.jpg", False),
        ("flickr-random-3", "random", "flickr/1.jpg", True),
    ]
    assert items["flickr"][0].text == "Is there a random thing 0 in the imange?"
    every = [item for source in items.values() for item in source]
    assert len({item.id for item in every}) == len({item.key for item in every}) == len(every) == 36
    apart = read_ohd(folder, {"nocaps": folder / "coco"}, ["nocaps"], whole=False)
    assert apart["nocaps"][0].pair.images == (folder / "coco" / "0.jpg",)


def test_scores_by_hand(folder: Path) -> None:
    items = read_ohd(folder, folder, whole=False)
    # Yes to everything of coco; the truth on flickr; its opposite on nocaps.
    said = {item.key: "Yes." for item in items["coco"]}
    said |= {item.key: "Yes." if item.label else "No." for item in items["flickr"]}
    said |= {item.key: "No." if item.label else "Yes." for item in items["nocaps"]}
    whole = OhdBenchmark(items)
    for name in SOURCES:
        assert figure(whole, f"{name} accuracy", said) == {"coco": 0.5, "flickr": 1.0, "nocaps": 0.0}[name]
    assert [len(part) for part in items.values()] == [12] * 3 and len(whole.items) == 36
    parts = {**{name: OhdBenchmark({name: part}) for name, part in items.items()}, "all": whole}
    values = {
        name: tuple(figure(part, f"overall {what}", said) for what in ("accuracy", "F1"))
        for name, part in parts.items()
    }
    assert values == {
        "coco": (0.5, pytest.approx(2 / 3)),
        "flickr": (1.0, 1.0),
        "nocaps": (0.0, 0.0),
        # Of 18 yeses 12 are hit, with 12 false ones: 24 / (24 + 12 + 6).
        "all": (0.5, pytest.approx(24 / 42)),
    }
    for subset in SUBSETS:
        asked = asked_rows(whole.values(said, {})[f"{subset} accuracy"])
        assert [item.id.split("-")[1] for item, use in zip(whole.items, asked, strict=True) if use] == [subset] * 12
    only = OhdBenchmark({"coco": [item for item in items["coco"] if item.subset == "random"]})
    assert figure(only, "overall yes-ratio", said) == 1.0


def test_an_item_without_an_answer_is_named(folder: Path) -> None:
    items = read_ohd(folder, folder, ["coco"], whole=False)
    texts = {item.key: "Yes" for item in items["coco"][:-1]}
    with pytest.raises(InputError, match=r"coco-adversarial-4.* has no answer"):
        OhdBenchmark(items).values(texts, {})


@pytest.mark.parametrize(
    ("source", "place"),
    [("coco", "RUCAIBox/POPE"), ("flickr", "Yufang-Liu/clip_hallucination"), ("nocaps", "OHD-Caps")],
)
def test_a_missing_file_is_named_with_its_place(source: str, place: str, folder: Path) -> None:
    (folder / f"{source}_pope_popular.json").unlink()
    with pytest.raises(InputError, match=f"{source}_pope_popular.json.*{place}"):
        read_ohd(folder, folder, whole=False)


def test_a_part_is_refused_unless_asked_for(tmp_path: Path) -> None:
    write(tmp_path, "nocaps", PICTURES, QUESTIONS // PICTURES)
    assert len(read_ohd(tmp_path, tmp_path, ["nocaps"])["nocaps"]) == 3 * QUESTIONS
    path = tmp_path / "nocaps_pope_random.json"
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    with pytest.raises(InputError, match=r"2999 questions, 1500 of them yes, on 500 pictures.*whole=False"):
        read_ohd(tmp_path, tmp_path, ["nocaps"])


def test_damaged_and_unknown(folder: Path) -> None:
    with pytest.raises(InputError, match=r"'flicker'.*Did you mean 'flickr'"):
        read_ohd(folder, folder, ["flicker"])
    with pytest.raises(InputError, match="sources is empty"):
        read_ohd(folder, folder, [])
    with pytest.raises(InputError, match=r"folders for \['coco'\] and none for 'flickr'"):
        read_ohd(folder, {"coco": folder / "coco"}, ["coco", "flickr"], whole=False)
    (folder / "coco" / "1.jpg").unlink()
    with pytest.raises(InputError, match=r"coco-random-3: there is no image .*1\.jpg"):
        read_ohd(folder, folder, ["coco"], whole=False)
    with (folder / "flickr_pope_random.json").open("a", encoding="utf-8") as file:
        file.write('{"question_id": 5, "image"')
    with pytest.raises(InputError, match=r"flickr_pope_random\.json, line 5 is not JSON"):
        read_ohd(folder, folder, ["flickr"], whole=False)


def test_the_published_coco_files_are_whole(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "pope"
    if not folder.is_dir():
        pytest.skip("POPE's files are not beside the project")
    for subset in SUBSETS:
        for line in (folder / f"coco_pope_{subset}.json").read_text(encoding="utf-8").splitlines():
            (tmp_path / json.loads(line)["image"]).touch()
    items = read_ohd(folder, {"coco": tmp_path}, ["coco"])["coco"]
    assert len(items) == 3 * QUESTIONS
    assert {item.subset for item in items} == set(SUBSETS)
