"""Training SteerVLM: only the module learns, answers alone are scored, killed runs resume, processes agree."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _forked
import pytest
import torch
from torch import Tensor

import steer_plugin as sp
from steer_plugin.training.trainee import Collator, Trainee

sys.path.insert(0, str(Path(__file__).parent))
from _steervlm_job import config, rows, vlm

JOB = Path(__file__).with_name("_steervlm_job.py")
SHORT = sp.SteerVLMTraining(steps=3, batch_size=4, learning_rate=1e-2, log_every=1)


def weights(steering: sp.SteerVLM) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in steering.module.state_dict().items()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_module_learns(checkpointing: bool):
    model = vlm()
    before = {name: p.clone() for name, p in model.root.named_parameters()}
    start = weights(sp.SteerVLM.new(config(), 0))
    trained = sp.SteerVLM.fit(
        model, rows(), config(), dataclasses.replace(SHORT, checkpointing=checkpointing), progress=False
    )
    assert all(torch.equal(p, before[name]) for name, p in model.root.named_parameters())
    assert all(p.grad is None for p in model.root.parameters())
    assert all(p.requires_grad for p in model.root.parameters()), "the model's own settings come back"
    assert not any(module.training for module in model.root.modules())
    assert not model.root.is_gradient_checkpointing
    assert all(not torch.equal(value, start[name]) for name, value in weights(trained).items())
    assert not any(p.requires_grad for p in trained.module.parameters())


def test_checkpointing_learns_the_same():
    plain, recomputed = (
        sp.SteerVLM.fit(vlm(), rows(), config(), dataclasses.replace(SHORT, checkpointing=on), progress=False)
        for on in (False, True)
    )
    # Losses, not weights: Adam's first steps blow rounding up where a gradient is almost zero.
    first, second = ([entry["loss"] for entry in one.report["history"]] for one in (plain, recomputed))
    assert second == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize("where", ["last_prompt|generated", "everywhere", "generated & ~image", "~prompt"])
def test_the_loss_is_that_of_the_answers_tokens_alone(where: str):
    """Mean over all answer tokens of a batch of different lengths, against each row alone under `vlm.steering`."""
    model, steering = vlm(), sp.SteerVLM.new(config(), 1).with_positions(where)
    with torch.no_grad():
        steering.module.steerer.up.weight.mul_(25)
    collator, batch = Collator(model, None), rows(5)
    trainee = Trainee(model, steering)
    loss = trainee(**collator(batch))["loss"]
    trainee.close()
    total, count = 0.0, 0
    for row in batch:
        inputs = model.inputs(row.task, row.load_image())
        answer = torch.tensor([collator.answer(row)])
        ids = torch.cat([inputs["input_ids"], answer], 1)
        bound = steering.pair(row.p_plus, row.p_minus).with_positions(
            where.replace("generated", "(generated|completion)")
        )
        with torch.no_grad(), model.steering(bound, completion_tokens=answer.shape[1]) as steered:
            logits = steered(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"]
            ).logits[0, -answer.shape[1] - 1 : -1]
        total -= float(logits.log_softmax(-1).gather(1, answer.T).sum())
        count += answer.shape[1]
    assert float(loss.detach()) == pytest.approx(total / count, rel=1e-4)


def test_nothing_is_printed_without_progress(capsys: pytest.CaptureFixture[str]):
    sp.SteerVLM.fit(vlm(), rows(), config(), SHORT, progress=False)
    assert "loss" not in capsys.readouterr().out


def test_positions_while_training():
    assert str(sp.Positions.parse("paper").forced()) == "last_prompt|generated|completion"
    assert str(sp.Positions.parse("everywhere").forced()) == "everywhere"


def test_report_and_artefact(tmp_path: Path):
    trained = sp.SteerVLM.fit(
        vlm(), rows(), config(), SHORT, seed=3, out=tmp_path, positions="everywhere", progress=False
    )
    again = sp.SteerVLM.load(tmp_path / "steervlm")
    report = again.report
    assert report is not None
    assert [entry["step"] for entry in report["history"]] == [1, 2, 3]
    assert (report["seed"], report["rows"], str(again.positions)) == (3, 16, "everywhere")
    assert report["model"]["family"] == "llava"
    for name, value in weights(trained).items():
        assert torch.equal(weights(again)[name], value)
    names = {path.name for path in (tmp_path / "steervlm").iterdir()}
    assert not any("model" in name and "steervlm" not in name for name in names)
    largest = max(path.stat().st_size for path in (tmp_path / "steervlm").iterdir())
    assert largest < 6 * sum(p.numel() for p in trained.module.parameters())


def test_a_folder_holds_one_training(tmp_path: Path):
    sp.SteerVLM.fit(vlm(), rows(), config(), SHORT, out=tmp_path, progress=False)
    for changed in ({"seed": 1}, {"rows": rows()[:-1]}, {"training": dataclasses.replace(SHORT, steps=4)}):
        asked = {"rows": rows(), "config": config(), "training": SHORT, "seed": 0, **changed}
        with pytest.raises(sp.JobError, match="another training"):
            sp.SteerVLM.fit(vlm(), **asked, out=tmp_path, progress=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    _forked.start(JOB, folder).finish()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("until", [2, 6])
def test_killed_and_resumed(whole: Path, tmp_path: Path, until: int):
    killed = tmp_path / "killed"
    with _forked.start(JOB, killed) as job:
        deadline = time.monotonic() + 120
        while not (killed / f"checkpoint-{until}").exists() and time.monotonic() < deadline and job.poll() is None:
            time.sleep(0.001)
        job.send_signal(signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
    assert not (killed / "steervlm").exists(), "the run had ended before it was killed"
    _forked.start(JOB, killed).finish()
    first, second = (sp.SteerVLM.load(folder / "steervlm") for folder in (whole, killed))
    for name, value in weights(first).items():
        assert torch.equal(weights(second)[name], value), name
    assert first.report["history"] == second.report["history"]


@pytest.mark.slow
def test_a_half_written_checkpoint_is_thrown_away(tmp_path: Path):
    _forked.start(JOB, tmp_path, "--steps", "4").finish()
    expected = weights(sp.SteerVLM.load(tmp_path / "steervlm"))
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"half')
    _forked.start(JOB, tmp_path, "--steps", "4").finish()
    for name, value in weights(sp.SteerVLM.load(tmp_path / "steervlm")).items():
        assert torch.equal(value, expected[name])


@pytest.mark.slow
def test_two_processes_and_accumulation_give_one_gradient(tmp_path: Path):
    """Eight rows at once, twice four, and four in each of two gloo processes; answers differ in length."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517"]
    found: list[list[Tensor]] = []
    for name, *options in (("one", "--batch", "8"), ("accumulated", "--batch", "4", "--accumulate", "2"), ("two",)):
        path = tmp_path / f"{name}.pt"
        words = [str(tmp_path / name), "--steps", "1", "--gradients", str(path), *options]
        if name == "two":
            subprocess.run([*torchrun, str(JOB), *words, "--batch", "4"], check=True, capture_output=True)
        else:
            _forked.start(JOB, *words).finish()
        found.append(torch.load(path, weights_only=True))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    assert max(float(g.abs().max()) for g in found[0]) > 1e-4


@pytest.mark.slow
def test_eight_rows_are_overfitted():
    model = sp.attach(*sp.pocket.load())
    cases = sp.pocket.World(0).stances(8, "train")
    data = [
        sp.SteeringRow(c.id, c.image, "Describe the image.", c.pair.target.text, c.pair.converse.text, c.answer)
        for c in cases
    ]
    sized = sp.SteerVLMConfig(model.d_model, model.n_layers, reduction=2, heads=4)
    training = sp.SteerVLMTraining(steps=80, batch_size=8, learning_rate=5e-3)
    trained = sp.SteerVLM.fit(model, data, sized, training, progress=False)
    assert trained.report["history"][-1]["loss"] < 0.05
    inputs = model.inputs([row.task for row in data], [row.image for row in data])
    bound = trained.pair([row.p_plus for row in data], [row.p_minus for row in data])
    said = model.decode(
        model.generate(**inputs, steering=bound, max_new_tokens=40, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    )
    right = [
        text.replace(" ", "").lower() == row.answer.replace(" ", "").lower()
        for text, row in zip(said, data, strict=True)
    ]
    assert sum(right) >= 7


@pytest.mark.parametrize(
    "change,message",
    [
        ({"rows": []}, "needs rows"),
        ({"rows": rows()[:1] * 2}, "one id"),
        ({"training": sp.SteerVLMTraining(max_tokens=8)}, "16 of 16 rows .* no answer token"),
        ({"config": sp.SteerVLMConfig(64, 4)}, "d_model"),
    ],
)
def test_bad_trainings(change: dict[str, Any], message: str):
    asked = {"rows": rows(), "config": config(), "training": SHORT, **change}
    with pytest.raises((sp.InputError, sp.ArtefactError), match=message):
        sp.SteerVLM.fit(vlm(), **asked, progress=False)


def test_bad_hyperparameters():
    for options in ({"steps": 0}, {"learning_rate": 0.0}, {"warmup": 1.0}, {"precision": "fp8"}):
        with pytest.raises(sp.InputError):
            sp.SteerVLMTraining(**options)


def test_a_model_without_its_processor():
    from _tiny import tiny_llava

    with pytest.raises(sp.InputError, match="processor"):
        sp.SteerVLM.fit(sp.attach(tiny_llava()), rows(), config(), SHORT, progress=False)


def test_rows_say_what_is_missing():
    with pytest.raises(sp.InputError, match="answer is ''"):
        dataclasses.replace(rows()[0], answer="")
    assert json.dumps(SHORT.as_json())
