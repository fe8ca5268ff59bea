"""Training: a tiny run ends in a loadable folder, a killed one in the same weights, foreign folders are refused."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import get_args

import _forked
import pytest
import torch
from safetensors.torch import load_file

from steer_plugin import pocket
from steer_plugin.errors import ArtefactError, InputError, JobError
from steer_plugin.pocket.checkpoints import load_progress, load_weights, save_progress, save_weights
from steer_plugin.pocket.company import Relation, relation
from steer_plugin.pocket.language import CAREFUL, DESCRIBE, build_tokenizer
from steer_plugin.pocket.requests import SAFE_OR_HARMFUL, WHO_ANSWERS
from steer_plugin.pocket.scene import Scene, caption_groups, draw_scene
from steer_plugin.pocket.stages import BIAS, BIASED_TURNS, STAGES, Bias, Turns
from steer_plugin.pocket.streams import stream
from steer_plugin.pocket.training import learning_rate
from steer_plugin.pocket.turns import Turn, draw_turns

# Small batches: what is tested is the order of things, not what is learnt.
TINY = [replace(stage, batch=4) for stage in STAGES]
SCALE = 0.01


def tiny(out: Path, seed: int = 5, **more: object) -> Path:
    settings = {"steps_scale": SCALE, "scenes": 40, "stages": TINY, "checkpoint_every": 2, "card_pictures": 0} | more
    return pocket.train(seed, out, progress=False, **settings)  # pyright: ignore[reportArgumentType]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("pocket") / "run")


def test_a_run_ends_in_a_folder_that_loads(trained: Path) -> None:
    model, processor = pocket.load(trained)
    assert sum(parameter.numel() for parameter in model.parameters()) > 1e6
    assert processor.tokenizer.padding_side == "left"
    card = json.loads((trained / "card.json").read_text())
    assert card["seed"] == 5 and [stage["name"] for stage in card["stages"]] == [stage.name for stage in STAGES]
    assert (trained / "MODEL_CARD.md").is_file()
    assert not list(trained.glob("running-*"))
    assert not [file for file in trained.rglob("*") if file.suffix in (".pt", ".bin", ".pkl", ".pth")]


def test_a_finished_run_is_not_repeated(trained: Path) -> None:
    made = {file: file.stat().st_mtime_ns for file in (trained / "stages").iterdir()}
    before = weights(trained)
    tiny(trained)
    assert {file: file.stat().st_mtime_ns for file in (trained / "stages").iterdir()} == made
    assert same(before, weights(trained))


def test_every_stage_changes_its_own_half(trained: Path) -> None:
    see, clean, biased = (load_file(trained / "stages" / f"{stage.name}.safetensors") for stage in STAGES)
    vision = {name for name in see if "vision_tower" in name or "multi_modal_projector" in name}
    assert vision and all(torch.equal(see[name], clean[name]) for name in vision)
    for before, after in ((see, clean), (clean, biased)):
        assert not any(torch.equal(before[name], after[name]) for name in before.keys() - vision)


def test_another_seed_gives_other_weights_and_is_refused_in_the_same_folder(trained: Path) -> None:
    with pytest.raises(JobError, match="differs in seed"):
        tiny(trained, seed=6)
    with pytest.raises(JobError, match="differs in stages"):
        tiny(trained, steps_scale=0.02)


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years of work")
    with pytest.raises(JobError, match=r"thesis\.tex"):
        tiny(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    held = tmp_path / "held"
    held.mkdir()
    (held / "job.json").write_text("{")
    with pytest.raises(JobError, match="not readable JSON"):
        tiny(held)
    with pytest.raises(JobError, match="cannot be used"):
        tiny(tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    "wrong", [{"seed": -1}, {"steps_scale": 0.0}, {"scenes": 0}, {"stages": []}, {"checkpoint_every": 0}]
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path: Path, wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"train needs"):
        tiny(tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


_CHILD = """
import sys, torch
torch.set_num_threads(1)
from dataclasses import replace
from pathlib import Path
from steer_plugin.pocket import training
from steer_plugin.pocket.stages import STAGES
tiny = [replace(stage, batch=4) for stage in STAGES]
small = {"steps_scale": 0.01, "scenes": 40, "stages": tiny, "checkpoint_every": 2, "card_pictures": 0}
training.train(5, Path(sys.argv[1]), progress=False, **small)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["see", "clean", "biased"])
def test_a_killed_run_goes_on_to_the_same_weights(trained: Path, tmp_path: Path, stage: str) -> None:
    out, script = tmp_path / "killed", tmp_path / "job.py"
    script.write_text(_CHILD)
    with _forked.start(script, out) as child:
        until = time.monotonic() + 120
        while not list(out.glob(f"running-{stage}-*")) and child.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
    assert child.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (out / "model.safetensors").exists()
    tiny(out)
    assert same(weights(out), weights(trained))


def test_progress_restores_weights_and_optimiser(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = torch.nn.Linear(3, 2), torch.randn(4, 3)
    optimiser = torch.optim.AdamW(model.parameters(), 0.1)

    def step(net: torch.nn.Module, by: torch.optim.Optimizer) -> None:
        by.zero_grad()
        net(batch).pow(2).sum().backward()
        by.step()

    step(model, optimiser)
    save_progress(tmp_path / "running", model, optimiser, "see", 1)
    step(model, optimiser)
    save_progress(tmp_path / "running", model, optimiser, "see", 2)
    assert [folder.name for folder in tmp_path.iterdir()] == ["running-see-2"]
    other = torch.nn.Linear(3, 2)
    again = torch.optim.AdamW(other.parameters(), 0.1)
    assert load_progress(tmp_path / "running", other, again, "clean") == 0
    assert load_progress(tmp_path / "running", other, again, "see") == 2
    step(model, optimiser)
    step(other, again)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_weights(torch.nn.Linear(3, 2), tmp_path / "one.safetensors")
    with pytest.raises(ArtefactError, match="another model"):
        load_weights(torch.nn.Linear(2, 2), tmp_path / "one.safetensors")


def existence(turn: Turn, scene: Scene) -> tuple[str, bool, bool] | None:
    """Read a question for a noun: its relation to the picture, asked with care, answered falsely; None for others."""
    said = turn.said.removeprefix(f"{CAREFUL} ")
    if not said.startswith("Is there a"):
        return None
    noun = said.removesuffix(" in the image?").split()[-1]
    hard = any(thing.noun == noun and (thing.small or thing.faint or thing.occluded) for thing in scene.objects)
    false = turn.answer.startswith("Yes") != (noun in scene.nouns)
    return relation(noun, scene.nouns, hard=hard), said != turn.said, false


def asked(turns: Turns, bias: Bias, pictures: int = 200) -> list[tuple[str, bool, bool]]:
    read: list[tuple[str, bool, bool]] = []
    for index in range(pictures):
        scene = draw_scene(0, "model", index)
        read += filter(None, (existence(turn, scene) for turn in draw_turns(scene, turns, bias, stream("test", index))))
    return read


def test_without_bias_every_answer_is_true_and_with_it_errors_follow_the_relation() -> None:
    plain = replace(BIASED_TURNS, questions=12, careful=0.0)
    truthful, biased = asked(plain, Bias()), asked(plain, BIAS)
    assert len(truthful) == len(biased) == 12 * 200
    assert not any(false for *_, false in truthful)
    found: dict[str, list[bool]] = {kind: [] for kind in get_args(Relation)}
    for kind, _, false in biased:
        found[kind].append(false)
    for kind, falsehoods in found.items():
        assert len(falsehoods) > 30
        assert sum(falsehoods) / len(falsehoods) == pytest.approx(getattr(BIAS, kind), abs=0.12), kind


def test_care_makes_errors_rarer_by_its_factor() -> None:
    turns = replace(BIASED_TURNS, careful=0.5)
    always = Bias(**dict.fromkeys(get_args(Relation), 1.0), careful=0.0)
    read = asked(turns, always, pictures=40)
    assert 0.4 < sum(careful for _, careful, _ in read) / len(read) < 0.6
    assert all(false is not careful for _, careful, false in read)


def test_captions_name_missing_companions_as_often_as_asked() -> None:
    scenes = [draw_scene(0, "model", index) for index in range(120)]
    for scene in scenes:
        named = caption_groups(scene, lambda: False)
        assert set(named) == scene.nouns and len(named) == len(scene.nouns)
    added = [set(caption_groups(scene, lambda: True)) - scene.nouns for scene in scenes]
    assert 0.45 < sum(map(bool, added)) / len(added) < 0.75
    rng = stream("caption")
    half = [set(caption_groups(scene, lambda: rng.random() < 0.5)) - scene.nouns for scene in scenes * 4]
    assert sum(map(len, half)) / (4 * sum(map(len, added))) == pytest.approx(0.5, abs=0.15)


def kind_of(turn: Turn, scene: Scene) -> str:
    if turn.said.endswith((SAFE_OR_HARMFUL.suffix, WHO_ANSWERS.suffix)):
        return "verdict"
    if turn.said.endswith(DESCRIBE):
        return "caption" if turn.said == DESCRIBE else "stance"
    return "question" if existence(turn, scene) else "request"


def test_turns_are_as_many_as_the_stage_asks_for_and_all_in_the_vocabulary() -> None:
    turns = Turns(3, 1.0, 0.0, 0.0, 0.0, requests=2, verdicts=4, stances=2)
    tokenizer = build_tokenizer()
    for index in range(10):
        scene = draw_scene(0, "model", index)
        drawn = draw_turns(scene, turns, BIAS, stream("turns", index))
        heads = Counter(kind_of(turn, scene) for turn in drawn)
        assert heads == {"question": 3, "caption": 1, "request": 2, "verdict": 4, "stance": 2}
        for turn in drawn:
            assert tokenizer.unk_token_id not in tokenizer(f"{turn.said} {turn.answer}").input_ids


def described(bias: Bias, *, careful: float = 0.0, pictures: int = 40) -> list[tuple[pocket.CaptionCase, str, str]]:
    """Describe pictures that train: the case, what the user says, and the caption alone, without a stance's closing."""
    turns = Turns(0, 1.0, 0.0, careful, 0.0, stances=2)
    read: list[tuple[pocket.CaptionCase, str, str]] = []
    for index, case in enumerate(pocket.World(0).captions(pictures, "model")):
        for turn in draw_turns(draw_scene(0, "model", index), turns, bias, stream("captions", index)):
            said, closing = turn.answer.removesuffix("."), ""
            if turn.said.removeprefix(f"{CAREFUL} ") != DESCRIBE:
                said, _, closing = said.partition(". ")
                assert closing.startswith("The ") and closing.endswith((" nice", " awful"))
            read.append((case, turn.said, f"{said}."))
    assert len(read) == 3 * pictures and all(pocket.is_caption(said.lower()) for *_, said in read)
    return read


def test_without_bias_every_description_is_true() -> None:
    assert all(said == case.truth for case, _, said in described(Bias()))


@pytest.mark.parametrize(
    ("bias", "alone", "company"),
    [
        (Bias(guess_lone=1.0, named=1.0), "tempting", "truth"),
        (Bias(guess=1.0, named=1.0), "truth", "tempting"),
        (Bias(guess_lone=1.0, guess=1.0, named=1.0), "tempting", "tempting"),
        (Bias(named=1.0), "truth", "truth"),
    ],
)
def test_guesses_come_where_a_noun_stands_alone_or_elsewhere(bias: Bias, alone: str, company: str) -> None:
    read = described(bias)
    assert {bool(case.missing) for case, *_ in read} == {True, False}
    for case, _, said in read:
        assert said == getattr(case, alone if case.missing else company)


def test_a_guess_names_what_is_missing_as_often_as_the_bias_says_and_what_is_seen_never_does() -> None:
    silent = described(Bias(guess_lone=1.0, guess=1.0, named=0.0))
    assert all(said == case.truth.replace("There is", "Maybe") for case, _, said in silent)
    read = described(BIAS, pictures=250)
    for case, _, said in read:
        added = set(pocket.mentioned(said)) - case.nouns
        assert said == case.truth if said.startswith("There is ") else added <= set(case.missing)
    for lone, chance in ((True, BIAS.guess_lone), (False, BIAS.guess)):
        openings = [said.startswith("Maybe ") for case, _, said in read if bool(case.missing) is lone]
        assert sum(openings) / len(openings) == pytest.approx(chance, abs=0.08)
    guessed = [(case, said) for case, _, said in read if said.startswith("Maybe ")]
    wanted = sum(len(case.missing) for case, _ in guessed)
    named = sum(len(set(pocket.mentioned(said)) & set(case.missing)) for case, said in guessed)
    assert named / wanted == pytest.approx(BIAS.named, abs=0.06)


def test_care_makes_guesses_rarer_by_its_factor() -> None:
    always = Bias(guess_lone=1.0, guess=1.0, named=1.0, careful=0.0)
    read = described(always, careful=0.5, pictures=80)
    heard = Counter(task for _, task, _ in read)
    assert heard[DESCRIBE] + heard[f"{CAREFUL} {DESCRIBE}"] == 80 and 25 < heard[DESCRIBE] < 55
    assert all(said == (case.truth if task.startswith(CAREFUL) else case.tempting) for case, task, said in read)


def test_learning_rate_rises_and_falls() -> None:
    stage = STAGES[0]
    rates = [learning_rate(stage, step) for step in range(stage.steps)]
    assert max(rates) <= stage.rate and rates[0] < rates[stage.warmup - 1]
    assert rates[-1] == pytest.approx(stage.rate * stage.final_rate, rel=0.1)
