"""The command line, run as a user runs it: files in, files out, errors as one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import steer_plugin as sp
from steer_plugin.cli import app, main


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
        "eval", "pope", "--pictures", "5", "--steering", workshop / "mean", "--steering", workshop / "l2s",
        "--out", workshop / "pope",
    )  # fmt: skip
    assert re.findall(r"\| (none|prompt|mean|l2s) ", table) == ["none", "prompt", "mean", "l2s"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "--shifts", "nowhere"], "nowhere"),
        (["steer", "--image", "no.png", "--question", "x", "--steering", "none"], "none"),
        (["extract", "--pairs", "no.jsonl", "--write", "resid_post.1"], "no.jsonl"),
        (["eval", "pope", "--data", "."], "AoiDragon/POPE"),
        (["eval", "pope", "--steering", "a/l2s", "--steering", "b/l2s"], "'l2s'"),
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


@pytest.mark.slow
def test_the_installed_command_exists():
    script = Path(sys.executable).with_name("steer-plugin")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert "Steer vision-language models" in done.stdout
