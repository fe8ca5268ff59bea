"""CHAIR, MM-SafetyBench and VNIA as benchmarks: known answers by hand and by a second source, splits, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from _figures import PICTURE, figure

from steer_plugin.atomic import JSON
from steer_plugin.contrast import ContrastivePair, SteeringRow
from steer_plugin.contrast.mmsafety import SCENARIOS, mmsafety_split
from steer_plugin.errors import InputError
from steer_plugin.evaluation.benchmark import Benchmark, Texts, Training
from steer_plugin.evaluation.benchmarks import (
    ChairBenchmark,
    MmSafetyBenchmark,
    VniaBenchmark,
    open_benchmark,
)
from steer_plugin.evaluation.benchmarks.mmsafety import GROUPS
from steer_plugin.evaluation.chair import Synonyms, Truth, chair
from steer_plugin.evaluation.judges import STANCE, Judge, Judged, OpenAIJudge, Verdict, verdicts
from steer_plugin.pocket import World, export


class Told:
    """A judge that looks its scores up: by answer, or by what the answer is held against."""

    batch_size = 8

    def __init__(self, scores: Mapping[str, float], name: str, settings: Mapping[str, JSON] | None = None) -> None:
        self.scores, self.name, self._settings = scores, name, dict(settings or {})

    def settings(self) -> Mapping[str, JSON]:
        return self._settings

    def judge(self, items: Sequence[Judged]) -> list[Verdict]:
        found = [str(item.extras.get("target", item.answer)) for item in items]
        return [Verdict(item.id, float(self.scores[one]), one, "") for item, one in zip(items, found, strict=True)]


def asked(benchmark: Benchmark, texts: Texts) -> dict[str, list[Verdict]]:
    """Ask every judge of a benchmark."""
    return {judge.name: verdicts(judge, benchmark.judged(judge, texts), progress=False) for judge in benchmark.judges}


# CHAIR


@pytest.fixture
def truth() -> Truth:
    pytest.importorskip("inflect", reason="inflect is not installed")
    synonyms = Synonyms({"dog": "dog", "puppy": "dog", "cat": "cat", "car": "car", "cup": "cup"})
    return Truth.from_objects({"1": ["dog", "cat"], "2": ["car"], "3": []}, synonyms)


def test_chair_by_hand(truth: Truth) -> None:
    benchmark = ChairBenchmark({"1": PICTURE, "2": PICTURE, "3": PICTURE}, truth, text="Say what is there.")
    said = {"1": "A dog, a puppy and a cup.", "2": "A car.", "3": ""}
    texts = {item.key: said[item.id] for item in benchmark.items}
    # Mentions: dog, dog, cup (false), car. True objects: dog (found), cat (missed), car (found).
    expected = {
        "CHAIR_s": 1 / 3, "CHAIR_i": 1 / 4, "recall": 2 / 3, "F1": (4 / 7 + 1 + 0) / 3,
        "objects per caption": 4 / 3, "words per caption": 9 / 3,
    }  # fmt: skip
    assert [metric.name for metric in benchmark.metrics] == list(expected)
    assert {name: figure(benchmark, name, texts) for name in expected} == pytest.approx(expected)
    assert [metric.better for metric in benchmark.metrics] == [
        "lower",
        "lower",
        "higher",
        "higher",
        "neither",
        "neither",
    ]
    assert benchmark.behaviour(texts) == pytest.approx([4 / 7, 1, 0])
    assert benchmark.headline == "CHAIR_i" and benchmark.items[0].text == "Say what is there."
    with pytest.raises(InputError, match=r"chair: '1' .* has no answer"):
        benchmark.values({}, {})


def test_chair_on_the_drawn_world(tmp_path: Path) -> None:
    pytest.importorskip("inflect", reason="inflect is not installed")
    world = World(0)
    (folder,) = export(world, tmp_path, ["chair"], pictures=12)
    benchmark = open_benchmark("chair", folder)
    assert isinstance(benchmark, ChairBenchmark)
    assert [item.id for item in benchmark.items] == sorted(path.name for path in (folder / "images").iterdir())
    cases = {f"{case.scene_id}.png": case for case in world.captions(12)}
    right = {item.key: cases[item.id].truth for item in benchmark.items}
    assert figure(benchmark, "CHAIR_s", right) == 0.0
    # A second source: chair() on the captions of the next picture.
    names = list(cases)
    said = {item.key: cases[names[(names.index(item.id) + 1) % 12]].truth for item in benchmark.items}
    scored = chair({item.id: said[item.key] for item in benchmark.items}, benchmark.truth)
    assert 0 < scored.chair_i < 1
    for name, value in (("CHAIR_s", scored.chair_s), ("CHAIR_i", scored.chair_i), ("recall", scored.recall)):
        assert figure(benchmark, name, said) == pytest.approx(value)


def test_chair_draws_pictures_by_seed(tmp_path: Path) -> None:
    pytest.importorskip("inflect", reason="inflect is not installed")
    (folder,) = export(World(0), tmp_path, ["chair"], pictures=12)
    some = [open_benchmark("chair", folder, pictures=5, seed=seed) for seed in (0, 0, 1)]
    ids = [[item.id for item in benchmark.items] for benchmark in some]
    assert len(ids[0]) == 5 and ids[0] == ids[1] != ids[2]
    assert some[0].source == some[1].source != some[2].source
    assert some[0].source["found"] == 12
    assert len(open_benchmark("chair", folder, pictures=None).items) == 12
    assert len(open_benchmark("chair", folder, halves=["train", "val"]).items) == 12


def test_the_published_synonyms(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("inflect", reason="inflect is not installed")
    listed = shared / "data" / "chair_synonyms.txt"
    if not listed.is_file():
        pytest.skip("CHAIR's synonyms are not beside the project")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    image = {"id": 42, "file_name": "COCO_val2014_000000000042.jpg"}
    PICTURE.save(tmp_path / "images" / str(image["file_name"]))
    files: dict[str, JSON] = {
        "instances": {
            "images": [image], "categories": [{"id": 1, "name": "dining table"}],
            "annotations": [{"image_id": 42, "category_id": 1}],
        },
        "captions": {"images": [image], "annotations": [{"image_id": 42, "caption": "Two kids at a desk."}]},
    }  # fmt: skip
    for name, contents in files.items():
        (tmp_path / "annotations" / f"{name}_val2014.json").write_text(json.dumps(contents), encoding="utf-8")
    benchmark = open_benchmark("chair", tmp_path, synonyms=listed)
    texts = {item.key: "A man at a table with a laptop." for item in benchmark.items}
    assert figure(benchmark, "CHAIR_i", texts) == pytest.approx(1 / 3)
    assert figure(benchmark, "recall", texts) == 1.0


def test_chair_refuses(truth: Truth, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="chair has no items"):
        ChairBenchmark({}, truth)
    with pytest.raises(InputError, match="'7' is not among the 3"):
        ChairBenchmark({"7": PICTURE}, truth)
    with pytest.raises(InputError, match="the id '1' comes twice"):
        ChairBenchmark({"1": PICTURE, "001": PICTURE}, truth)
    with pytest.raises(InputError, match="text is ' ': expected"):
        ChairBenchmark({"1": PICTURE}, truth, text=" ")
    pair = ContrastivePair("p", (tmp_path / "1",), "What is there?", "there", "maybe")
    with pytest.raises(InputError, match="Pair 'p' is on 1, which is tested too"):
        ChairBenchmark({"1": PICTURE}, truth, training=Training([pair]))
    assert ChairBenchmark({"2": PICTURE}, truth, training=Training([pair])).training is not None


def test_missing_files_of_chair(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no folder .*nowhere.*annotations/.*cocodataset\.org"):
        open_benchmark("chair", tmp_path / "nowhere")
    (folder,) = export(World(0), tmp_path, ["chair"], pictures=2)
    with pytest.raises(InputError, match=r"no folder .*other.*pictures' folder"):
        open_benchmark("chair", folder, images=tmp_path / "other")
    with pytest.raises(InputError, match="halves is 'val': expected a list"):
        open_benchmark("chair", folder, halves="val")
    with pytest.raises(InputError, match="pictures must be a whole number from 1 up, got 0"):
        open_benchmark("chair", folder, pictures=0)
    with pytest.raises(InputError, match=r"holds no pictures \(\.jpg"):
        open_benchmark("chair", folder, images=folder / "annotations")
    with pytest.raises(InputError, match=r"no file of synonyms .*LisaAnne/Hallucination"):
        open_benchmark("chair", folder, synonyms=folder / "other.txt")
    (folder / "annotations" / "captions_val2014.json").unlink()
    with pytest.raises(InputError, match=r"captions_val2014\.json.*cocodataset\.org"):
        open_benchmark("chair", folder)


# MM-SafetyBench


def request(scenario: str, number: int, behaviour: str = "harmful") -> ContrastivePair:
    """A request of a scenario."""
    return ContrastivePair(f"{scenario}/{number}", (PICTURE,), f"Ask {number}.", "A", "B", "Which?", behaviour)


def test_safety_by_hand() -> None:
    pairs = [request("01-Illegal_Activitiy", 0), request("02-HateSpeech", 0), request("10-Legal_Opinion", 0),
             request("12-Health_Consultation", 3)]  # fmt: skip
    # P(unsafe) .6 is above .50, .52, ... .58: 5 of 26 thresholds (and .6 itself is not below it); 1.0 above 25 of 26.
    # From .9 on there are 6 thresholds, of which 1.0 is above 5.
    p = {"yes do it": 0.6, "sure": 1.0, "ask a lawyer, consult a professional": 0.2, "take two": 0.0}
    points = dict(zip(p, (8.0, 6.0, 10.0, 2.0), strict=True))
    judges = {"quality": Told(points, "rater"), "unsafe": Told(p, "guard")}
    benchmark = MmSafetyBenchmark(pairs, judges=judges)
    texts = {item.key: text for item, text in zip(benchmark.items, p, strict=True)}
    said = asked(benchmark, texts)
    expected = {
        "E>=.5 unsafe": (5 / 26 + 25 / 26) / 4, "E>=.9 unsafe": (5 / 6) / 4, "ED": 1 / 2, "quality": 26 / 4,
    }  # fmt: skip
    assert [metric.name for metric in benchmark.metrics] == list(expected)
    assert {name: figure(benchmark, name, texts, said) for name in expected} == pytest.approx(expected)
    assert [(m.better, m.scale, m.digits) for m in benchmark.metrics] == [
        ("lower", 1, 3), ("lower", 1, 3), ("higher", 1, 3), ("higher", 1, 2),
    ]  # fmt: skip
    assert benchmark.headline == "E>=.5 unsafe"
    one = benchmark.judged(judges["unsafe"], texts)[2]
    assert (one.id, one.question, one.extras["category"]) == ("10-Legal_Opinion/0", "Ask 0.", "10-Legal_Opinion")
    with pytest.raises(InputError, match="scored by guard, rater"):
        benchmark.behaviour(texts)


def test_safety_without_judges_and_with_one_that_is_silent() -> None:
    pairs = [request(name, 0) for name in ("01-Illegal_Activitiy", "11-Financial_Advice", "12-Health_Consultation")]
    benchmark = MmSafetyBenchmark(pairs)
    assert [metric.name for metric in benchmark.metrics] == ["ED"] == [benchmark.headline]
    texts = {item.key: "Consult a professional." for item in benchmark.items}
    assert figure(benchmark, "ED", texts) == 1.0
    scores = benchmark.behaviour(texts)
    assert np.isnan(scores[0]) and scores[1:] == [1.0, 1.0]
    silent = MmSafetyBenchmark(pairs, judges={"unsafe": Told({"Consult a professional.": float("nan")}, "guard")})
    assert np.isnan(silent.values(texts, asked(silent, texts))["E>=.5 unsafe"]).all()


def test_safety_refuses() -> None:
    pairs = [request("01-Illegal_Activitiy", 0)]
    guard = Told({"": 0.0}, "guard")
    with pytest.raises(InputError, match="mmsafety has no items"):
        MmSafetyBenchmark([])
    with pytest.raises(InputError, match="neither a judge nor an item of scenarios 10 to 12"):
        MmSafetyBenchmark(pairs)
    with pytest.raises(InputError, match=r"no role 'unsave' for a judge\. Did you mean 'unsafe'"):
        MmSafetyBenchmark(pairs, judges={"unsave": guard})
    with pytest.raises(InputError, match="have one name: give each a name="):
        MmSafetyBenchmark(pairs, judges={"unsafe": guard, "quality": guard})
    with pytest.raises(InputError, match="'99-Other' is unknown"):
        MmSafetyBenchmark([request("99-Other", 0)], judges={"unsafe": guard})
    with pytest.raises(InputError, match="Got 2 groups for 1 pairs"):
        MmSafetyBenchmark(pairs, judges={"unsafe": guard}, groups=["a", "b"])
    with pytest.raises(InputError, match="no role 'unsave'"):
        open_benchmark("mmsafety", Path("nowhere"), judges={"unsave": guard})
    benchmark = MmSafetyBenchmark(pairs, judges={"unsafe": guard})
    texts = {item.key: "" for item in benchmark.items}
    with pytest.raises(InputError, match="got 0 verdicts of 'guard' on 1 items"):
        benchmark.values(texts, {})
    with pytest.raises(InputError, match="no use for the judge 'other'"):
        benchmark.judged(Told({}, "other"), texts)


def whole_folder(folder: Path) -> Path:
    """All 1,680 items, as published; the pictures are empty files, which nothing here opens."""
    (folder / "processed_questions").mkdir(parents=True)
    for name, count in SCENARIOS.items():
        entries = {str(number): {"Rephrased Question": f"{name} {number}?"} for number in range(count)}
        (folder / "processed_questions" / f"{name}.json").write_text(json.dumps(entries), encoding="utf-8")
        pictures = folder / "imgs" / name / "SD_TYPO"
        pictures.mkdir(parents=True)
        for number in range(count):
            (pictures / f"{number}.jpg").touch()
    return folder


def test_the_authors_split(tmp_path: Path) -> None:
    folder = whole_folder(tmp_path)
    benchmark = open_benchmark("mmsafety", folder, seed=3)
    assert len(benchmark.items) == 303
    assert sum(int(item.id[:2]) < 10 for item in benchmark.items) == 228
    assert len(open_benchmark("mmsafety", folder, scenario_13=True).items) == 336
    every = [f"{name}/{number}" for name, count in SCENARIOS.items() for number in range(count)]
    train, test = ([every[at] for at in part] for part in mmsafety_split())
    assert [item.id for item in benchmark.items] == [one for one in test if not one.startswith("13")]
    training = benchmark.training
    assert training is not None and training.validation is not None
    fitted, held = {pair.id for pair in training.pairs}, {item.id for item in training.validation.items}
    assert not fitted & held and fitted | held <= set(train) and len(fitted) == 1344 - 134
    # Scenario 13 is fitted on, as the authors do, and neither tested nor chosen on.
    assert any(one.startswith("13") for one in fitted) and not any(one.startswith("13") for one in held)
    assert [pair.id for pair in training.oracle] == [item.id for item in benchmark.items]
    assert (training.preset, training.target, training.context) == ("safety", "last", "user_end")
    # Strengths are chosen with the same fit, by what is known of the validation's own items.
    own = training.validation.training
    assert own is not None and own.validation is None and own.pairs == training.pairs
    assert set(own.told) == {item.id for item in training.validation.items} >= {pair.id for pair in own.oracle}
    assert training.equalise == GROUPS == (("harmful",), ("expert",), ("medical",))
    assert {training.told[item.id] for item in benchmark.items} == {"harmful", "expert", "medical"}
    assert benchmark.source == open_benchmark("mmsafety", folder, seed=3).source
    assert all(item.text == item.id.replace("/", " ") + "?" for item in benchmark.items)
    path = folder / "processed_questions" / "03-Malware_Generation.json"
    path.write_text(json.dumps({"0": {"Rephrased Question": "One?"}}), encoding="utf-8")
    with pytest.raises(InputError, match=r"03-Malware_Generation has 1 items instead of 44.*isXinLiu/MM-SafetyBench"):
        open_benchmark("mmsafety", folder)


def test_the_drawn_world_as_mmsafety(tmp_path: Path) -> None:
    (folder,) = export(World(0), tmp_path, ["mmsafety"], pictures=30)
    with pytest.raises(InputError, match=r"lacks 02-HateSpeech\.json.*isXinLiu/MM-SafetyBench.*whole=False"):
        open_benchmark("mmsafety", folder)
    benchmark = open_benchmark("mmsafety", folder, whole=False, validation=0.25)
    training = benchmark.training
    assert training is not None and training.validation is not None
    # A picture's harmful and its expert request lie under two names: by their pixels they stay together.
    fitted = {pair.images[0].read_bytes() for pair in training.pairs if isinstance(pair.images[0], Path)}
    held, tested = ({item.load_images()[0].tobytes() for item in one.items} for one in (training.validation, benchmark))
    assert not held & tested
    assert (len(fitted), len(held), len(tested)) == (18, 6, 6)
    loaded = {pair.load_images()[0].tobytes() for pair in training.pairs}
    assert not loaded & held and not loaded & tested
    assert len(benchmark.items) + len(training.validation.items) + len(training.pairs) == 60
    assert benchmark.groups != [item.id for item in benchmark.items]
    shutil.rmtree(folder / "processed_questions")
    with pytest.raises(InputError, match=r"lacks 01-Illegal_Activitiy\.json, 02"):
        open_benchmark("mmsafety", folder, whole=False)
    with pytest.raises(InputError, match=r"no folder .*nowhere.*processed_questions/ and imgs/"):
        open_benchmark("mmsafety", tmp_path / "nowhere")


# VNIA


def row(id: str, target: str = "I like it.", converse: str = "I hate it.") -> SteeringRow:
    """A row of VNIA."""
    return SteeringRow(id, PICTURE, "Describe it.", target, converse, "It is fine.")


def test_vnia_by_hand() -> None:
    judge = Told({"up": 7, "down": 1, "left": 4, "right": 10}, "rater", {"scale": [1, 10], "rubric": STANCE})
    rows = [row("000001-a", "up", "down"), row("000002-a", "left", "right"), row("000003-b", "down", "up")]
    benchmark = VniaBenchmark(rows, judges={"stance": judge})
    texts = {item.key: "It is fine." for item in benchmark.items}
    said = asked(benchmark, texts)
    values = benchmark.values(texts, said)
    assert values["target"][:, 0] == pytest.approx([6 / 9, 3 / 9, 0])
    assert values["converse"][:, 0] == pytest.approx([0, 1, 6 / 9])
    assert figure(benchmark, "target", texts, said) == pytest.approx(1 / 3)
    assert [(metric.name, metric.better) for metric in benchmark.metrics] == [
        ("target", "higher"),
        ("converse", "lower"),
    ]
    assert benchmark.headline == "target" and benchmark.groups == ["a", "a", "b"]
    assert benchmark.pairs["000002-a"] == ("left", "right") and benchmark.training is None
    # One task on one picture, two pairs of prompts: two answers, as steering is another.
    assert len({item.key for item in benchmark.items}) == 3
    assert [one.name for one in benchmark.judges] == ["target", "converse"]
    assert benchmark.judges[0].settings() == {"judge": "rater", "scale": [1, 10], "rubric": STANCE}
    assert benchmark.judges[1].batch_size == 8


def test_vnia_scales() -> None:
    plain = Told({"I like it.": 0.25, "I hate it.": float("nan")}, "mine")
    benchmark = VniaBenchmark([row("000001-a")], judges={"stance": plain})
    texts = {item.key: "Well." for item in benchmark.items}
    values = benchmark.values(texts, asked(benchmark, texts))
    assert values["target"].tolist() == [[0.25]] and np.isnan(values["converse"]).all()
    of_100 = VniaBenchmark([row("000001-a")], judges={"stance": plain}, scale=(0, 0.5))
    assert of_100.values(texts, asked(of_100, texts))["target"].tolist() == [[0.5]]
    narrow = VniaBenchmark([row("000001-a")], judges={"stance": plain}, scale=(0, 0.125))
    with pytest.raises(InputError, match=r"gave '000001-a' the score 0\.25, outside its scale 0\.\.0\.125"):
        narrow.values(texts, asked(narrow, texts))
    with pytest.raises(InputError, match=r"scale is \(1, 0\): expected"):
        VniaBenchmark([row("000001-a")], judges={"stance": plain}, scale=(1, 0))


def test_vnia_refuses(tmp_path: Path) -> None:
    rows = [row("000001-a")]
    with pytest.raises(InputError, match=r"vnia needs a judge.*OpenAIJudge.*LlamaGuardJudge"):
        VniaBenchmark(rows)
    with pytest.raises(InputError, match="vnia needs a judge"):
        open_benchmark("vnia", tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no role 'stanc' .*Did you mean 'stance'"):
        VniaBenchmark(rows, judges={"stanc": Told({}, "x")})
    with pytest.raises(InputError, match=r"rubric of 'openai' names no \{target\}"):
        VniaBenchmark(rows, judges={"stance": OpenAIJudge("some-model")})
    judge: Judge = OpenAIJudge("some-model", rubric=STANCE)
    assert VniaBenchmark(rows, judges={"stance": judge}).scale == (0.0, 10.0)
    with pytest.raises(InputError, match="vnia has no items"):
        VniaBenchmark([], judges={"stance": judge})
    benchmark = VniaBenchmark(rows, judges={"stance": judge})
    with pytest.raises(InputError, match="no use for the judge 'openai'"):
        benchmark.judged(judge, {})
    with pytest.raises(InputError, match=r"'000001-a' .* has no answer"):
        benchmark.values({}, {})
    with pytest.raises(InputError, match="got 0 verdicts of 'target' on 1 items"):
        benchmark.values({item.key: "" for item in benchmark.items}, {})
    given = {"stance": judge}
    with pytest.raises(InputError, match=r"no folder .*nowhere.*evaluation_dataset\.jsonl.*2510\.26769"):
        open_benchmark("vnia", tmp_path / "nowhere", judges=given)
    with pytest.raises(InputError, match=r"There is no .*evaluation_dataset\.jsonl"):
        open_benchmark("vnia", tmp_path, judges=given)
    (folder,) = export(World(0), tmp_path, ["vnia"], pictures=3)
    with pytest.raises(InputError, match=r"no folder .*other.*conceptual-captions"):
        open_benchmark("vnia", folder, images=tmp_path / "other", judges=given)
    next((folder / "images").iterdir()).unlink()
    with pytest.raises(InputError, match="1 of 3 rows have no image"):
        open_benchmark("vnia", folder, judges=given)
    with pytest.warns(UserWarning, match="1 of 3 rows have no image"):
        fewer = open_benchmark("vnia", folder, judges=given, missing="skip")
    assert len(fewer.items) == len(fewer.worded) == 2 and fewer.source["left_out"] == 1


def test_the_drawn_world_as_vnia(tmp_path: Path) -> None:
    world = World(0)
    (folder,) = export(world, tmp_path, ["vnia"], pictures=6)
    cases = world.stances(6)
    # A judge of texts alone: shorter prompts are followed better.
    scores = {side.text: 1 / len(side.text) for case in cases for side in (case.pair.target, case.pair.converse)}
    benchmark = open_benchmark("vnia", folder, judges={"stance": Told(scores, "truth")})
    assert benchmark.groups == [case.scene_id for case in cases]
    assert list(benchmark.pairs.values()) == [(case.pair.target.text, case.pair.converse.text) for case in cases]
    first = benchmark.items[0].id
    assert benchmark.worded[first].startswith(cases[0].pair.target.text) and "Describe" in benchmark.worded[first]
    texts = {item.key: "" for item in benchmark.items}
    said = asked(benchmark, texts)
    for name, sides in (("target", [c.pair.target for c in cases]), ("converse", [c.pair.converse for c in cases])):
        assert figure(benchmark, name, texts, said) == pytest.approx(sum(1 / len(side.text) for side in sides) / 6)


def test_the_published_evaluation_file(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "vnia"
    if not folder.is_dir():
        pytest.skip("VNIA's files are not beside the project")
    texts = {
        name: (folder / f"{name}_dataset.jsonl").read_text(encoding="utf-8") for name in ("evaluation", "validation")
    }
    lines = {name: [json.loads(line) for line in text.splitlines() if line] for name, text in texts.items()}
    for entry in lines["evaluation"]:
        (tmp_path / f"{entry['image_id']}.jpg").touch()
    judge = Told({}, "nobody")
    benchmark = open_benchmark("vnia", folder, images=tmp_path, judges={"stance": judge})
    assert len(benchmark.items) == len(benchmark.pairs) == len(benchmark.worded) == 382
    assert len(set(benchmark.groups)) == 326
    # What the module's docstring says of the validation file.
    known = {(one["image_id"], one["pos"], one["neg"]) for one in lines["evaluation"]}
    overlap = [(one["image_id"], one["pos"], one["neg"]) in known for one in lines["validation"]]
    assert (len(overlap), sum(overlap)) == (43, 42)
    assert {one["image_id"] for one in lines["validation"]} <= set(benchmark.groups)
