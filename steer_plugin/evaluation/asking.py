"""Asking a model many things under many methods: greedy answers in batches, appended to disk, resumed after a kill."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from steer_plugin.adapters import AttachedModel
from steer_plugin.atomic import JSON
from steer_plugin.errors import InputError
from steer_plugin.evaluation.answers import AnswerLog
from steer_plugin.intervention import Steerable


@runtime_checkable
class Asked(Protocol):
    """One thing to ask: `key` is the same for what is asked twice, `id` is what methods know an input by."""

    @property
    def key(self) -> str:
        """Identity of what is asked."""
        ...

    @property
    def id(self) -> str:
        """The input's name."""
        ...

    @property
    def text(self) -> str:
        """What the user says."""
        ...

    def load_images(self) -> Sequence[Image.Image]:
        """Open the pictures."""
        ...


A = TypeVar("A", bound=Asked)


@dataclass(frozen=True)
class Method:
    """A named way to answer: a steering for each batch (by ids), and an instruction before the question."""

    name: str
    steering: Callable[[Sequence[str]], Steerable | None] = lambda ids: None
    prefix: str = ""
    note: Mapping[str, JSON] | None = None


def distinct(items: Sequence[A]) -> list[A]:
    """One item for each question that is really different (POPE shares its yes questions between subsets)."""
    return list({item.key: item for item in reversed(items)}.values())[::-1]


def answers(
    vlm: AttachedModel,
    items: Sequence[Asked],
    method: Method,
    *,
    batch_size: int = 32,
    max_new_tokens: int = 12,
    log: Path | None = None,
    job: Mapping[str, JSON] | None = None,
    encoded: MutableMapping[str, dict[str, Tensor]] | None = None,
    progress: bool = True,
) -> dict[str, str]:
    """Ask every different question once, greedily; return key -> answer; resumable when `log` is given.

    `encoded` keeps the encoded batches for further calls on the same items (sweeps over strengths).

    Raises:
        InputError: no items, or no processor.
        JobError: `log` belongs to another job.
    """
    if not items or vlm.processor is None:
        raise InputError("asking needs at least one question, and a model attached with its processor.")
    asked = distinct(items)
    described: dict[str, JSON] = {"method": method.name, "note": method.note, "prefix": method.prefix, **(job or {})}
    described |= {"keys": [item.key for item in asked], "max_new_tokens": max_new_tokens}
    book = None if log is None else AnswerLog(log, described)
    known = {} if book is None else book.answers
    bar = tqdm(total=len(asked), desc=method.name, unit="question", disable=not progress, leave=False)
    out: dict[str, str] = {}
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        if any(item.key not in known for item in batch):
            texts = _ask(vlm, batch, method, max_new_tokens, {} if encoded is None else encoded)
            fresh = [(item.key, text) for item, text in zip(batch, texts, strict=True) if item.key not in known]
            if book is not None:
                book.add([key for key, _ in fresh], [text for _, text in fresh])
            out.update(fresh)
        out.update({item.key: known[item.key] for item in batch if item.key in known})
        bar.update(len(batch))
    bar.close()
    return out


def _ask(
    vlm: AttachedModel,
    batch: Sequence[Asked],
    method: Method,
    max_new_tokens: int,
    encoded: MutableMapping[str, dict[str, Tensor]],
) -> list[str]:
    name = "\n".join([method.prefix, *(item.key for item in batch)])
    if name not in encoded:
        encoded[name] = vlm.inputs(
            [f"{method.prefix} {item.text}".strip() for item in batch], [list(item.load_images()) for item in batch]
        )
    inputs = encoded[name]
    steering = method.steering([item.id for item in batch])
    ids = vlm.generate(steering=steering, **inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return vlm.decode(ids[:, inputs["input_ids"].shape[1] :])
