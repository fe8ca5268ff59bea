"""POPE and OHD as benchmarks: known answers by hand and by scikit-learn, splits by picture, every refusal."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from _figures import PICTURE, figure, question
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from steer_plugin.contrast import ContrastivePair
from steer_plugin.contrast.pope import SUBSETS
from steer_plugin.errors import InputError
from steer_plugin.evaluation.asking import distinct
from steer_plugin.evaluation.benchmarks import OhdBenchmark, PopeBenchmark, open_benchmark, options_of
from steer_plugin.evaluation.benchmarks._parts import shuffled, split_pictures
from steer_plugin.evaluation.benchmarks.pope import balanced
from steer_plugin.evaluation.parsing import pope_answer
from steer_plugin.evaluation.pope import PopeItem
from steer_plugin.pocket import World, export

# Subset, picture, noun, true answer, what is said.
ROWS = [
    ("random", "a", "dog", True, "Yes."),
    ("random", "a", "cat", False, "Yes, there is."),
    ("random", "b", "sun", True, "There is no sun."),
    ("random", "b", "hat", False, "No."),
    ("popular", "a", "cow", True, "Yes, it is there."),
    ("popular", "b", "ox", False, "no"),
    ("popular", "c", "elk", False, "Not sure."),
]


@pytest.fixture
def by_hand() -> tuple[PopeBenchmark, dict[str, str]]:
    items = [question(*row[:4]) for row in ROWS]
    return PopeBenchmark(items), {item.key: row[4] for item, row in zip(items, ROWS, strict=True)}


def test_pope_by_hand(by_hand: tuple[PopeBenchmark, dict[str, str]]) -> None:
    benchmark, texts = by_hand
    # random: TP 1, FP 1, FN 1, TN 1. popular: TP 1, TN 1, and "Not" is no word of POPE's: FP 1. Mean: of the two.
    expected = {
        "random accuracy": 2 / 4, "random F1": 2 / 4, "random precision": 1 / 2, "random recall": 1 / 2,
        "random yes-ratio": 2 / 4, "random well-formed": 3 / 4,
        # Yes in time, a no that is none, no "yes" in the third, a no.
        "random accuracy (L2S)": 2 / 4, "random F1 (L2S)": 2 / 3,
        "popular accuracy": 2 / 3, "popular F1": 2 / 3, "popular precision": 1 / 2, "popular recall": 1.0,
        "popular yes-ratio": 2 / 3, "popular well-formed": 2 / 3,
        # "no" is found in "Not sure".
        "popular accuracy (L2S)": 1.0, "popular F1 (L2S)": 1.0,
        "mean accuracy": 4 / 7, "mean F1": (2 / 4 + 2 / 3) / 2, "mean precision": 2 / 4, "mean recall": (1 / 2 + 1) / 2,
        "mean yes-ratio": 4 / 7, "mean well-formed": 5 / 7, "mean accuracy (L2S)": 5 / 7, "mean F1 (L2S)": 10 / 12,
    }  # fmt: skip
    assert {metric.name for metric in benchmark.metrics} == set(expected)
    assert {name: figure(benchmark, name, texts) for name in expected} == pytest.approx(expected)
    assert benchmark.metric("mean yes-ratio").better == "neither"


def test_pope_against_scikit_learn() -> None:
    """A second source on random answers, subset by subset."""
    draw = np.random.default_rng(3)
    items = [
        question(subset, f"p{number % 9}", f"n{number}", bool(draw.integers(2))) for subset in SUBSETS
        for number in range(30)
    ]  # fmt: skip
    texts = {item.key: str(draw.choice(["Yes", "No", "Hm.", "no dog", "It is not"])) for item in items}
    benchmark = PopeBenchmark(items)
    found: dict[str, list[float]] = {}
    for part in SUBSETS:
        chosen = [item for item in items if part == item.subset]
        said, true = [pope_answer(texts[item.key]) for item in chosen], [item.label for item in chosen]
        precision, recall, f1, _ = precision_recall_fscore_support(true, said, average="binary")
        for measure, value in (
            ("accuracy", accuracy_score(true, said)), ("F1", f1), ("precision", precision), ("recall", recall),
            ("yes-ratio", np.mean(said)),
        ):  # fmt: skip
            assert figure(benchmark, f"{part} {measure}", texts) == pytest.approx(value)
            found.setdefault(measure, []).append(value)
    for measure in ("accuracy", "F1", "precision", "recall", "yes-ratio"):
        assert figure(benchmark, f"mean {measure}", texts) == pytest.approx(np.mean(found[measure]))


def test_accuracy_and_f1_come_first(by_hand: tuple[PopeBenchmark, dict[str, str]]) -> None:
    benchmark, texts = by_hand
    assert [metric.name for metric in benchmark.metrics][:6] == [
        "random accuracy", "random F1", "popular accuracy", "popular F1", "mean accuracy", "mean F1",
    ]  # fmt: skip
    assert [metric.name for metric in benchmark.metrics if metric.shown][6:] == ["mean yes-ratio", "mean well-formed"]
    assert benchmark.headline == "mean accuracy"
    assert benchmark.behaviour(texts) == [1, 0, 0, 1, 1, 1, 0]
    assert benchmark.groups == ["a", "a", "b", "b", "a", "b", "c"]
    assert not benchmark.judges and not benchmark.pairs
    with pytest.raises(InputError, match="pope has no use for the judge"):
        benchmark.judged(Nobody(), texts)


class Nobody:
    """A judge that no benchmark knows."""

    name, batch_size = "nobody", 1

    def settings(self) -> dict[str, str]:
        return {}

    def judge(self, items: object) -> list[object]:
        return []


def test_l2s_f1_under_weights(by_hand: tuple[PopeBenchmark, dict[str, str]]) -> None:
    """2a / (1 + a) of each resample's own accuracy, not of the mean of several."""
    benchmark, texts = by_hand
    rows = benchmark.values(texts, {})["random F1 (L2S)"][:4]
    weights = np.array([[1.0, 1, 1, 1], [3, 0, 1, 0]])
    assert benchmark.metric("random F1 (L2S)").statistic(rows, weights) == pytest.approx([2 / 3, 1.5 / 1.75])


def test_pope_refuses() -> None:
    good = question("random", "a", "dog", True)
    with pytest.raises(InputError, match="pope has no items"):
        PopeBenchmark([])
    with pytest.raises(InputError, match=r"the id 'random-a-dog' comes twice"):
        PopeBenchmark([good, good])
    with pytest.raises(InputError, match="has the subset 'mean'"):
        PopeBenchmark([question("mean", "a", "dog", True)])
    with pytest.raises(InputError, match="has no label"):
        PopeBenchmark([PopeItem(ContrastivePair("x", (PICTURE,), "Is it?", "Yes", "No"), "random", "a")])
    with pytest.raises(InputError, match=r"'random-a-dog' .* has no answer"):
        PopeBenchmark([good]).values({}, {})
    with pytest.raises(InputError, match="max_new_tokens must be a whole number from 1"):
        PopeBenchmark([good], max_new_tokens=0)


def test_the_split_is_by_picture_and_stable() -> None:
    names = [f"picture-{number}" for number in range(50)]
    first = split_pictures(names, 0.4, 0.25, 7)
    assert first == split_pictures([*reversed(names), *names], 0.4, 0.25, 7)
    assert first != split_pictures(names, 0.4, 0.25, 8)
    assert first.counts() == {"fitting": 15, "validation": 5, "test": 30}
    assert first.fitting | first.validation | first.test == set(names)
    assert split_pictures(names, 0, 0.25, 7).test == set(names)
    # The order itself is a promise. sha256sum of "0:d", "0:a", "0:c", "0:b": 7d98c2..., 9df3c5..., be086d..., e02192...
    assert shuffled(["a", "b", "c", "d"], 0) == ["d", "a", "c", "b"]
    without = shuffled(names[1:], 7)
    assert [name for name in shuffled(names, 7) if name != names[0]] == without


@given(st.sets(st.text(max_size=6), min_size=8, max_size=40), st.floats(0.25, 0.75), st.integers(0, 9))
def test_every_picture_is_in_one_part(names: set[str], share: float, seed: int) -> None:
    split = split_pictures(names, share, 0.5, seed)
    parts = [split.fitting, split.validation, split.test]
    assert sum(map(len, parts)) == len(names) and frozenset().union(*parts) == names
    assert len(split.test) == len(names) - round(share * len(names))
    # A prefix counts for nothing.
    named = split_pictures([f"coco/{name}" for name in names], share, 0.5, seed, prefix="coco/")
    assert [{f"coco/{name}" for name in part} for part in parts] == [named.fitting, named.validation, named.test]


@pytest.mark.parametrize(
    ("fitting", "validation", "message"),
    [
        (1.0, 0.25, r"fitting is 1\.0: expected a share"),
        (-0.1, 0.25, r"fitting is -0\.1"),
        (0.4, 1, "validation is 1: expected a share"),
        (0.4, True, "validation is True"),
        (0.1, 0.25, "leave none for fitting"),
        (0.5, 0.1, "leave none for validation"),
        (0.99, 0.5, "leave none for test"),
    ],
)
def test_a_split_that_cannot_be_is_refused(fitting: float, validation: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        split_pictures(["a", "b", "c", "d"], fitting, validation, 0)


def test_balanced_pairs_by_hand() -> None:
    items = [
        *(question("random", "a", noun, label) for noun, label in (("dog", True), ("cat", True), ("ox", False))),
        # Shares a yes and its no with random: both are other ones here.
        *(question("popular", "a", noun, label) for noun, label in (("dog", True), ("cat", True), ("ox", False))),
        question("popular", "a", "elk", False),
        question("random", "b", "sun", True),
    ]
    chosen = balanced(items)
    assert [(pair.id, pair.label) for pair in chosen] == [
        ("popular-a-dog", True), ("popular-a-ox", False),
    ]  # fmt: skip
    # Random has only "ox" for its no, which popular took; picture b has no no.
    assert [pair.id for pair in balanced(items[:3])] == ["random-a-dog", "random-a-ox"]
    with pytest.raises(InputError, match="both a yes and a no"):
        PopeBenchmark.split([question("random", name, "dog", True) for name in "abcdef"], validation=0.5)


def pope_folder(folder: Path, shared: Path) -> Path:
    """The published files, with an empty file for each picture: nothing here opens one."""
    if not (shared / "data" / "pope").is_dir():
        pytest.skip("POPE's files are not beside the project")
    (folder / "images").mkdir(parents=True)
    for subset in SUBSETS:
        text = (shared / "data" / "pope" / f"coco_pope_{subset}.json").read_text(encoding="utf-8")
        (folder / f"coco_pope_{subset}.json").write_text(text, encoding="utf-8")
        for line in text.splitlines():
            (folder / "images" / json.loads(line)["image"]).touch()
    return folder


@pytest.mark.slow
def test_the_published_files(shared: Path, tmp_path: Path) -> None:
    folder = pope_folder(tmp_path / "pope", shared)
    whole = PopeBenchmark.read(folder, fitting=0)
    assert len(whole.items) == 9000 and whole.training is None
    items = [item for item in whole.items if isinstance(item, PopeItem)]
    # 1,500 yes questions are shared: as many different questions as counted in the files by themselves.
    assert len(distinct(whole.items)) == 5127
    benchmark = PopeBenchmark.split(items, seed=5)
    training = benchmark.training
    assert training is not None and training.validation is not None
    fitted = {pair.images[0] for pair in training.pairs}
    held, tested = set(training.validation.groups), set(benchmark.groups)
    assert (len(fitted), len(held), len(tested)) == (150, 50, 300)
    names = {Path(str(path)).name for path in fitted}
    assert not names & held and not names & tested and not held & tested
    # Three yes and three no questions of each picture, none twice.
    assert len(training.pairs) == 900 == len({(pair.images, pair.prompt) for pair in training.pairs})
    assert sum(bool(pair.label) for pair in training.pairs) == 450
    assert len(benchmark.items) == 300 * 18 and len(training.validation.items) == 50 * 18
    assert [pair.id for pair in training.oracle] == [item.id for item in distinct(benchmark.items)]
    assert set(training.told) == {item.id for item in benchmark.items}
    # Strengths are chosen with the same fit, by what is known of the validation's own items.
    own = training.validation.training
    assert own is not None and own.validation is None and own.pairs == training.pairs
    assert set(own.told) == {item.id for item in training.validation.items} >= {pair.id for pair in own.oracle}
    assert (training.preset, training.target, training.context) == ("pope", "average_forced", "last_prompt")
    assert benchmark.source == PopeBenchmark.split(list(items), seed=5).source
    assert benchmark.source != PopeBenchmark.split(items, seed=6).source
    described = json.loads(json.dumps(benchmark.source))
    assert described["split"]["pictures"] == {"fitting": 150, "validation": 50, "test": 300}
    assert described["split"]["seed"] == 5 and described["split"]["pairs"] == 900
    assert set(json.loads(json.dumps(whole.source))["files"]) == {f"coco_pope_{subset}.json" for subset in SUBSETS}
    # Learn-to-Steer: yes to everything is right on half of the questions, and 2a / (1 + a) is then 2 / 3.
    yes = {item.key: "Yes" for item in whole.items}
    assert figure(whole, "mean accuracy", yes) == 0.5
    assert figure(whole, "adversarial F1 (L2S)", yes) == pytest.approx(2 / 3)
    assert figure(whole, "popular yes-ratio", yes) == 1.0


@pytest.mark.slow
def test_pope_and_ohd_split_coco_alike(shared: Path, tmp_path: Path) -> None:
    """Fitted on POPE, tested on OHD: no picture of COCO may be in both."""
    folder = pope_folder(tmp_path / "pope", shared)
    pope = PopeBenchmark.read(folder, seed=2)
    ohd = OhdBenchmark.read(folder, {"coco": folder / "images"}, sources=["coco"], seed=2)
    assert {f"coco/{name}" for name in pope.groups} == set(ohd.groups)


def test_missing_files_of_pope(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no folder .*nowhere.*RUCAIBox/POPE"):
        PopeBenchmark.read(tmp_path / "nowhere")
    (folder,) = export(World(0), tmp_path, ["pope"], pictures=4)
    with pytest.raises(InputError, match=r"no folder .*other.*pictures' folder.*cocodataset\.org"):
        PopeBenchmark.read(folder, tmp_path / "other")
    with pytest.raises(InputError, match=r"subsets is \['populer'\].*Did you mean 'popular'"):
        PopeBenchmark.read(folder, subsets=["populer"])
    with pytest.raises(InputError, match="subsets is 'random': expected a list"):
        PopeBenchmark.read(folder, subsets="random")
    with pytest.raises(InputError, match=r"no POPE file .*gqa_pope_random\.json"):
        PopeBenchmark.read(folder, files="gqa")
    next((folder / "images").iterdir()).unlink()
    with pytest.raises(InputError, match="there is no image"):
        PopeBenchmark.read(folder)
    (folder / "coco_pope_popular.json").unlink()
    with pytest.raises(InputError, match=r"coco_pope_popular\.json.*published in github.com/RUCAIBox/POPE"):
        PopeBenchmark.read(folder)


def test_the_drawn_world_as_pope(tmp_path: Path) -> None:
    world = World(0)
    (folder,) = export(world, tmp_path, ["pope"], pictures=30)
    benchmark = open_benchmark("pope", folder, fitting=0.5, validation=0.2)
    training = benchmark.training
    assert training is not None and training.validation is not None
    assert (len(set(benchmark.groups)), len(set(training.validation.groups))) == (15, 3)
    # One yes question a picture, so one pair of pairs; the kinds of its no take turns.
    assert len(training.pairs) == 24
    kinds = [pair.id.split("-")[0] for pair in training.pairs if pair.label is False]
    assert {kind: kinds.count(kind) for kind in SUBSETS} == dict.fromkeys(SUBSETS, 4)
    truth = {f"{one.scene_id}.png|{one.text}": "yes." if one.label else "no." for one in world.questions(30)}
    assert figure(benchmark, "mean accuracy", truth) == 1.0
    assert math.isclose(figure(benchmark, "mean yes-ratio", truth), 0.5)
    assert benchmark.items[0].load_images()[0].size == (72, 72)
    assert benchmark.source["pictures_sha256"] != benchmark.source["questions_sha256"]


def ohd_folder(folder: Path, pictures: int = 10) -> Path:
    """Three sources: two yes and two no questions on each picture and subset."""
    for source in ("coco", "flickr", "nocaps"):
        (folder / "images" / source).mkdir(parents=True)
        for number in range(pictures):
            (folder / "images" / source / f"{number}.jpg").write_bytes(source.encode())
        for subset in SUBSETS:
            rows = [
                {
                    "question_id": 4 * number + k, "image": f"{number}.jpg",
                    "text": f"Is there a {subset} thing {k} in the imange?", "label": "no" if k % 2 else "yes",
                }
                for number in range(pictures) for k in range(4)
            ]  # fmt: skip
            path = folder / f"{source}_pope_{subset}.json"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_ohd_by_hand_and_by_scikit_learn(tmp_path: Path) -> None:
    benchmark = open_benchmark("ohd", ohd_folder(tmp_path), whole=False, fitting=0)
    assert [metric.name for metric in benchmark.metrics] == [
        "random accuracy", "random F1", "popular accuracy", "popular F1", "adversarial accuracy", "adversarial F1",
        "overall accuracy", "overall F1", "coco accuracy", "flickr accuracy", "nocaps accuracy", "overall precision",
        "overall recall", "overall yes-ratio", "overall well-formed", "overall accuracy (L2S)", "overall F1 (L2S)",
    ]  # fmt: skip
    assert benchmark.headline == "overall accuracy" and benchmark.pairs == {}
    texts: dict[str, str] = {}
    rows: list[tuple[str, bool, bool]] = []
    for item in benchmark.items:
        assert isinstance(item, PopeItem)
        source = item.group.split("/")[0]
        # Yes to all of coco, the truth on flickr, its opposite on nocaps.
        right = {"coco": True, "flickr": item.label, "nocaps": not item.label}[source]
        texts[item.key] = "Yes." if right else "No."
        rows.append((item.subset, right, item.label))
    found = {metric.name: figure(benchmark, metric.name, texts) for metric in benchmark.metrics}
    assert (found["coco accuracy"], found["flickr accuracy"], found["nocaps accuracy"]) == (0.5, 1.0, 0.0)
    # Each source has 120 questions: TP 60 + 60 + 0, FP 60 + 0 + 60, FN 0 + 0 + 60.
    assert found["overall accuracy"] == 0.5
    assert found["overall F1"] == pytest.approx(240 / (240 + 120 + 60))
    assert found["overall precision"] == 0.5 and found["overall recall"] == pytest.approx(2 / 3)
    for subset in (*SUBSETS, "overall"):
        said, true = (np.array([row[k] for row in rows if subset in ("overall", row[0])]) for k in (1, 2))
        assert found[f"{subset} accuracy"] == pytest.approx(accuracy_score(true, said))
        assert found[f"{subset} F1"] == pytest.approx(precision_recall_fscore_support(true, said, average="binary")[2])


def test_ohd_split(tmp_path: Path) -> None:
    folder = ohd_folder(tmp_path)
    benchmark = open_benchmark("ohd", folder, whole=False, fitting=0.5, validation=0.4, seed=1)
    training = benchmark.training
    assert training is not None and training.validation is not None
    fitted = {f"{image.parent.name}/{image.name}" for pair in training.pairs for image in pair.images}  # type: ignore[union-attr]
    held, tested = set(training.validation.groups), set(benchmark.groups)
    assert not fitted & held and not fitted & tested and not held & tested
    for source in ("coco", "flickr", "nocaps"):
        parts = [sum(name.startswith(f"{source}/") for name in part) for part in (fitted, held, tested)]
        assert parts == [3, 2, 5]
    assert len({pair.id for pair in training.pairs}) == len(training.pairs) == 9 * 6
    assert json.loads(json.dumps(benchmark.source))["questions"] == dict.fromkeys(("coco", "flickr", "nocaps"), 60)


def test_ohd_refuses(tmp_path: Path) -> None:
    folder = ohd_folder(tmp_path / "ohd", 2)
    with pytest.raises(InputError, match=r"no folder .*nowhere.*Yufang-Liu/clip_hallucination"):
        open_benchmark("ohd", tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no folder .*gone.*one folder for each source"):
        open_benchmark("ohd", folder, images={"coco": tmp_path / "gone"})
    with pytest.raises(InputError, match=r"coco_pope_random\.json has 8 questions"):
        open_benchmark("ohd", folder)
    with pytest.raises(InputError, match="sources is 'coco': expected a list"):
        open_benchmark("ohd", folder, sources="coco")
    item = question("random", "a", "dog", True)
    with pytest.raises(InputError, match="both called 'random'"):
        OhdBenchmark({"random": [item]})
    (folder / "flickr_pope_random.json").unlink()
    with pytest.raises(InputError, match=r"flickr_pope_random\.json.*OHD-Caps"):
        open_benchmark("ohd", folder, whole=False)


def test_the_door_refuses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no benchmark 'pop'\. Did you mean 'pope'"):
        open_benchmark("pop", tmp_path)
    with pytest.raises(InputError, match="no benchmark 'pop'"):
        options_of("pop")
    with pytest.raises(InputError, match=r"pope has no option 'sed'\. Did you mean 'seed'"):
        open_benchmark("pope", tmp_path, sed=1)
    with pytest.raises(InputError, match="pope takes no judges: it is scored without a judge"):
        open_benchmark("pope", tmp_path, judges={"unsafe": Nobody()})  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="mmsafety takes no images: its pictures lie in"):
        open_benchmark("mmsafety", tmp_path, images=tmp_path)
    with pytest.raises(InputError, match="pope takes one folder of images"):
        open_benchmark("pope", tmp_path, images={"coco": tmp_path})
    assert "fitting" in options_of("pope") and "images" not in options_of("pope")
