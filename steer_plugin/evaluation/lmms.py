"""A steered model as lmms-eval sees one: what its `simple_evaluate(model=...)` takes.

    generate_until:  the answer, cut at the first stop string
    loglikelihood:   (loss, is greedy),  loss = - mean over the continuation's tokens t of log p(t | prompt, before t)

lmms-eval describes the first value as a log-probability, and takes the choice with the **smallest** one: its models
return the loss (its issue 370). So does this one, unless `likelihood="logprob"` asks for the sum of log p(t).

Source: lmms-eval (arXiv 2407.12772), the "simple" interface of version 0.7.3. It is imported when it is asked for.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable
from uuid import uuid4

import torch
from PIL import Image
from tqdm import tqdm

from steer_plugin.adapters import AttachedModel
from steer_plugin.adapters._chat import completion_ids
from steer_plugin.atomic import JSON
from steer_plugin.errors import FrameworkError, InputError
from steer_plugin.evaluation.asking import Sampling
from steer_plugin.evaluation.costs import forced_logits
from steer_plugin.intervention import Steerable
from steer_plugin.jsonl import JsonLines

MAX_NEW_TOKENS = 1024  # as the models of lmms-eval allow
BLANK_LINE = "\n\n"
LIKELIHOODS = ("loss", "logprob")
NUMBERS = ("max_new_tokens", "num_beams", "temperature", "top_p", "top_k", "repetition_penalty")

Docs = Mapping[str, Mapping[str, Any]]  # task -> split -> table of documents, which has no type of its own


@runtime_checkable
class Request(Protocol):
    """The part of lmms-eval's `Instance` that is used."""

    args: tuple[Any, ...]


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded; requests of equal decoding share batches."""

    max_new_tokens: int
    until: tuple[str, ...]
    sampling: Sampling | None
    num_beams: int = 1
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class _Asked:
    args: tuple[Any, ...]
    how: Decoding | None = None
    continuation: str = ""

    @property
    def where(self) -> str:
        return f"document {self.args[3]} of task {self.args[4]!r}"

    @property
    def key(self) -> str:
        text, (number, task, split) = repr((self.args[0], self.how, self.continuation)), self.args[3:6]
        return f"{task}/{split}/{number}/{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def images(self, docs: Docs) -> list[Image.Image]:
        visual, number, task, split = self.args[2:6]
        found = list(visual(docs[task][split][number]) or [])
        for one in found:
            if not isinstance(one, Image.Image):
                raise InputError(
                    f"{self.where} shows a {type(one).__name__}: expected PIL pictures, no videos, no sounds. Choose "
                    "another task."
                )
        return found


@dataclass(frozen=True)
class SteeredTasks:
    """Answers the requests of lmms-eval's tasks; knows nothing of lmms-eval itself. Fields as for `steered_lmm`."""

    vlm: AttachedModel
    steering: Steerable | None = None
    batch_size: int = 1
    max_new_tokens: int = MAX_NEW_TOKENS
    seed: int = 0
    likelihood: str = "loss"
    stop_at_blank_line: bool = False
    log: Path | None = None
    note: Mapping[str, JSON] | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuse, before any task is loaded, what could not be run."""
        _number("batch_size", self.batch_size)
        _number("max_new_tokens", self.max_new_tokens)
        if self.likelihood not in LIKELIHOODS:
            raise InputError(f"likelihood is {self.likelihood!r}: expected one of {LIKELIHOODS}.")
        if self.vlm.processor is None:
            raise InputError("tasks need the model's processor: sp.attach(model, processor=processor).")
        if self.log is not None and self.steering is not None and not self.note:
            raise InputError(
                "a log of steered answers needs a note that names the steering, as note={'steering': 'l2s, seed 0'}: "
                "it is what tells them from those of another one."
            )

    def generate_until(self, requests: Sequence[Request], docs: Docs) -> list[str]:
        """Answer requests (context, keywords, doc_to_visual, number, task, split), in their order.

        Raises InputError for keywords that cannot be decoded with or a document that shows something else than
        pictures, JobError for the log of another job.
        """
        asked = [_Asked(request.args, self.decoding(request.args[1] or {})) for request in requests]
        strange = sorted({key for one in asked for key in one.args[1] or {}} - {*NUMBERS, "until", "do_sample"})
        if strange:
            warnings.warn(f"the tasks' generation keywords {strange} are not used here.", stacklevel=3)
        return [str(one) for one in self._answered("generate_until", asked, docs, self._generate)]

    def loglikelihood(self, requests: Sequence[Request], docs: Docs) -> list[tuple[float, bool]]:
        """Score requests (context, continuation, doc_to_visual, number, task, split), in their order.

        The continuation's own tokens count, no end of sequence; the bool says whether each of them is the likeliest.
        Raises InputError for a continuation that is no text or a request without a document, JobError as above.
        """
        asked = [_continued(request, docs) for request in requests]
        found = cast("list[list[Any]]", self._answered("loglikelihood", asked, docs, self._score))
        return [(float(value), bool(greedy)) for value, greedy in found]

    def decoding(self, given: Mapping[str, object]) -> Decoding:
        """Read a task's keywords: greedy unless `do_sample` or, without it, a temperature says so; else InputError."""
        until = given.get("until") or []
        stops = [until] if isinstance(until, str) else until
        if not isinstance(stops, (list, tuple)) or not all(isinstance(one, str) for one in stops):
            raise InputError(f"until is {until!r}: expected a text or a list of texts.")
        kept = tuple(one for one in stops if one and (self.stop_at_blank_line or one != BLANK_LINE))
        numbers = {name: _number(name, given[name]) for name in NUMBERS if given.get(name) is not None}
        tokens, beams = numbers.get("max_new_tokens", self.max_new_tokens), numbers.get("num_beams", 1)
        heat, drawn, sampling = numbers.get("temperature"), given.get("do_sample"), None
        # Temperature 0 means greedy to lmms-eval, whatever else is said.
        if heat != 0 and (drawn or (drawn is None and heat is not None)):
            own = Sampling.as_authors(self.vlm, self.seed)
            top_k, top_p = int(numbers.get("top_k", own.top_k)), numbers.get("top_p", own.top_p)
            sampling = Sampling(self.seed, own.temperature if heat is None else heat, top_k, top_p)
        return Decoding(int(tokens), kept, sampling, int(beams), numbers.get("repetition_penalty", 1.0))

    def _answered(
        self,
        kind: str,
        asked: Sequence[_Asked],
        docs: Docs,
        answer: Callable[[Sequence[_Asked], Sequence[list[Image.Image]], str], Sequence[JSON]],
    ) -> list[JSON]:
        """Answer in batches of equal decoding, longest first; what is in the log is not asked again."""
        book = None if self.log is None else JsonLines(self.log.with_suffix(f".{kind}.jsonl"), self._job(), "answers")
        known = {} if book is None else {str(row["id"]): row["answer"] for row in book.rows}
        keys, found = _numbered(asked), dict[int, JSON]()
        with tqdm(total=len(asked), desc=kind, unit="request", leave=False, disable=not self.progress) as bar:
            for rows in self._batches(asked):
                # A draw depends on who shares the batch: it is asked whole, or not at all.
                if not all(keys[row] in known for row in rows):
                    images, name = {row: asked[row].images(docs) for row in rows}, "\n".join(keys[row] for row in rows)
                    # Not every processor takes prompts with and without pictures together.
                    for some in ([row for row in rows if images[row]], [row for row in rows if not images[row]]):
                        if some:
                            said = answer([asked[row] for row in some], [images[row] for row in some], name)
                            found.update(zip(some, said, strict=True))
                    if book is not None:
                        book.add([{"id": keys[row], "answer": found[row]} for row in rows if keys[row] not in known])
                found.update({row: known[keys[row]] for row in rows if keys[row] in known})
                bar.update(len(rows))
        return [found[row] for row in range(len(asked))]

    def _batches(self, asked: Sequence[_Asked]) -> Iterator[list[int]]:
        alike: dict[Decoding | None, list[int]] = {}
        for row, one in enumerate(asked):
            alike.setdefault(one.how, []).append(row)
        for rows in alike.values():
            rows.sort(key=lambda row: -len(asked[row].args[0]))
            yield from (rows[k : k + self.batch_size] for k in range(0, len(rows), self.batch_size))

    def _generate(self, batch: Sequence[_Asked], images: Sequence[list[Image.Image]], name: str) -> list[JSON]:
        how, inputs = cast("Decoding", batch[0].how), self.vlm.inputs([one.args[0] for one in batch], images)
        plain = nullcontext({"do_sample": False})
        with plain if how.sampling is None else how.sampling.drawing(name, self.vlm.device) as drawn:
            ids = self.vlm.generate(
                steering=self.steering, **inputs, **drawn, max_new_tokens=how.max_new_tokens, num_beams=how.num_beams,
                repetition_penalty=how.repetition_penalty,
            )  # fmt: skip
        return [cut(text, how.until) for text in self.vlm.decode(ids[:, inputs["input_ids"].shape[1] :])]

    def _score(self, batch: Sequence[_Asked], images: Sequence[list[Image.Image]], name: str) -> list[JSON]:
        processor, inputs = cast("Any", self.vlm.processor), self.vlm.inputs([one.args[0] for one in batch], images)
        forced = [completion_ids(processor, one.args[0], one.continuation, one.where) for one in batch]
        out = forced_logits(self.vlm, inputs, forced, self.steering)
        log_p = out.logits.float().log_softmax(-1).gather(-1, out.targets[..., None])[..., 0]
        total = torch.where(out.mask, log_p, 0.0).sum(-1)
        greedy = ((out.logits.argmax(-1) == out.targets) | ~out.mask).all(-1)
        value = total if self.likelihood == "logprob" else -total / out.mask.sum(-1)
        return [list(one) for one in zip(value.tolist(), greedy.tolist(), strict=True)]

    def _job(self) -> dict[str, JSON]:
        parts, writes = self.vlm.parts, () if self.steering is None else self.steering.intervention.writes
        return {
            "model": {**parts.identity(), "weights": parts.fingerprint()}, "note": dict(self.note or {}),
            "writes": [f"{write.site} {write.positions} {write.alpha}" for write in writes],
            "batch_size": self.batch_size, "likelihood": self.likelihood,
        }  # fmt: skip


def steered_lmm(vlm: AttachedModel, steering: Steerable | None = None, **options: Any) -> Any:
    """Return the object that lmms-eval's `simple_evaluate(model=...)` takes; steering None is the model as it is.

    Options: `batch_size` (1); `max_new_tokens` where a task names none (1024); `seed` of what is drawn (0);
    `likelihood`, "loss" or "logprob"; `stop_at_blank_line` (False: lmms-eval adds that stop by itself to tasks that
    name none); `log`, a path beside which answers are kept and a killed run resumes, with a `note`; `progress`.

    Raises FrameworkError without lmms-eval, InputError without a processor or for a value that is no use.
    """
    made = lmms_class()
    return made(SteeredTasks(vlm, steering, **options))


@cache
def lmms_class() -> type[Any]:
    """Make the subclass of lmms-eval's `lmms` that hands its requests to `SteeredTasks`; FrameworkError without it."""
    try:
        base: Any = import_module("lmms_eval.api.model").lmms
        result: Any = import_module("lmms_eval.api.instance").GenerationResult
    except (ImportError, AttributeError) as error:
        command = "pip install 'steer-plugin[lmms]', then pip install --no-deps 'lmms-eval>=0.7.3'"
        raise FrameworkError(f"lmms-eval cannot be used ({error}): {command}.") from error

    class SteeredLMM(base):
        is_simple = True

        def __init__(self, tasks: SteeredTasks) -> None:
            super().__init__()
            self.tasks, self.name = tasks, f"SteeredLMM({uuid4().hex})"

        def __repr__(self) -> str:
            # lmms-eval keys its response cache by this: no two steerings may share it.
            return self.name

        def generate_until(self, requests: Sequence[Request]) -> list[str]:
            return self.tasks.generate_until(requests, self.task_dict)

        def loglikelihood(self, requests: Sequence[Request]) -> list[Any]:
            # A bare tuple would become its own spelling (unwrap_generation_output in 0.7.3).
            return [result(text=one) for one in self.tasks.loglikelihood(requests, self.task_dict)]

        def generate_until_multi_round(self, requests: Sequence[Request]) -> list[str]:
            raise FrameworkError(
                f"{len(requests)} requests of several rounds: positions mean what they say in the first turn alone. "
                "Choose tasks of output_type generate_until."
            )

    return SteeredLMM


def cut(text: str, until: Sequence[str]) -> str:
    """Return `text` up to the first of the stop strings, its ends stripped."""
    return text[: min((text.index(stop) for stop in until if stop in text), default=len(text))].strip()


def _numbered(asked: Sequence[_Asked]) -> list[str]:
    """Tell apart what is asked several times over (lmms-eval's repeats)."""
    times: defaultdict[str, Iterator[int]] = defaultdict(count)
    return [f"{one.key}/{next(times[one.key])}" for one in asked]


def _continued(request: Request, docs: Docs) -> _Asked:
    if len(request.args) != 6:
        raise InputError("a request without a document (acc_mutual_info) has no prompt: choose another metric.")
    target, (number, task, split) = request.args[1], request.args[3:]
    found: object = target(docs[task][split][number]) if callable(target) else target
    if not isinstance(found, str) or not found.strip():
        raise InputError(f"document {number} of task {task!r} continues with {found!r}: expected a text.")
    return _Asked(request.args, None, found.strip())


def _number(name: str, value: object) -> float:
    whole = name in ("max_new_tokens", "num_beams", "batch_size")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (whole and (value < 1 or value != int(value))):
        raise InputError(f"{name} is {value!r}: expected {'a whole number from 1 up' if whole else 'a number'}.")
    return float(value)
