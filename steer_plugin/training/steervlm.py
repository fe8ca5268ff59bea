"""Training SteerVLM through the frozen model, with transformers' Trainer: loop, checkpoints, resume, several processes.

Only the module is trained and saved. `out` holds the Trainer's checkpoints while it runs, `job.json`, and in the end
the artefact in `out/steervlm`; the same call after a crash goes on from the last whole checkpoint, to the same weights.

Rows are dealt out in one order, drawn from the seed: a step of n processes with batches of b takes the n * b rows that
a step of one process with a batch of n * b takes, as long as n * b divides the number of rows. (Otherwise the last step
of an epoch is filled up with rows from its beginning.) The loss is averaged over the answer tokens of the whole step,
so the steps are the same up to rounding.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from steer_plugin.adapters import AttachedModel
from steer_plugin.adapters._chat import chat_text
from steer_plugin.adapters._inputs import encode
from steer_plugin.artefact import versions
from steer_plugin.atomic import JSON, atomic_write_json
from steer_plugin.contrast.rows import SteeringRow
from steer_plugin.errors import InputError, JobError
from steer_plugin.methods.steervlm import SteerVLM
from steer_plugin.processes import Processes
from steer_plugin.training.steervlm_config import SteerVLMTraining
from steer_plugin.training.trainee import Collator, Trainee, frozen, processor_of, thawed


def train_steervlm(
    vlm: AttachedModel,
    rows: Sequence[SteeringRow],
    steering: SteerVLM,
    training: SteerVLMTraining | None = None,
    *,
    out: Path | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SteerVLM:
    """Train a module in place on rows (picture, task, p+, p-, answer) and return it frozen, with its report.

    Of several processes each calls this and gets the same weights; the first one saves them.

    Raises:
        InputError: no rows, no processor, rows without room for an answer, a module of another model.
        JobError: `out` holds another training, or another process has ended.
    """
    processes = Processes.current()
    chosen = SteerVLMTraining() if training is None else training
    _check(vlm, rows, steering, chosen)
    job = _job(vlm, rows, steering, chosen, seed)
    if processes.several:
        job["processes"] = processes.count
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()) if out is None else out)
        last = _resumable(folder, job, processes if out is not None else Processes())
        stack.callback(thawed, vlm, frozen(vlm))
        steering.module.requires_grad_(True).train()
        stack.callback(lambda: steering.module.requires_grad_(False).eval())
        collator = Collator(vlm, chosen.max_tokens)
        trainee = Trainee(
            vlm, steering.with_alpha(chosen.alpha), checkpointing=chosen.checkpointing,
            vocabulary=collator.vocabulary(rows) if chosen.closed else None,
        )  # fmt: skip
        stack.callback(trainee.close)
        trainer = Trainer(
            model=trainee,
            args=_arguments(folder, chosen, seed, vlm.device, progress=progress),
            train_dataset=cast("Any", list(rows)),
            data_collator=cast("Any", collator),
        )
        trainer.remove_callback(PrinterCallback)  # without its bar, the Trainer would print every entry of its log
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
    report: dict[str, JSON] = {
        **job,
        "history": [{"step": int(entry["step"]), "loss": float(entry["loss"])} for entry in history],
        "versions": cast("JSON", versions()),
    }
    made = SteerVLM(
        steering.module, positions=steering.positions, alpha=steering.alpha, model=vlm.parts.identity(), report=report
    )
    if out is not None and processes.main:
        made.save(Path(out) / "steervlm")
    processes.wait()
    return made


def _check(vlm: AttachedModel, rows: Sequence[SteeringRow], steering: SteerVLM, training: SteerVLMTraining) -> None:
    """Refuse, before any work, what would fail in the middle of it."""
    if not rows:
        raise InputError("training needs rows (picture, task, p+, p-, answer), got none.")
    if len({row.id for row in rows}) != len(rows):
        raise InputError("two training rows have one id; ids name rows in messages and in the job's hash.")
    processor_of(vlm)
    config = steering.module.config
    vlm.parts.check(steering.pair(rows[0].p_plus, rows[0].p_minus).intervention)
    for text in sorted({text for row in rows for text in (row.p_plus, row.p_minus)}):
        vlm.asides.spelled(text, config.form)
    if training.max_tokens is not None:
        _check_room(vlm, rows, training.max_tokens)


def _check_room(vlm: AttachedModel, rows: Sequence[SteeringRow], most: int) -> None:
    """Every prompt must leave room for an answer; the picture's tokens are those of the first row's picture."""
    processor = processor_of(vlm)
    tokenizer = cast("Any", processor).tokenizer
    words = {task: len(tokenizer(chat_text(processor, task, 1))["input_ids"]) for task in {row.task for row in rows}}
    first = encode(processor, [rows[0].task], [[rows[0].load_image()]], torch.device("cpu"))["input_ids"].shape[1]
    picture = first - words[rows[0].task]
    crowded = [row.id for row in rows if words[row.task] + picture >= most]
    if crowded:
        raise InputError(
            f"{len(crowded)} of {len(rows)} rows (the first is {crowded[0]!r}) have no answer token within "
            f"max_tokens={most}: their prompts alone are as long. Raise max_tokens or leave them out."
        )


def _job(
    vlm: AttachedModel, rows: Sequence[SteeringRow], steering: SteerVLM, training: SteerVLMTraining, seed: int
) -> dict[str, JSON]:
    texts = [[row.id, row.task, row.p_plus, row.p_minus, row.answer] for row in rows]
    return {
        "model": {**vlm.parts.identity(), "fingerprint": vlm.parts.fingerprint()},
        "config": steering.module.config.as_json(),
        "positions": str(steering.positions),
        "training": training.as_json(),
        "start": steering.digest(),
        "rows": len(rows),
        "data": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "seed": seed,
    }


def _resumable(folder: Path, job: Mapping[str, JSON], processes: Processes) -> Path | None:
    """Return the last whole checkpoint of this very job, if there is one; half-written ones are removed.

    Raises:
        JobError: the folder holds another training.
    """
    path = folder / "job.json"
    folder.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(key for key in known.keys() | job.keys() if known.get(key) != job.get(key))
        if differing:
            raise JobError(
                f"{folder} holds another training (its {', '.join(differing)} differ); give another folder, or "
                "remove this one."
            )
    if processes.main:
        if not path.is_file():
            atomic_write_json(path, dict(job))
        for checkpoint in folder.glob("checkpoint-*"):
            if not _whole(checkpoint, processes.count):
                shutil.rmtree(checkpoint, ignore_errors=True)
    processes.wait()
    numbers = {int(checkpoint.name.rsplit("-", 1)[1]): checkpoint for checkpoint in folder.glob("checkpoint-*")}
    processes.wait()  # nobody may begin a checkpoint while another still looks for the last one
    return numbers[max(numbers)] if numbers else None


def _whole(checkpoint: Path, count: int) -> bool:
    """Whether every process had written its part: the first one ends with the state, the others write random states."""
    randoms = [checkpoint / f"rng_state_{index}.pth" for index in range(count)] if count > 1 else []
    return _readable(checkpoint / "trainer_state.json") and all(zipfile.is_zipfile(path) for path in randoms)


def _readable(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _arguments(
    folder: Path, training: SteerVLMTraining, seed: int, device: torch.device, *, progress: bool
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.accumulate,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(training.warmup * training.steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        bf16=training.precision == "bf16",
        fp16=training.precision == "fp16",
        save_steps=training.save_every,
        save_total_limit=2,
        logging_steps=training.log_every,
        seed=seed,
        data_seed=seed,
        disable_tqdm=not progress,
        use_cpu=device.type == "cpu",
        report_to=[],
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=0,
        # What is wrapped is the module alone, and every part of it takes part in every step.
        ddp_find_unused_parameters=False,
    )
    # One process has one module, however many GPUs its frozen model lies on: no replicas (torch's DataParallel).
    arguments._n_gpu = min(arguments.n_gpu, 1)  # pyright: ignore[reportPrivateUsage]
    return arguments
