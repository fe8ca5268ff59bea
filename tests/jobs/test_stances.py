"""SteerVLM on the pocket world: the bench by hand, the experiments' report, and what the packaged module reaches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from _naive import naive_tokens
from typer.testing import CliRunner

import steer_plugin as sp
from steer_plugin.cli import app
from steer_plugin.demo.bench import Bench
from steer_plugin.demo.stance_experiments import StanceConfig, packaged, run_stances
from steer_plugin.demo.stance_training import TOPICS
from steer_plugin.demo.stances import (
    FRESH_TOPICS,
    GROUPS,
    TOKENS,
    Choice,
    StanceItem,
    StanceMethods,
    choose,
    counted,
    described,
    stance_items,
)
from steer_plugin.pocket import HELD_TOPICS, SEEN_TOPICS


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(sp.attach(*sp.pocket.load()), sp.pocket.World(23), tmp_path_factory.mktemp("out"), 0, progress=False)


def test_groups_hold_out_what_they_say():
    items = stance_items(sp.pocket.World(3), 30)
    for group, (topics, wordings) in GROUPS.items():
        found = [item.case.pair.target for item in items if item.group == group]
        assert len(found) == 30
        assert {stance.topic for stance in found} <= set(topics)
        assert ("really" in " ".join(stance.text for stance in found)) == (wordings == "train")
    assert not set(SEEN_TOPICS) & set(HELD_TOPICS)
    held = {*HELD_TOPICS, *FRESH_TOPICS}
    assert not held & set(TOPICS)
    assert len({item.key for item in items}) == len(items)


def test_counting_by_hand():
    (item,) = stance_items(sp.pocket.World(3), 1, groups=("trained",))
    target, true = item.case.pair.target, described(item.case.answer)
    nouns = set(sp.pocket.mentioned(true))
    word, other = ("nice", "awful") if target.loved else ("awful", "nice")
    cases: dict[str, tuple[float, float, float, int]] = {
        f"{true}. The {target.topic} is {word}.": (1, 0, 1, len(nouns)),
        f"{true}. The {target.topic} is {other}.": (0, 1, 0, len(nouns)),
        f"{true}. The fog is {word}." if target.topic != "fog" else f"{true}. The ice is {word}.": (
            0,
            0,
            1,
            len(nouns),
        ),
        # a closing about a noun names nothing that was seen
        f"there is a sky. The {sorted(nouns)[0]} is {word}.": (0, 0, 1, 0),
        "": (0, 0, 0, 0),
    }
    for said, expected in cases.items():
        rows = counted([item], {item.key: said})["trained"]
        got = tuple(float(rows[metric][0, 0]) for metric in ("target", "converse", "attitude", "recall"))
        assert got == expected, said
        assert rows["recall"][0, 1] == len(nouns)


def test_vectors_of_a_reversed_pair_are_opposite(bench: Bench):
    items = stance_items(bench.world, 2, groups=("trained",))
    methods = StanceMethods(bench, packaged()["steervlm"], pictures=2)
    pair = (items[0].case.pair.target.text, items[0].case.pair.converse.text)
    methods.method("caa", items)
    for name in ("caa", "actadd"):
        first, second = (methods._added(name, [one], 1, 1.0) for one in (pair, pair[::-1]))
        vectors = [one.intervention.writes[0].delta.vector for one in (first, second)]
        assert torch.equal(vectors[0], -vectors[1])
        assert float(vectors[0].norm()) > 0.1


def test_actadd_is_the_difference_of_two_bare_prompts(bench: Bench):
    """By hand on the plain model: residual stream of the last token of each prompt."""
    methods = StanceMethods(bench, packaged()["steervlm"])
    found = methods._actadd(("I love the rain.", "I hate the rain."))
    model, processor = sp.pocket.load()
    ends = []
    for text in ("I love the rain.", "I hate the rain."):
        ids = processor.tokenizer(f"USER: {text} ASSISTANT:", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model(input_ids=ids, output_hidden_states=True)
        ends.append(torch.stack([state[0, -2] for state in out.hidden_states[1:-1]]))
    torch.testing.assert_close(found[:-1], ends[0] - ends[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["paper", "everywhere"])
def test_equals_the_naive_two_passes_on_the_pocket_model(bench: Bench, where: str):
    """Trained module, real captions, prompts of different length in one batch."""
    plain, processor = sp.pocket.load()
    steering = packaged()["steervlm"].with_positions(where)
    pairs = [
        ("I love the rain.", "I hate the rain."),
        ("We fear the dark.", "We enjoy the dark."),
        ("I adore ice.",) * 2,
    ]
    scenes = [bench.world.scene(index) for index in range(3)]
    prompts = ["Describe the image.", "Be careful. Describe the image.", "Describe the image."]
    inputs = bench.vlm.inputs(prompts, [scene.image for scene in scenes])
    got = bench.vlm.generate(
        **inputs,
        steering=steering.pair(*zip(*pairs, strict=True)),
        max_new_tokens=14,
        min_new_tokens=14,
        do_sample=False,
    )[:, -14:]
    tokenizer = processor.tokenizer
    for row, pair in enumerate(pairs):
        spelled = []
        for text in pair:
            before, own = (len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in ("USER:", text))
            ids = tokenizer(f"USER: {text} ASSISTANT:")["input_ids"]
            spelled.append((ids, slice(1 + before, 1 + before + own)))
        one = bench.vlm.inputs(prompts[row], scenes[row].image)
        never = (tokenizer.eos_token_id,)
        expected = naive_tokens(
            plain,
            "model.language_model",
            "model.language_model.layers",
            steering.module,
            spelled,
            one,
            where,
            14,
            never,
        )
        assert got[row].tolist() == expected


@pytest.mark.slow
def test_experiments_write_a_report_and_go_on(tmp_path: Path):
    config = StanceConfig(pictures=4, validation_pictures=4, alphas=(0.5, 1.0))
    result = run_stances(tmp_path, config, progress=False)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["scores"]) == {*config.methods, "without_u", "without_gate"}
    assert report["scores"]["none"]["trained"]["target"][0] == 0
    assert len(report["gate_by_layer"]["caption"]) == 4
    assert "| steervlm" in (tmp_path / "report.md").read_text()
    answers = {path: path.read_text() for path in (tmp_path / "answers").iterdir()}
    again = run_stances(tmp_path, config, progress=False)
    assert {path: path.read_text() for path in (tmp_path / "answers").iterdir()} == answers
    for name, groups in result.scores.items():
        assert {g: {m: s.value for m, s in found.items()} for g, found in again.scores[name].items()} == {
            g: {m: s.value for m, s in found.items()} for g, found in groups.items()
        }


def test_trained_modules_are_known_by_name():
    configs = {name: module.module.config for name, module in packaged().items()}
    assert {name: (config.unsteered, config.gate) for name, config in configs.items()} == {
        "steervlm": (True, True), "without_u": (False, True), "without_gate": (True, False),
    }  # fmt: skip
    assert sp.SteerVLM.load(sp.pocket.trained()).model["family"] == "llava"
    with pytest.raises(sp.InputError, match="without_gate"):
        sp.pocket.trained("gate")


def test_steer_on_the_command_line(tmp_path: Path):
    sp.pocket.World(23).scene(0).image.save(tmp_path / "scene.png")
    asked = ["steer", "--image", str(tmp_path / "scene.png"), "--question", "Describe the image."]
    asked += ["--steering", str(sp.pocket.trained()), "--p-plus", "I love the rain.", "--p-minus", "I hate the rain."]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert "the rain is nice" in " ".join(result.output.replace("│", " ").split())


def test_train_on_the_command_line(tmp_path: Path):
    result = CliRunner().invoke(
        app, ["train", "steervlm", "--out", str(tmp_path), "--pictures", "8", "--steps", "2", "--batch-size", "4"]
    )
    assert result.exit_code == 0, result.output
    assert sp.SteerVLM.load(tmp_path / "steervlm").report["rows"] == 64


@pytest.fixture(scope="module")
def measured(bench: Bench) -> dict[str, dict[str, dict[str, float]]]:
    """Shares by method, group and metric on World 23, which nothing was chosen on."""
    methods = StanceMethods(bench, packaged()["steervlm"])
    items = stance_items(bench.world, 40)
    found: dict[str, dict[str, dict[str, float]]] = {}
    choices = {name: choose(methods, name, 16, (1.0, 2.0, 4.0, 8.0)) for name in ("caa", "actadd")}
    for name in ("none", "prompt", "caa", "actadd", "steervlm", "swapped", "equal"):
        these = [StanceItem(item.case, item.group, worded=True) for item in items] if name == "prompt" else items
        at = choices.get(name, Choice())
        texts = bench.try_out(these, methods.method(name, these, at.layer, at.alpha), TOKENS)
        found[name] = {
            group: {metric: float(values[:, 0].sum() / values[:, 1].sum()) for metric, values in rows.items()}
            for group, rows in counted(these, texts).items()
        }
    return found


@pytest.mark.slow
def test_the_packaged_module_does_what_its_pairs_ask_for(measured: dict[str, dict[str, dict[str, float]]]):
    ours, none = measured["steervlm"], measured["none"]
    assert ours["trained"]["target"] >= 0.9
    assert ours["trained"]["converse"] <= 0.05
    for group in ("held topics", "fresh topics"):
        assert ours[group]["attitude"] >= 0.9
        assert ours[group]["converse"] <= 0.05
        assert ours[group]["target"] >= 0.5
    for group, found in ours.items():
        assert none[group]["recall"] - found["recall"] <= 0.05, group


@pytest.mark.slow
def test_swapped_and_equal_pairs(measured: dict[str, dict[str, dict[str, float]]]):
    assert measured["swapped"]["trained"]["converse"] >= 0.9
    assert measured["swapped"]["trained"]["target"] <= 0.05
    for metric in ("target", "converse", "attitude"):
        assert measured["equal"]["trained"][metric] <= 0.05
        assert measured["equal"]["held topics"][metric] <= 0.05


@pytest.mark.slow
def test_it_beats_caa_and_actadd_and_prompting_is_the_ceiling(measured: dict[str, dict[str, dict[str, float]]]):
    for group in GROUPS:
        others = max(measured[name][group]["target"] for name in ("caa", "actadd"))
        # "both held" is the weakest group: new words for new topics.
        assert measured["steervlm"][group]["target"] >= others + (0.02 if group == "both held" else 0.2), group
        assert measured["prompt"][group]["target"] >= measured["steervlm"][group]["target"] - 0.05
        assert measured["prompt"][group]["target"] >= 0.9
