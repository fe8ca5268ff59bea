"""Whole evaluations into a folder: answers as JSONL, metrics as JSON, a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from steer_plugin.adapters import AttachedModel
from steer_plugin.artefact import sha256, tensor_bytes, versions
from steer_plugin.atomic import JSON, atomic_write_bytes, atomic_write_json
from steer_plugin.errors import InputError
from steer_plugin.evaluation.asking import ANSWER_TOKENS, AUTHORS_TOKENS, Method, Sampling, answers
from steer_plugin.evaluation.pope import PopeItem, predictions, read_items, scores
from steer_plugin.evaluation.table import markdown_table
from steer_plugin.intervention import Steerable
from steer_plugin.methods import L2S, MeanSteering


def pope_items(data: Path, images: Path | None) -> list[PopeItem]:
    """Read the three (or more) POPE files of a folder.

    Raises:
        InputError: no such files, or no image folder; says where they are published.
    """
    files = sorted(data.glob("*pope_*.json"))
    if not files:
        raise InputError(
            f"{data} holds no POPE question files (*pope_random.json, ...); they are published in the repository of "
            "POPE (AoiDragon/POPE, output/coco). Give their folder."
        )
    if images is None or not images.is_dir():
        raise InputError(f"the pictures' folder is missing (got {images}); POPE uses COCO val2014. Give --images.")
    return [item for file in files for item in read_items(file, images)]


def pope_methods(steerings: Mapping[str, Steerable], prompt: str) -> list[Method]:
    """Unsteered, prompted, and each saved steering."""
    methods = [Method("none")]
    if prompt:
        methods.append(Method("prompt", prefix=prompt))
    for name, steering in steerings.items():
        writes = [f"{w.site} {w.positions} {w.alpha}" for w in steering.intervention.writes]
        # Refitted under the same name it is another steering: answers of the old one must not be taken for its own.
        note: dict[str, JSON] = {"writes": writes, "tensors": digest_of(steering)}
        methods.append(Method(name, lambda ids, s=steering: s, note=note))
    return methods


def digest_of(steering: Steerable) -> str | None:
    """SHA-256 of what a saved steering adds, or None for one that is no L2S and no mean."""
    if isinstance(steering, L2S):
        return sha256(tensor_bytes(steering.network.state_dict()))
    return sha256(tensor_bytes({"vector": steering.vector})) if isinstance(steering, MeanSteering) else None


def run_pope(
    vlm: AttachedModel,
    items: Sequence[PopeItem],
    methods: Sequence[Method],
    out: Path,
    *,
    batch_size: int = 32,
    seed: int = 0,
    sampling: Sampling | None = None,
    max_new_tokens: int | None = None,
    progress: bool = True,
) -> str:
    """Ask, score and write answers/, metrics.json and table.md; return the table.

    Answers are greedy and up to 12 tokens long, or drawn by `sampling` (`Sampling.as_authors(vlm, seed)`) and up to 128
    long, as the L2S authors' are; `max_new_tokens` sets another length. `seed` is that of the bootstrap.

    Raises:
        InputError: no room for an answer.
        JobError: `out` holds another job, or cannot be written.
    """
    tokens = (ANSWER_TOKENS if sampling is None else AUTHORS_TOKENS) if max_new_tokens is None else max_new_tokens
    if tokens < 1:
        raise InputError(f"an answer needs at least one token, got max_new_tokens={tokens}.")
    decoding: dict[str, JSON] = {"do_sample": sampling is not None, "max_new_tokens": tokens}
    decoding |= {} if sampling is None else {**sampling.as_json(), "batch_size": batch_size}
    job: dict[str, JSON] = {"model": {**vlm.parts.identity(), "weights": vlm.parts.fingerprint()}}
    rows: dict[str, dict[str, JSON]] = {}
    cells = {}
    for method in methods:
        log = out / "answers" / f"{method.name}.jsonl"
        texts = answers(
            vlm, items, method, batch_size=batch_size, max_new_tokens=tokens, sampling=sampling, log=log, job=job,
            progress=progress,
        )  # fmt: skip
        scored = scores(items, predictions(items, texts), [texts[item.key] for item in items], seed=seed)
        cells[method.name] = {subset: one.accuracy for subset, one in scored.items()}
        for subset, one in scored.items():
            rows.setdefault(subset, {})[method.name] = {
                "accuracy": 100 * one.accuracy.value, "accuracy_low": 100 * one.accuracy.low,
                "accuracy_high": 100 * one.accuracy.high, "f1": 100 * one.f1.value, "yes_ratio": one.yes_ratio,
                "accuracy_l2s": 100 * one.accuracy_l2s, "wellformed": one.wellformed, "n": one.n,
            }  # fmt: skip
    table = markdown_table(cells)
    metrics: dict[str, JSON] = {
        "pope": cast(JSON, rows), "job": job, "decoding": decoding, "seed": seed, "versions": cast(JSON, versions()),
        "methods": {m.name: {"prefix": m.prefix, "note": m.note} for m in methods},
    }  # fmt: skip
    atomic_write_json(out / "metrics.json", metrics)
    atomic_write_bytes(out / "table.md", table.encode())
    return table
