"""VNIA (arXiv 2510.26769) as a benchmark: describe a picture in the spirit of p+ and not in that of p-.

    {data}/evaluation_dataset.jsonl        382 rows {task, pos, neg, answer, image_id, prompt, ...}
    {images}/{image_id}.jpg                pictures of Conceptual Captions 3M; {data}/images where none is given

    "target"   = the judge's score of an answer for p+ against p-: the headline
    "converse" = its score of the same answer for p- against p+                     both from 0 to 1

So a judge is asked twice for each answer. The authors' judge gives five scores whose rubric is not published: ours is
`judges.STANCE`, and figures do not compare. The text of the prompt baseline is the file's own column `prompt`. Nothing
is fitted here: SteerVLM comes trained. The published validation file is no held-out part: each of its 43 rows is on a
picture of the evaluation file, 42 of them with its very pair of prompts; nothing here reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float

from steer_plugin.atomic import JSON
from steer_plugin.contrast.rows import SteeringRow
from steer_plugin.contrast.vnia import read_vnia, vnia_prompts
from steer_plugin.errors import InputError, nearest
from steer_plugin.evaluation.benchmark import Benchmark, Metric, Texts, Verdicts
from steer_plugin.evaluation.benchmarks._parts import (
    Question,
    answered,
    digest_of,
    digest_of_pictures,
    digests,
    judged_scores,
    picture_folder,
    require_folder,
    scale_of,
    unique,
)
from steer_plugin.evaluation.judges import Judge, Judged, Verdict
from steer_plugin.evaluation.judges.base import check_count

ROLES = ("stance",)
ANSWER_TOKENS = 256
FILE = "evaluation_dataset.jsonl"
_SIDES = ("target", "converse")
_PUBLISHED = (
    "The SteerVLM authors publish it with their paper (arXiv 2510.26769); the pictures are those of Conceptual "
    "Captions 3M, whose addresses are published in github.com/google-research-datasets/conceptual-captions."
)
_JUDGES = (
    "Give one in the role 'stance': OpenAIJudge(model, rubric=STANCE), a LlamaGuardJudge whose template names {target} "
    "and {converse}, or a judge of your own."
)


@dataclass(frozen=True)
class Side:
    """A judge under the name of the side that it is asked about, so that its two verdicts have a log each."""

    name: str
    inner: Judge

    @property
    def batch_size(self) -> int:
        """That of the judge."""
        return self.inner.batch_size

    def settings(self) -> dict[str, JSON]:
        """Return the judge's name and settings."""
        return {"judge": self.inner.name, **self.inner.settings()}

    def judge(self, items: Sequence[Judged]) -> list[Verdict]:
        """Ask the judge."""
        return self.inner.judge(items)


class VniaBenchmark(Benchmark):
    """VNIA on rows, scored by one judge that reads the extras "target" and "converse".

    `scale` is the judge's least and greatest score: what its settings call "scale", else (0, 1).
    Raises InputError for no rows, ids that come twice, an empty scale, no judge, one whose rubric names no {target}.
    """

    name = "vnia"
    headline = "target"

    def __init__(
        self,
        rows: Sequence[SteeringRow],
        *,
        judges: Mapping[str, Judge] | None = None,
        scale: tuple[float | int, float | int] | None = None,
        worded: Mapping[str, str] | None = None,
        max_new_tokens: int = ANSWER_TOKENS,
        source: Mapping[str, JSON] | None = None,
    ) -> None:
        judge = _stance(judges or {})
        self.scale = scale_of(judge, (0.0, 1.0), scale)
        unique(self.name, [row.id for row in rows])
        self._questions = [Question(row.id, row.task, (row.image,), row.id.partition("-")[2] or row.id) for row in rows]
        self.items = self._questions
        self.groups = [item.group for item in self._questions]
        self.pairs = {row.id: (row.p_plus, row.p_minus) for row in rows}
        self.worded = dict(worded or {})
        self.judges = tuple(Side(name, judge) for name in _SIDES)
        self.metrics = [
            Metric("target", better="higher", scale=1.0, digits=3),
            Metric("converse", better="lower", scale=1.0, digits=3),
        ]
        self.max_new_tokens = check_count("max_new_tokens", max_new_tokens)
        asked: list[JSON] = [[row.id, row.task, row.p_plus, row.p_minus] for row in rows]
        self.source = {"rows": len(rows), "rows_sha256": digest_of(asked), "scale": list(self.scale), **(source or {})}

    @classmethod
    def read(
        cls,
        data: Path,
        images: Path | None = None,
        *,
        judges: Mapping[str, Judge] | None = None,
        scale: tuple[float | int, float | int] | None = None,
        missing: Literal["error", "skip"] = "error",
        max_new_tokens: int = ANSWER_TOKENS,
    ) -> VniaBenchmark:
        """Read {data}/evaluation_dataset.jsonl with the pictures in `images` ({data}/images).

        `missing` "skip" leaves rows without a picture out, with a warning: Conceptual Captions loses pictures over the
        years. Raises InputError for whatever is missing or damaged.
        """
        scale_of(_stance(judges or {}), (0.0, 1.0), scale)
        data = require_folder(data, f"Give the folder that holds {FILE}. {_PUBLISHED}")
        path = data / FILE
        if not path.is_file():
            raise InputError(f"There is no {path}. {_PUBLISHED}")
        folder = picture_folder(data, images, _PUBLISHED)
        prompts = vnia_prompts(path)
        rows = read_vnia(path, folder, missing)
        source: dict[str, JSON] = {
            "files": digests([path]),
            "left_out": len(prompts) - len(rows),
            "pictures_sha256": digest_of_pictures(row.image for row in rows),
        }
        worded = {row.id: prompts[row.id] for row in rows}
        return cls(rows, judges=judges, scale=scale, worded=worded, max_new_tokens=max_new_tokens, source=source)

    def judged(self, judge: Judge, texts: Texts) -> list[Judged]:
        """Return every answer with its two prompts as extras, changed about for the judge "converse"."""
        if judge.name not in _SIDES:
            return super().judged(judge, texts)
        said = answered(self.name, self.items, texts)
        found: list[Judged] = []
        for item, asked, text in zip(self._questions, self.items, said, strict=True):
            target, converse = self.pairs[item.id]
            extras = {"target": target, "converse": converse}
            if judge.name == "converse":
                extras = {"target": converse, "converse": target}
            found.append(Judged(item.id, asked.text, text, item.pictures[0], extras))
        return found

    def values(self, texts: Texts, verdicts: Verdicts) -> dict[str, Float[np.ndarray, "item column"]]:
        """Return both scores from 0 to 1, NaN where the judge said no number."""
        answered(self.name, self.items, texts)
        low, high = self.scale
        mend = "Pass the scale that it uses."
        scores = {name: judged_scores(self.name, name, self.items, verdicts, self.scale, mend) for name in _SIDES}
        return {name: ((found - low) / (high - low))[:, None] for name, found in scores.items()}


def _stance(judges: Mapping[str, Judge]) -> Judge:
    """Return the judge of the role "stance", whose rubric must name the two prompts where it is known."""
    for role in judges:
        if role not in ROLES:
            raise InputError(f"vnia has no role {role!r} for a judge.{nearest(role, ROLES)} Roles: {', '.join(ROLES)}.")
    if "stance" not in judges:
        raise InputError(f"vnia needs a judge: whether an answer follows its prompt cannot be counted. {_JUDGES}")
    judge = judges["stance"]
    settings = judge.settings()
    known = [settings[name] for name in ("rubric", "template") if name in settings]
    if known and "{target" not in str(known):
        raise InputError(f"the rubric of {judge.name!r} names no {{target}}, so it cannot know the prompt. {_JUDGES}")
    return judge
