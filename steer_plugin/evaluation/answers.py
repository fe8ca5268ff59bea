"""Answers on disk: one JSON line each, appended as they come: a killed run loses at most the batch it was in.

{"id": ..., "answer": ..., "tokens": [...]}         tokens up to and with the end of sequence
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from steer_plugin.atomic import JSON
from steer_plugin.jsonl import JsonLines

FORMAT = 2


class Answer(NamedTuple):
    """What was said, and the token ids that said it, the end of sequence included."""

    text: str
    tokens: tuple[int, ...]


class AnswerLog:
    """A JSONL file of answers, which belongs to one model, method and set of questions.

    Raises:
        JobError: the file belongs to another job, is no such log, or cannot be written.
    """

    def __init__(self, path: Path, job: Mapping[str, JSON]) -> None:
        # By digest: the keys of thousands of questions are part of the job.
        digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
        self._lines = JsonLines(path, {"answers": digest, "format": FORMAT}, "answers")
        self.answers = self._read()

    def add(self, ids: Sequence[str], answers: Sequence[Answer]) -> None:
        """Append answers; they are on disk when this returns."""
        rows: list[dict[str, JSON]] = [
            {"id": one, "answer": answer.text, "tokens": list(answer.tokens)}
            for one, answer in zip(ids, answers, strict=True)
        ]
        self._lines.add(rows)
        self.answers.update(zip(ids, answers, strict=True))

    def gather(self, ids: Sequence[str]) -> None:
        """Wait for all processes, each of which calls this; `answers` are those of all, in one file, in this order."""
        place = {one: number for number, one in enumerate(ids)}
        self._lines.gather(lambda row: place.get(str(row["id"]), -1))
        self.answers = self._read()

    def _read(self) -> dict[str, Answer]:
        try:
            return {str(row["id"]): _answer(row) for row in self._lines.rows}
        except (KeyError, TypeError, ValueError) as error:
            raise self._lines.broken(error) from error


def _answer(row: Mapping[str, JSON]) -> Answer:
    return Answer(str(row["answer"]), tuple(int(token) for token in cast("list[int]", row["tokens"])))
