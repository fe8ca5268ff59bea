"""Asking a model many things under many methods: answers in batches, appended to disk, resumed after a kill.

Of several processes each asks its share of the batches; a batch is the same whoever asks it, so the answers are too.

Answers are greedy; `Sampling` draws them instead, as the Learning-to-Steer authors' POPE run does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from steer_plugin.adapters import AttachedModel
from steer_plugin.atomic import JSON
from steer_plugin.errors import InputError
from steer_plugin.evaluation.answers import Answer, AnswerLog
from steer_plugin.evaluation.costs import answer_tokens
from steer_plugin.intervention import Steerable
from steer_plugin.processes import Processes


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

# Enough for "Yes, there is a ... in the image."; the authors' POPE script lets an answer run to 128 tokens.
ANSWER_TOKENS = 12
AUTHORS_TOKENS = 128


@dataclass(frozen=True)
class Method:
    """A named way to answer.

    Attributes:
        steering: what to steer a batch by, from its ids; None for nothing.
        prefix: an instruction before each question.
        note: what decides the answers besides (strength, layers, digests): answers of another note are not resumed.
        worded: item id -> what is asked instead of the item's own text.
    """

    name: str
    steering: Callable[[Sequence[str]], Steerable | None] = lambda ids: None
    prefix: str = ""
    note: Mapping[str, JSON] | None = None
    worded: Mapping[str, str] | None = None

    def text(self, item: Asked) -> str:
        """What an item is asked by."""
        own = item.text if self.worded is None else self.worded.get(item.id, item.text)
        return f"{self.prefix} {own}" if self.prefix else own


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn at random; the defaults are what `do_sample=True` alone means to Hugging Face.

    Source: the L2S authors' POPE script, which says `do_sample=True` and seed 0 and leaves the rest to the generation
    config of the model; `as_authors` reads it there.

    Raises:
        InputError: a value that cannot be sampled with.
    """

    seed: int = 0
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Refuse, before any question is asked, what `generate` would choke on."""
        for name, value, fine, expected in (
            ("temperature", self.temperature, 0 < self.temperature < float("inf"), "a finite number above 0"),
            ("top_k", self.top_k, self.top_k >= 0, "a whole number from 0 (no limit) up"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0, up to 1 (no limit)"),
        ):
            if not fine:
                raise InputError(f"sampling with {name}={value!r} is not possible: expected {expected}.")

    @classmethod
    def as_authors(cls, vlm: AttachedModel, seed: int = 0) -> Sampling:
        """Return what `do_sample=True` alone means for this model: its generation config, else the defaults."""
        config = vlm.parts.root.generation_config
        named = {name: getattr(config, name, None) for name in ("temperature", "top_k", "top_p")}
        return cls(seed, **{name: value for name, value in named.items() if value is not None})

    def as_json(self) -> dict[str, JSON]:
        """Every setting, seed included."""
        return asdict(self)

    @contextmanager
    def drawing(self, batch: str, device: torch.device) -> Generator[dict[str, object], None, None]:
        """Draw from this seed and the batch alone, and leave the caller's random state as it was.

        Yields the keywords for `generate`. Every method draws from the same numbers, and a resumed run from those of
        the first one.
        """
        key = hashlib.sha256(f"{self.seed}:{batch}".encode()).digest()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(key[:7], "big"))
            yield {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


def distinct(items: Sequence[A]) -> list[A]:
    """One item for each question that is really different (POPE shares its yes questions between subsets)."""
    return list({item.key: item for item in reversed(items)}.values())[::-1]


def answers(
    vlm: AttachedModel,
    items: Sequence[Asked],
    method: Method,
    *,
    batch_size: int = 32,
    max_new_tokens: int = ANSWER_TOKENS,
    sampling: Sampling | None = None,
    log: Path | None = None,
    job: Mapping[str, JSON] | None = None,
    encoded: MutableMapping[str, dict[str, Tensor]] | None = None,
    progress: bool = True,
) -> dict[str, str]:
    """Ask every different question once; return key -> text of the answer; as `answered` in everything else."""
    found = answered(
        vlm, items, method, batch_size=batch_size, max_new_tokens=max_new_tokens, sampling=sampling, log=log, job=job,
        encoded=encoded, progress=progress,
    )  # fmt: skip
    return {key: answer.text for key, answer in found.items()}


def answered(
    vlm: AttachedModel,
    items: Sequence[Asked],
    method: Method,
    *,
    batch_size: int = 32,
    max_new_tokens: int = ANSWER_TOKENS,
    sampling: Sampling | None = None,
    log: Path | None = None,
    job: Mapping[str, JSON] | None = None,
    encoded: MutableMapping[str, dict[str, Tensor]] | None = None,
    progress: bool = True,
) -> dict[str, Answer]:
    """Ask every different question once; return key -> answer with its tokens; resumable when `log` is given.

    Several processes share the work and need a log; each calls this and gets all answers. Answers are greedy unless
    `sampling` draws them. `encoded` keeps the encoded batches for further calls on the same items (sweeps over
    strengths).

    Raises:
        InputError: no items, no processor, or several processes without a log.
        JobError: `log` belongs to another job, or another process has ended.
    """
    processes = Processes.current()
    processes.need_folder(log, "asking")
    if not items or vlm.processor is None:
        raise InputError("asking needs at least one question, and a model attached with its processor.")
    asked = distinct(items)
    described: dict[str, JSON] = {"method": method.name, "note": method.note, "prefix": method.prefix, **(job or {})}
    described |= {"keys": [item.key for item in asked], "max_new_tokens": max_new_tokens}
    if method.worded is not None:
        described["texts"] = [method.text(item) for item in asked]
    if sampling is not None:
        # A draw depends on who shares the batch.
        described["sampling"] = {**sampling.as_json(), "batch_size": batch_size}
    book = None if log is None else AnswerLog(log, described)
    known: dict[str, Answer] = {} if book is None else book.answers
    # Batches of the whole job, whatever is answered by now and whoever asks: rounding and draws depend on them.
    share = processes.share([asked[start : start + batch_size] for start in range(0, len(asked), batch_size)])
    shown = progress and processes.main
    bar = tqdm(total=sum(map(len, share)), desc=method.name, unit="question", disable=not shown, leave=False)
    for batch in share:
        if any(item.key not in known for item in batch):
            said = _ask(vlm, batch, method, max_new_tokens, sampling, {} if encoded is None else encoded)
            fresh = {item.key: answer for item, answer in zip(batch, said, strict=True) if item.key not in known}
            if book is None:
                known.update(fresh)
            else:
                book.add(list(fresh), list(fresh.values()))
        bar.update(len(batch))
    bar.close()
    if book is not None:
        book.gather([item.key for item in asked])
        known = book.answers
    return {item.key: known[item.key] for item in asked}


def _ask(
    vlm: AttachedModel,
    batch: Sequence[Asked],
    method: Method,
    max_new_tokens: int,
    sampling: Sampling | None,
    encoded: MutableMapping[str, dict[str, Tensor]],
) -> list[Answer]:
    name = "\n".join(f"{item.key}|{method.text(item)}" for item in batch)
    if name not in encoded:
        encoded[name] = vlm.inputs([method.text(item) for item in batch], [list(item.load_images()) for item in batch])
    inputs = encoded[name]
    steering = method.steering([item.id for item in batch])
    batch_name = "\n".join(item.key for item in batch)
    chosen = nullcontext({"do_sample": False}) if sampling is None else sampling.drawing(batch_name, vlm.device)
    with chosen as how:
        ids = vlm.generate(steering=steering, **inputs, max_new_tokens=max_new_tokens, **how)
    texts = vlm.decode(ids[:, inputs["input_ids"].shape[1] :])
    tokens = answer_tokens(vlm, inputs, ids)
    return [Answer(text, tuple(row)) for text, row in zip(texts, tokens, strict=True)]
