"""Verdicts on disk: one JSON line each, appended and synced as they come; a killed run is resumed, nothing twice.

{"job": {judge, settings, job}}
{"item": digest, "id": ..., "score": ..., "raw": ..., "prompt": ..., "detail": {...}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from steer_plugin.atomic import JSON
from steer_plugin.errors import InputError, JobError
from steer_plugin.evaluation.judges.base import Judge, Judged, Verdict
from steer_plugin.jsonl import JsonLines
from steer_plugin.processes import Processes


class VerdictLog:
    """A JSONL file of verdicts whose first line describes the job.

    Raises:
        JobError: the file belongs to another job, is no such log, or cannot be written.
    """

    def __init__(self, path: Path, job: Mapping[str, JSON]) -> None:
        self._lines = JsonLines(path, job, "verdicts")
        self._known = self._read()

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """Every verdict by its item's id."""
        return {one: verdict for one, (_, verdict) in self._known.items()}

    def find(self, item: Judged) -> Verdict | None:
        """Return the verdict on an item, or None.

        Raises:
            JobError: the log's verdict is on another answer, question or picture of the same id.
        """
        if item.id not in self._known:
            return None
        digest, verdict = self._known[item.id]
        if digest != item.digest():
            raise JobError(
                f"{self._lines.path} holds a verdict on {item.id!r} with another question, answer or picture; choose "
                "another log for other answers, or delete it."
            )
        return verdict

    def add(self, items: Sequence[Judged], verdicts: Sequence[Verdict]) -> None:
        """Append verdicts; they are on disk when this returns."""
        digests = [item.digest() for item in items]
        self._lines.add([{"item": digest, **one.as_json()} for digest, one in zip(digests, verdicts, strict=True)])
        for digest, one in zip(digests, verdicts, strict=True):
            self._known[one.id] = (digest, one)

    def gather(self, ids: Sequence[str]) -> None:
        """Wait for all processes, each of which calls this, and hold the verdicts of all: one file, in this order."""
        place = {one: number for number, one in enumerate(ids)}
        self._lines.gather(lambda row: place.get(str(row["id"]), -1))
        self._known = self._read()

    def _read(self) -> dict[str, tuple[str, Verdict]]:
        try:
            found = [(str(row["item"]), Verdict.from_json(row)) for row in self._lines.rows]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._lines.broken(error) from error
        return {verdict.id: (digest, verdict) for digest, verdict in found}


def verdicts(
    judge: Judge,
    items: Sequence[Judged],
    *,
    log: Path | None = None,
    job: Mapping[str, JSON] | None = None,
    progress: bool = True,
) -> list[Verdict]:
    """Judge every item once; return a verdict for each, in order; resumable when `log` is given.

    `job` is what else the log shall belong to (the method or the model that answered). Several processes share the
    batches and need a log; each calls this and gets all verdicts.

    Raises:
        InputError: no items, one id for two things, or several processes without a log.
        JobError: `log` belongs to another job; the judge's own errors leave every earlier verdict in the log.
    """
    processes = Processes.current()
    processes.need_folder(log, "judging")
    asked = _distinct(items)
    described: dict[str, JSON] = {"judge": judge.name, "settings": judge.settings(), "job": dict(job or {})}
    book = None if log is None else VerdictLog(log, described)
    known = {} if book is None else {item.id: one for item in asked if (one := book.find(item)) is not None}
    size = judge.batch_size
    share = processes.share([asked[start : start + size] for start in range(0, len(asked), size)])
    with tqdm(
        total=sum(map(len, share)), desc=judge.name, disable=not (progress and processes.main), leave=False
    ) as bar:
        for batch in share:
            # Of half a batch the rest alone: a verdict may cost money.
            if todo := [item for item in batch if item.id not in known]:
                said = _judged(judge, todo)
                if book is not None:
                    book.add(todo, said)
                known.update({one.id: one for one in said})
            bar.update(len(batch))
    if book is not None:
        book.gather([item.id for item in asked])
        known = book.verdicts
    return [known[item.id] for item in items]


def _judged(judge: Judge, batch: Sequence[Judged]) -> list[Verdict]:
    said = judge.judge(batch)
    if [one.id for one in said] != [item.id for item in batch]:
        raise InputError(
            f"judge {judge.name!r} gave verdicts on {[one.id for one in said]}, expected one on each of "
            f"{[item.id for item in batch]}, in order."
        )
    return said


def _distinct(items: Sequence[Judged]) -> list[Judged]:
    """Each item once; InputError when there is none, or one id stands for two things."""
    if not items:
        raise InputError("there is nothing to judge: items is empty.")
    seen: dict[str, Judged] = {}
    for item in items:
        if item.id in seen and seen[item.id].digest() != item.digest():
            raise InputError(f"the id {item.id!r} stands for two answers; give each item an id of its own.")
        seen.setdefault(item.id, item)
    return list(seen.values())
