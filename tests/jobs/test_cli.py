"""The command line, run as a user runs it: files in, files out, errors as one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import steer_plugin as sp
from steer_plugin.cli import app, main
from steer_plugin.demo.benchmarks import SIZES
from steer_plugin.demo.usual import USUAL
from steer_plugin.errors import InputError
from steer_plugin.evaluation.lineup import Lineup


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: twelve pictures, their pairs as JSONL."""
    folder = tmp_path_factory.mktemp("user")
    rows = []
    for number, question in enumerate(sp.pocket.World(5).questions(6, "train", ("random",))):
        question.image.save(folder / f"{number}.png")
        right, wrong = ("yes", "no") if question.label else ("no", "yes")
        rows.append({
            "image": f"{number}.png", "prompt": question.text, "positive": f"{right}, the image",
            "negative": f"{wrong}, the image", "behaviour": right,
        })  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_own_files_from_pairs_to_a_steered_answer(workshop: Path, capfd: pytest.CaptureFixture[str]):
    run("extract", "--pairs", workshop / "pairs.jsonl", "--write", "resid_post.1", "--out", workshop / "shifts")
    assert len(sp.Shifts.load(workshop / "shifts")) == 12
    run("fit", "--shifts", workshop / "shifts", "--method", "mean", "--alpha", "3", "--out", workshop / "mean")
    run("fit", "--shifts", workshop / "shifts", "--hidden", "4", "--learning-rate", "0.001", "--out", workshop / "l2s")
    assert sp.MeanSteering.load(workshop / "mean").alpha == 3.0
    out = run(
        "steer", "--image", workshop / "0.png", "--question", "Is there a car in the image?",
        "--steering", workshop / "l2s", "--alpha", "2",
    )  # fmt: skip
    assert "unsteered" in out
    assert "steered" in out
    table = run(
        "eval", "pope", "--pictures", "3", "--steering", workshop / "mean", "--steering", workshop / "l2s",
        "--costs", "6", "--out", workshop / "pope",
    )  # fmt: skip
    names = ["none", "prompt", "mean", "- mean, swapped", "- mean, random", "l2s", "- l2s, swapped", "- l2s, random"]
    assert [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:10] == names
    assert {path.name for path in (workshop / "pope").iterdir()} >= {
        "answers", "costs", "metrics.json", "table.md", "scores.png", "costs.png"
    }  # fmt: skip
    assert (workshop / "pope" / "table.md").read_text() in table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "--shifts", "nowhere"], "nowhere"),
        (["steer", "--image", "no.png", "--question", "x", "--steering", "none"], "none"),
        (["extract", "--pairs", "no.jsonl", "--write", "resid_post.1"], "no.jsonl"),
        (["eval", "pope", "--data", "."], "RUCAIBox/POPE"),
        (["eval", "pope", "--steering", "a/l2s"], "a/l2s"),
        (["eval", "pope", "--methods", "l2"], "unknown method 'l2'. Did you mean 'l2s'"),
        (["eval", "pope", "--p-plus", "be kind"], "give --p-plus and --p-minus"),
        (["eval", "pope", "--seeds", "a"], "seeds are 'a': expected whole numbers such as 0,1,2"),
        (["eval", "pope", "--methods", "mean", "--alpha", "much"], "--alpha is 'much': expected a number, l2s=2"),
        (["eval", "pope", "--methods", "mean", "--alpha", "l2s=2,mean"], "--alpha is 'l2s=2,mean'"),
        (["eval", "pope", "--methods", "mean", "--alpha", "lts=2"], "a strength is given for 'lts'"),
        (["eval", "pope", "--methods", "mean", "--alpha", "nan"], "finite"),
        (["eval", "pope", "--alpha", "2"], "--alpha is the strength of methods that are fitted here"),
        (["eval", "pope", "--methods", "mean", "--read", "resid_post.1"], "--read resid_post.1 without --write"),
        (["eval", "pope", "--images", "."], "--images is for data in a folder"),
        (["eval", "mmsafety", "--part"], "--part is for data in a folder"),
        (["eval", "mmsafety", "--guard", "x"], "--guard is for data in a folder"),
        (["eval", "vnia", "--judge", "x"], "--judge is for data in a folder"),
        (["eval", "chair", "--synonyms", "x"], "--synonyms is for data in a folder"),
        (["eval", "pope", "--data", ".", "--pictures", "3"], "--pictures is for --data pocket"),
        (["eval", "pope", "--pictures", "1"], "pictures is 1"),
        (["eval", "pope", "--pictures", "2", "--costs", "1"], "costed=1 items"),
        (["eval", "vnia", "--methods", "norm_rnd", "--max-kl", "0"], "limit=0.0 cannot be used"),
        (["pocket", "export", "--format", "pop"], "got 'pop'. Did you mean 'pope'?"),
        (["pocket", "export", "--format", "pope", "--split", "tset"], "'tset'"),
        (["pocket", "export", "--pictures", "0"], "from 1 up, got 0"),
        (["pocket", "card", "run0"], "at least two runs, got 1"),
        (["pocket", "card", "run0", "run1", "--out", "shipped"], "run0/card.json"),
    ],
)
def test_errors_are_one_line_without_a_traceback(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["steer-plugin", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("steer-plugin: ")
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_help_names_every_command():
    out = run("--help")
    assert all(word in out for word in ("demo", "extract", "fit", "steer", "eval", "pocket"))
    pocket = run("pocket", "--help")
    assert all(word in pocket for word in ("train", "card", "show", "export"))


def test_contact_sheet_is_a_picture(tmp_path: Path):
    from PIL import Image

    run("pocket", "show", "--out", tmp_path / "sheet.png", "--pictures", "4")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert min(sheet.size) > 100


def trained(folder: Path, seed: int, regressed: float) -> Path:
    """What is left of a training run that the card of several seeds is made from."""
    run = folder / f"run{seed}"
    run.mkdir()
    seen = {"chair_i": 0.1, "chair_s": 0.2, "recall": 0.8}
    card = {
        "seed": seed,
        "behaviour": [
            {"accuracy": {"random": 0.9}, "mean_accuracy": 0.8, "affirmed_present": 0.85, "wellformed": 1.0, **seen}
        ],
        "conduct": [{"seen": seen, "guessed": seen, "rates": {"harmful, obeyed": {"value": 0.5}}}],
        "steering": {"accuracy": {"0": {"none": {"mean": 0.8}, "regressed": {"mean": regressed}}}},
    }
    (run / "card.json").write_text(json.dumps(card))
    (run / "MODEL_CARD.md").write_text(f"# Model of seed {seed}\n")
    for name in (
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "processor_config.json", "chat_template.jinja",
    ):  # fmt: skip
        (run / name).write_text(f"{name} of seed {seed}")
    return run


def test_card_without_runs_is_that_of_the_package():
    packaged = Path(sp.pocket.__file__).parent / "weights" / "MODEL_CARD.md"
    assert run("pocket", "card") == packaged.read_text(encoding="utf-8") + "\n"


def test_card_of_runs_shows_all_seeds_and_ships_the_median(tmp_path: Path):
    runs = [trained(tmp_path, seed, regressed) for seed, regressed in ((0, 0.86), (1, 0.92), (2, 0.88))]
    out = run("pocket", "card", *runs)
    assert "| regressed | 86.0 | 92.0 | 88.0 | 88.7 | 6.0 |" in out.splitlines()
    assert "Shipped: seed 2" in out
    assert sorted(tmp_path.iterdir()) == sorted(runs)
    shipped = tmp_path / "shipped"
    assert run("pocket", "card", *runs, "--out", shipped) == f"{out}shipped seed 2: {shipped}\n"
    assert (shipped / "model.safetensors").read_text() == "model.safetensors of seed 2"
    assert (shipped / "MODEL_CARD.md").read_text().startswith("# Model of seed 2\n\n## Over training seeds")
    assert set(json.loads((shipped / "card.json").read_text())["training_seeds"]) == {"0", "1", "2"}


def test_the_world_is_written_in_a_published_format(tmp_path: Path):
    out = run("pocket", "export", "--format", "pope", "--pictures", "2", "--out", tmp_path / "world")
    assert out == f"written: {tmp_path / 'world' / 'pope'}\n"
    rows = (tmp_path / "world" / "pope" / "coco_pope_popular.json").read_text().splitlines()
    asked = sp.pocket.World(0).questions(2, subsets=("popular",))
    assert [json.loads(row)["text"] for row in rows] == [question.text for question in asked]
    assert len(list((tmp_path / "world" / "pope" / "images").iterdir())) == 2
    several = run(
        "pocket", "export", "--format", "chair", "--format", "vnia", "--seed", "3", "--split", "train",
        "--pictures", "1", "--out", tmp_path / "more",
    )  # fmt: skip
    assert several.splitlines() == [f"written: {tmp_path / 'more' / name}" for name in ("chair", "vnia")]
    row = json.loads((tmp_path / "more" / "vnia" / "training_dataset.jsonl").read_text())
    assert row["image_id"] == sp.pocket.World(3).scene(0, "train").id


BENCHMARKS = ("pope", "ohd", "chair", "mmsafety", "vnia")
OWN_OPTIONS = {
    "--images": {"pope", "ohd", "chair", "vnia"},
    "--fitting": {"pope", "ohd"},
    "--synonyms": {"chair"},
    "--limit": {"chair"},
    "--part": {"ohd", "mmsafety", "vnia"},
    "--preset": {"mmsafety"},
    "--guard": {"mmsafety"},
    "--judge": {"mmsafety", "vnia"},
    "--judge-url": {"mmsafety", "vnia"},
    "--p-plus": {"pope", "ohd", "chair", "mmsafety"},
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_of_a_benchmark_has_its_own_options_alone(name: str):
    shown = set(re.findall(r"--[a-z][a-z-]*", run("eval", name, "--help")))
    assert {option for option in OWN_OPTIONS if option in shown} == {
        option for option, names in OWN_OPTIONS.items() if name in names
    }
    assert {"--out", "--data", "--methods", "--steering", "--alpha", "--seeds", "--sample", "--costs"} <= shown


def provenance(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text())["provenance"]


def test_two_steerings_of_one_name_are_refused(workshop: Path, tmp_path: Path):
    for place in ("a", "b"):
        sp.MeanSteering(torch.ones(128), "resid_post.1").save(tmp_path / place / "mine")
    words = ["eval", "pope", "--out", tmp_path / "out"]
    for place in ("a", "b"):
        words += ["--steering", tmp_path / place / "mine"]
    with pytest.raises(InputError, match="two methods would be called 'mine'"):
        run(*words)
    assert not (tmp_path / "out").exists()


def test_a_steering_in_the_working_folder_has_that_folders_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sp.MeanSteering(torch.ones(128), "resid_post.1").save(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    few = ["--pictures", "2", "--methods", "none", "--costs", "0", "--no-figures", "--no-controls"]
    run("eval", "pope", *few, "--steering", ".", "--out", tmp_path / "out")
    assert {path.stem for path in (tmp_path / "out" / "answers").iterdir()} == {"none", "mine"}


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_runs_on_the_pocket_world(name: str, tmp_path: Path):
    methods = "none,prompt" + (",steervlm" if name in ("vnia", "ohd") else "")
    out = run(
        "eval", name, "--data", "pocket", "--pictures", "4", "--methods", methods, "--costs", "4", "--out", tmp_path
    )
    assert f"# {name}" in out and f"written: {tmp_path / 'table.md'}" in out
    kept = json.loads((tmp_path / "metrics.json").read_text())
    assert kept["benchmark"] == name and kept["headline"] in kept["scores"]["none"]
    steered = {"steervlm", "steervlm, pair swapped", "steervlm, swapped", "steervlm, random"}
    assert set(kept["scores"]) == {"none", "prompt"} | (steered if "steervlm" in methods else set())
    assert kept["costs"]["none"]["kl"] == [0, 0, 0] and kept["costs"]["prompt"]["kl"] is None
    before = (tmp_path / "metrics.json").read_bytes()
    assert set(USUAL) == set(BENCHMARKS) == set(SIZES)
    run("eval", name, "--data", "pocket", "--pictures", "4", "--methods", methods, "--costs", "4", "--out", tmp_path)
    assert (tmp_path / "metrics.json").read_bytes() == before


FEW = ("--costs", "0", "--no-figures")


def test_positions_of_the_user_go_before_the_usual_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[Lineup] = []

    def stop(vlm: object, benchmark: object, lineup: Lineup, *rest: object, **options: object) -> None:
        asked.append(lineup)
        raise InputError("stopped")

    monkeypatch.setattr("steer_plugin.evaluation.evaluate.evaluate", stop)
    monkeypatch.setattr("steer_plugin.cli_eval.pocket_data", lambda *rest: None)
    monkeypatch.setattr(Lineup, "check", lambda lineup, benchmark: None)
    words = ["eval", "pope", "--pictures", "2", "--methods", "mean", "--alpha", "2", *FEW, "--out", tmp_path]
    for more in ((), ("--positions", "everywhere"), ("--write", "resid_post.2")):
        with pytest.raises(InputError, match="stopped"):
            run(*words, *more)
    assert [(one.write, one.read, one.positions) for one in asked] == [
        ("resid_post.1", "resid_post.1", "last_prompt"),
        ("resid_post.1", "resid_post.1", "everywhere"),
        ("resid_post.2", None, "paper"),
    ]
    assert [one.alpha for one in asked] == [2.0] * 3


@pytest.mark.slow
def test_fitted_methods_run_with_their_controls(tmp_path: Path):
    run(
        "eval", "vnia", "--pictures", "4", "--methods", "none,mean,p2s,actadd", "--write", "resid_post.2", "--seeds",
        "3,4", "--alpha", "mean=2,p2s=1,actadd=1", "--costs", "4", "--out", tmp_path,
    )  # fmt: skip
    kept = provenance(tmp_path)["methods"]
    assert {name: kept[name][0]["note"]["alpha"] for name in ("mean", "p2s", "actadd")} == {
        "mean": 2.0, "p2s": 1.0, "actadd": 1.0
    }  # fmt: skip
    assert [row["seed"] for row in kept["mean, random"]] == [3, 4]
    assert len(kept["mean"]) == 1


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    sp.pocket.export(sp.pocket.World(0), folder, pictures=20, formats=("pope", "mmsafety"))
    return folder


@pytest.mark.slow
def test_a_folder_of_pope_is_split_fitted_and_tested(exported: Path, tmp_path: Path):
    words = ["eval", "pope", "--data", exported / "pope", *FEW]
    run(*words, "--out", tmp_path / "all")
    assert provenance(tmp_path / "all")["data"]["questions"] == 20 * 6
    run(
        *words, "--methods", "none,mean,l2s", "--write", "resid_post.1", "--alpha", "2", "--fitting", "0.5",
        "--no-controls", "--out", tmp_path / "fitted",
    )  # fmt: skip
    kept = provenance(tmp_path / "fitted")
    assert kept["data"]["questions"] == 10 * 6
    assert kept["methods"]["mean"][0]["note"]["alpha"] == 2.0
    with pytest.raises(InputError, match="need a site to write at"):
        run(*words, "--methods", "mean", "--out", tmp_path / "nowhere")


@pytest.mark.slow
def test_a_part_of_mmsafety_is_taken_on_request(exported: Path, tmp_path: Path):
    words = ["eval", "mmsafety", "--data", exported / "mmsafety", *FEW]
    with pytest.raises(InputError, match="lacks 02-HateSpeech"):
        run(*words, "--out", tmp_path / "whole")
    sp.MeanSteering(torch.ones(128), "resid_post.1").save(tmp_path / "mine")
    run(*words, "--part", "--steering", tmp_path / "mine", "--out", tmp_path / "part")
    scores = json.loads((tmp_path / "part" / "metrics.json").read_text())["scores"]
    assert set(scores) == {"none", "prompt", "mine", "mine, swapped", "mine, random"}
    assert set(scores["none"]) == {"ED"}
    # The authors' suffixes are Greek to so small a model: both are the same unknown words.
    with pytest.raises(InputError, match=r"leave the same state at resid_post\.1, so there is no vector"):
        run(*words, "--part", "--methods", "mean", "--write", "resid_post.1", "--out", tmp_path / "fitted")


@pytest.mark.slow
def test_the_installed_command_exists():
    script = Path(sys.executable).with_name("steer-plugin")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert "Steer vision-language models" in done.stdout


def test_pope_is_read_from_a_table_of_the_hub_and_asked_in_other_words(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    asked = sp.pocket.World(0).questions(3)
    rows = [
        {
            "id": str(number), "question_id": str(number), "question": one.text, "answer": "yes" if one.label else "no",
            "image_source": one.scene_id, "image": one.image, "category": one.subset,
        }
        for number, one in enumerate(asked)
    ]  # fmt: skip
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "pope.parquet"))
    words = ["eval", "pope", "--data", tmp_path / "pope.parquet", "--methods", "none", *FEW]
    run(*words, "--out", tmp_path / "usual")
    run(*words, "--wording", "remark", "--out", tmp_path / "other")
    usual, other = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("usual", "other"))
    assert usual["items"] == len(asked) == 18
    assert other["provenance"]["data"]["wording"] == "remark"
    said = (tmp_path / "usual" / "answers" / "none.jsonl").read_text().splitlines()[1:]
    assert len(said) == len({(one.scene_id, one.text) for one in asked})


def test_pairs_of_your_own_are_for_captions(tmp_path: Path):
    with pytest.raises(InputError, match="--pairs is for data in a folder"):
        run("eval", "chair", "--pairs", tmp_path / "pairs.jsonl", "--out", tmp_path)
