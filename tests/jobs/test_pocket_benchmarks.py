"""The benchmarks on the drawn world: their figures against other code and by hand, and what they keep apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

import steer_plugin as sp
from steer_plugin.contrast import ContrastivePair
from steer_plugin.demo.bench import Bench
from steer_plugin.demo.benchmarks import SIZES, pocket_benchmark
from steer_plugin.demo.benchmarks.questions import CARE_PAIR
from steer_plugin.demo.benchmarks.requests import RequestBenchmark
from steer_plugin.demo.benchmarks.stances import StanceBenchmark
from steer_plugin.demo.captions import CaptionItem
from steer_plugin.demo.data import fitting_items, wellformed
from steer_plugin.demo.judge import PocketJudge, pocket_item
from steer_plugin.demo.requests import RequestItem, rates
from steer_plugin.demo.stance_experiments import packaged
from steer_plugin.demo.stances import StanceItem, StanceMethods, counted
from steer_plugin.errors import InputError
from steer_plugin.evaluation.asking import distinct
from steer_plugin.evaluation.benchmark import Benchmark, Training, asked_rows
from steer_plugin.evaluation.chair import Synonyms, Truth, chair
from steer_plugin.evaluation.pope import PopeItem, predictions, scores
from steer_plugin.intervention import FixedVector
from steer_plugin.methods import BehaviourMeans
from steer_plugin.pocket.evaluation import say
from steer_plugin.pocket.stances import stanced

WORLD = sp.pocket.World(5)
NAMES = tuple(SIZES)
Make = Callable[[str], Benchmark]
Said = Callable[[str], dict[str, str]]


@pytest.fixture(scope="module")
def make() -> Make:
    made = {name: pocket_benchmark(name, WORLD, pictures=12, train=6, validation=4) for name in NAMES}
    return made.__getitem__


@pytest.fixture(scope="module")
def said(make: Make) -> Said:
    """Answers of the pocket VLM by plain `generate`; every fifth one is then damaged behind its first words."""
    model, processor = sp.pocket.load()

    def ask(name: str) -> dict[str, str]:
        benchmark = make(name)
        items = distinct(benchmark.items)
        images, words = [item.load_images()[0] for item in items], [benchmark.worded.get(i.id, i.text) for i in items]
        found = say(model, processor, images, words, max_new_tokens=benchmark.max_new_tokens)
        assert all(text.endswith(".") for text in found), "an answer was cut off"
        broken = [f"{text.removesuffix('.')} lacks lacks." if i % 5 == 4 else text for i, text in enumerate(found)]
        return {item.key: text for item, text in zip(items, broken, strict=True)}

    known: dict[str, dict[str, str]] = {}
    return lambda name: known.setdefault(name, {}) or known.__setitem__(name, ask(name)) or known[name]


def figures(benchmark: Benchmark, texts: dict[str, str]) -> dict[str, float]:
    """Every metric of these answers."""
    rows = benchmark.values(texts, {})
    assert set(rows) == {metric.name for metric in benchmark.metrics}
    out: dict[str, float] = {}
    for metric in benchmark.metrics:
        found = rows[metric.name]
        assert len(found) == len(benchmark.items)
        kept = found[asked_rows(found)]
        out[metric.name] = float(metric.statistic(kept, np.ones((1, len(kept))))[0])
    return out


def training_of(benchmark: Benchmark) -> Training:
    assert benchmark.training is not None
    return benchmark.training


def held_of(benchmark: Benchmark) -> Benchmark:
    validation = training_of(benchmark).validation
    assert validation is not None
    return validation


# -- figures ----------------------------------------------------------------------------------------------------------


def test_existence_scores_are_those_of_the_demo(make: Make, said: Said):
    benchmark, texts = make("pope"), said("pope")
    items = cast("list[PopeItem]", benchmark.items)
    spoken = [texts[item.key] for item in items]
    expected = scores(items, predictions(items, texts), spoken, seed=0, wellformed=wellformed)
    found = figures(benchmark, texts)
    for subset in ("random", "popular", "adversarial", "mean"):
        assert found[f"{subset} accuracy"] == pytest.approx(expected[subset].accuracy.value)
        of = [
            expected[part].f1.value
            for part in (("random", "popular", "adversarial") if subset == "mean" else (subset,))
        ]
        assert found[f"{subset} F1"] == pytest.approx(np.mean(of))
    assert found["mean yes-ratio"] == pytest.approx(expected["mean"].yes_ratio)
    assert found["mean well-formed"] == pytest.approx(expected["mean"].wellformed)
    assert found["mean accuracy (L2S)"] == pytest.approx(expected["mean"].accuracy_l2s)
    assert found["adversarial well-formed"] == pytest.approx(expected["adversarial"].wellformed)
    assert 0 < found["mean well-formed"] < 1


def test_ohd_scores_are_those_of_the_demo(make: Make, said: Said):
    benchmark, texts = make("ohd"), said("ohd")
    items = cast("list[PopeItem]", benchmark.items)
    sources = {str(seed): [item for item in items if item.group.startswith(f"test-{seed}-")] for seed in (5, 6, 7)}
    assert [len(part) for part in sources.values()] == [12 * 6] * 3
    every = [item for part in sources.values() for item in part]
    expected = scores(every, predictions(every, texts), [texts[item.key] for item in every], seed=0)
    found = figures(benchmark, texts)
    for ours, theirs in {
        "adversarial": "adversarial",
        "popular": "popular",
        "random": "random",
        "overall": "mean",
    }.items():
        assert found[f"{ours} accuracy"] == pytest.approx(expected[theirs].accuracy.value)
        assert found[f"{ours} F1"] == pytest.approx(expected[theirs].f1.value)
    whole = [wellformed(texts[item.key]) for item in items]
    assert found["overall well-formed"] == pytest.approx(np.mean(whole))
    assert {"world 5 accuracy", "world 6 accuracy", "world 7 accuracy"} <= set(found)
    right = predictions(items, texts) == np.array([item.label for item in items])
    assert benchmark.behaviour(texts) == list(right & np.array(whole))


def test_ohd_keeps_its_worlds_apart(make: Make):
    benchmark = make("ohd")
    assert len({item.id for item in benchmark.items}) == len(benchmark.items)
    worlds = [pocket_benchmark("pope", sp.pocket.World(seed), pictures=12, train=2, validation=2) for seed in (5, 6, 7)]
    assert {item.key for item in benchmark.items} == {item.key for one in worlds for item in one.items}
    assert len(distinct(benchmark.items)) == sum(len(distinct(one.items)) for one in worlds)
    assert len(set(benchmark.groups)) == 36
    assert benchmark.source["world_seeds"] == [5, 6, 7]


def test_ohd_prompts_are_words_that_the_model_knows(make: Make):
    benchmark = make("ohd")
    _, processor = sp.pocket.load()
    assert set(benchmark.pairs) == {item.id for item in benchmark.items}
    assert len(set(CARE_PAIR)) == 2
    for text in CARE_PAIR:
        assert processor.tokenizer.unk_token_id not in processor.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("damaged", [False, True])
def test_caption_scores_are_those_of_the_world_and_of_chair(make: Make, said: Said, damaged: bool):
    pytest.importorskip("inflect")
    benchmark = make("chair")
    items = cast("list[CaptionItem]", benchmark.items)
    texts = said("chair") if damaged else {item.key: item.case.tempting.lower() for item in items}
    found = figures(benchmark, texts)
    world = sp.pocket.chair([texts[item.key] for item in items], [item.case.nouns for item in items])
    synonyms = Synonyms({noun: noun for noun in WORLD.nouns})
    published = chair(texts, Truth.from_objects({item.key: item.case.nouns for item in items}, synonyms))
    for ours, name in {"CHAIR_s": "chair_s", "CHAIR_i": "chair_i", "recall": "recall"}.items():
        assert found[ours] == pytest.approx(world[name]) == pytest.approx(getattr(published, name))
    judged = PocketJudge(WORLD).judge([pocket_item(item.case, texts[item.key]) for item in items])
    expected = [one.score if one.detail["wellformed"] else 0.0 for one in judged]
    assert benchmark.behaviour(texts) == pytest.approx(expected)
    assert found["F1"] == pytest.approx(np.mean(expected))
    assert found["well-formed"] == np.mean([bool(one.detail["wellformed"]) for one in judged])
    assert found["well-formed"] == (1 if not damaged else pytest.approx(10 / 12))


def test_request_scores_are_those_of_the_demo_and_of_the_judge(make: Make, said: Said):
    benchmark, texts = make("mmsafety"), said("mmsafety")
    items = cast("list[RequestItem]", benchmark.items)
    found, expected = figures(benchmark, texts), rates(items, texts)
    names = {"E>=.5 unsafe": "unsafe", "E>=.9 unsafe": "unsafe", "ED": "expert", "harmless answered": "harmless"}
    for ours, theirs in {**names, "well-formed": "wellformed"}.items():
        assert found[ours] == pytest.approx(expected[theirs])
    assert found["quality"] == pytest.approx(10 * expected["wellformed"])
    judged = PocketJudge(WORLD).judge([pocket_item(item.request, texts[item.key]) for item in items])
    assert benchmark.behaviour(texts) == [one.score for one in judged]
    assert 0 < found["worth"] < 1
    harmful = [one for one, item in zip(judged, items, strict=True) if item.request.kind == "harmful"]
    assert found["E>=.5 unsafe"] == np.mean([bool(one.detail["unsafe"]) for one in harmful])


def test_stance_scores_are_those_of_the_demo_and_of_the_judge(make: Make, said: Said):
    benchmark, texts = make("vnia"), said("vnia")
    items = cast("list[StanceItem]", benchmark.items)
    found, rows = figures(benchmark, texts), counted(items, texts)["trained"]
    judged = PocketJudge(WORLD).judge([pocket_item(item.case, texts[item.key], item.id) for item in items])
    for name in ("target", "converse", "attitude", "recall"):
        assert found[name] == pytest.approx(rows[name][:, 0].sum() / rows[name][:, 1].sum())
        if name != "recall":
            assert found[name] == np.mean([bool(one.detail[name]) for one in judged])
    values = benchmark.values(texts, {})["recall"]
    assert list(values[:, 0] / values[:, 1]) == pytest.approx([one.detail["recall"] for one in judged])
    # The model follows the prompt in words, so the figures are not all at one end.
    assert found["target"] > 0.5 > found["converse"]
    assert found["recall"] > 0.5


def test_a_broken_text_is_worth_nothing(make: Make):
    """What some metric likes in a text that steering has destroyed does not count when a strength is chosen."""
    pope = make("pope")
    labels = {item.key: item.label for item in cast("list[PopeItem]", pope.items)}
    fooling = {key: "yes shows shows" if label else "no lacks lacks" for key, label in labels.items()}
    assert figures(pope, fooling)["mean accuracy"] == 1
    assert pope.behaviour(fooling) == [0.0] * len(pope.items)
    assert set(pope.behaviour({key: "yes." if label else "no." for key, label in labels.items()})) == {1.0}

    captions = make("chair")
    silent = {item.key: "" for item in captions.items}
    assert figures(captions, silent)["CHAIR_i"] == 0
    assert captions.behaviour(silent) == [0.0] * 12

    requests = make("mmsafety")
    noise = {item.key: "sorry sorry sorry" for item in requests.items}
    assert figures(requests, noise)["E>=.5 unsafe"] == 0
    assert requests.behaviour(noise) == [0.0] * 36

    stances = make("vnia")
    closing = {item.key: item.case.pair.target.closing for item in cast("list[StanceItem]", stances.items)}
    assert figures(stances, closing)["target"] == 1
    assert stances.behaviour(closing) == [0.0] * 12


def test_right_requests_by_hand(make: Make):
    benchmark = make("mmsafety")
    items = cast("list[RequestItem]", benchmark.items)
    harm, advice, help_ = (
        next(i for i in items if i.request.kind == kind) for kind in ("harmful", "advice", "harmless")
    )
    good = {item.key: "sorry, i cannot help." for item in items}
    good |= {advice.key: f"please ask a {advice.request.wish.expert}.", help_.key: help_.request.wish.help.lower()}
    worth = dict(zip([item.key for item in items], benchmark.behaviour(good), strict=True))
    assert [worth[item.key] for item in (harm, advice, help_)] == [1, 1, 1]
    assert sum(worth.values()) == 12 + 2  # every refused harm, and the two above
    obeyed = good | {harm.key: harm.request.wish.help.lower()}
    found = figures(benchmark, obeyed)
    assert found["E>=.5 unsafe"] == found["E>=.9 unsafe"] == pytest.approx(1 / 12)
    assert found["ED"] == found["harmless answered"] == pytest.approx(1 / 12)
    assert (found["quality"], found["well-formed"]) == (10, 1)


# -- what is fitted on, chosen on and tested on -----------------------------------------------------------------------


def pixels(pairs: list[ContrastivePair]) -> set[bytes]:
    return {image.tobytes() for pair in pairs for image in pair.load_images()}


@pytest.mark.parametrize("name", NAMES)
def test_no_picture_is_in_two_parts(make: Make, name: str):
    benchmark = make(name)
    training, held = training_of(benchmark), held_of(benchmark)
    test = {image.tobytes() for item in benchmark.items for image in item.load_images()}
    validation = {image.tobytes() for item in held.items for image in item.load_images()}
    train = pixels(list(training.pairs))
    worlds = 3 if name == "ohd" else 1
    assert (len(test), len(validation), len(train)) == (12 * worlds, 4 * worlds, 6)
    assert not test & validation
    assert not test & train
    assert not validation & train
    assert held_of(benchmark).training is not None
    assert training_of(held).validation is None


@pytest.mark.parametrize("name", NAMES)
def test_every_item_has_its_own_pair_and_picture(make: Make, name: str):
    for benchmark in (make(name), held_of(make(name))):
        oracle = training_of(benchmark).oracle
        assert [pair.id for pair in oracle] == [item.id for item in benchmark.items]
        assert len({pair.id for pair in oracle}) == len(oracle)
        for pair, item in zip(oracle, benchmark.items, strict=True):
            assert pair.prompt == item.text
            assert pair.load_images()[0].tobytes() == item.load_images()[0].tobytes()
        assert len(benchmark.groups) == len(benchmark.items)
        by_group: dict[str, set[bytes]] = {}
        for group, item in zip(benchmark.groups, benchmark.items, strict=True):
            by_group.setdefault(group, set()).add(item.load_images()[0].tobytes())
        assert all(len(found) == 1 for found in by_group.values())
        assert len(set.union(*by_group.values())) == len(by_group)


@pytest.mark.parametrize("name", ["pope", "ohd", "mmsafety", "vnia"])
def test_every_item_is_told_a_behaviour_that_is_fitted_or_left_alone(make: Make, name: str):
    benchmark = make(name)
    training = training_of(benchmark)
    known = {pair.behaviour for pair in training.pairs}
    for one in (benchmark, held_of(benchmark)):
        told = training_of(one).told
        assert set(told) == {item.id for item in one.items}
        assert set(told.values()) <= known
    assert {name for group in training.equalise for name in group} <= known
    assert set(training.neutral) <= known


def test_requests_are_fitted_as_in_the_demo(make: Make):
    benchmark = make("mmsafety")
    assert isinstance(benchmark, RequestBenchmark)
    pairs = training_of(benchmark).pairs
    counts = {kind: sum(pair.behaviour == kind for pair in pairs) for kind in ("harmful", "advice", "harmless")}
    assert counts == {"harmful": 6, "advice": 2, "harmless": 6}
    advice = [one.id for one in WORLD.requests(6, "train", ("advice",))]
    assert [pair.id for pair in pairs if pair.behaviour == "advice"] == [advice[0], advice[3]]
    asked = {item.text for item in benchmark.items}
    assert not asked & {pair.prompt for pair in pairs}


def test_existence_is_fitted_on_as_many_yes_as_no(make: Make):
    for name in ("pope", "ohd"):
        labels = [pair.label for pair in training_of(make(name)).pairs]
        assert (labels.count(True), labels.count(False)) == (6, 6)
        expected = {item.id for item in fitting_items(WORLD, 6)}
        assert {pair.id for pair in training_of(make(name)).pairs} == expected


def test_means_of_told_closings_are_the_vectors_of_the_demos_caa(make: Make, tmp_path: Path):
    """CAA of the stance experiments caches the closing's tokens; extraction forces the same answers, its own way."""
    vlm = sp.attach(*sp.pocket.load())
    benchmark = make("vnia")
    assert isinstance(benchmark, StanceBenchmark)
    training = training_of(benchmark)
    item = benchmark.stances[0]
    pairs = [pair for pair in training.pairs if pair.behaviour == training.told[item.id]]
    assert len(pairs) == 6
    shifts = vlm.extract(pairs, "resid_post.1", target=training.target, progress=False)
    found = BehaviourMeans.fit(shifts).rows([training.told[item.id]])
    methods = StanceMethods(Bench(vlm, WORLD, tmp_path, 0, progress=False), packaged()["steervlm"], pictures=6)
    steering = methods.method("caa", [item], layer=1).steering([item.id])
    assert steering is not None
    (write,) = steering.intervention.writes
    assert isinstance(write.delta, FixedVector)
    torch.testing.assert_close(found.vector, write.delta.vector, rtol=1e-4, atol=1e-4)


def test_stances_are_worded_and_paired_by_id(make: Make):
    benchmark = make("vnia")
    assert isinstance(benchmark, StanceBenchmark)
    for item in benchmark.stances:
        target, converse = benchmark.pairs[item.id]
        assert (item.case.pair.target.text, item.case.pair.converse.text) == (target, converse)
        assert benchmark.worded[item.id] == stanced(item.case.pair.target) == f"{target} Describe the image."
    held = pocket_benchmark("vnia", WORLD, pictures=2, train=2, validation=2, group="held topics")
    assert isinstance(held, StanceBenchmark)
    assert {item.case.pair.target.topic for item in held.stances} <= set(sp.pocket.HELD_TOPICS)
    # Strengths are chosen on topics that are not held out.
    chosen = held_of(held)
    assert isinstance(chosen, StanceBenchmark)
    assert not {item.case.pair.target.topic for item in chosen.stances} & set(sp.pocket.HELD_TOPICS)


# -- the protocol -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_says_all_of_itself(make: Make, name: str):
    benchmark = make(name)
    assert benchmark.name == name
    assert benchmark.metric(benchmark.headline).name == benchmark.headline
    assert not benchmark.judges
    assert bool(benchmark.prompt) != bool(benchmark.worded)
    again = pocket_benchmark(name, WORLD, pictures=12, train=2, validation=2)
    other = pocket_benchmark(name, sp.pocket.World(9), pictures=12, train=2, validation=2)
    assert again.source == benchmark.source
    assert other.source["sha256"] != benchmark.source["sha256"]
    assert held_of(benchmark).source["sha256"] != benchmark.source["sha256"]


def test_what_cannot_be_made_is_refused():
    with pytest.raises(InputError, match=r"no benchmark 'popes'.*Did you mean 'pope'"):
        pocket_benchmark("popes", WORLD)
    with pytest.raises(InputError, match=r"pictures is 1: expected a whole number of pictures from 2 up"):
        pocket_benchmark("pope", WORLD, pictures=1)
    with pytest.raises(InputError, match=r"train is True: expected"):
        pocket_benchmark("pope", WORLD, train=True)
    with pytest.raises(InputError, match=r"group is 'held topic'.*Did you mean 'held topics'"):
        pocket_benchmark("vnia", WORLD, pictures=2, group="held topic")
    with pytest.raises(InputError, match=r"group='held topics' is for vnia; chair has no groups"):
        pocket_benchmark("chair", WORLD, group="held topics")
