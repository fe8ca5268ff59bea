"""What a judge is given, what it says, and the interface that all judges share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast, runtime_checkable

from PIL import Image

from steer_plugin.artefact import sha256
from steer_plugin.atomic import JSON
from steer_plugin.contrast.pair import Picture, load_picture
from steer_plugin.errors import InputError, nearest


@dataclass(frozen=True)
class Judged:
    """An answer to judge, and what it answers; `extras` are what else a rubric names (category, target, converse)."""

    id: str
    question: str
    answer: str
    image: Picture | None = None
    extras: Mapping[str, JSON] = field(default_factory=dict[str, JSON])

    def picture(self) -> Image.Image | None:
        """Open the picture as RGB; raises InputError naming a path that cannot be read."""
        return None if self.image is None else load_picture(self.image, self.id)

    def digest(self) -> str:
        """SHA-256 of all that is judged, pixels included: two items with one id and two digests are a mistake.

        Raises InputError for extras that JSON cannot hold, and as `picture` does.
        """
        picture = self.picture()
        pixels = None if picture is None else [*picture.size, sha256(picture.tobytes())]
        try:
            text = json.dumps([self.question, self.answer, pixels, dict(self.extras)], sort_keys=True)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the extras of {self.id!r} are no JSON ({error}): use strings, numbers, lists and dicts."
            ) from error
        return sha256(text.encode())


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one item.

    Attributes:
        id: the item's.
        score: in the judge's own unit; NaN when the raw answer holds none.
        raw: the judge's answer as it came.
        prompt: what the judge was asked.
        detail: whatever else the judge found.

    Raises:
        InputError: an infinite score.
    """

    id: str
    score: float
    raw: str
    prompt: str
    detail: Mapping[str, JSON] = field(default_factory=dict[str, JSON])

    def __post_init__(self) -> None:
        if math.isinf(self.score):
            raise InputError(f"the score of {self.id!r} is {self.score}: expected a finite number, or NaN for none.")

    def as_json(self) -> dict[str, JSON]:
        """Every field; a score of NaN, which JSON cannot hold, is null."""
        score = None if math.isnan(self.score) else self.score
        return {"id": self.id, "score": score, "raw": self.raw, "prompt": self.prompt, "detail": dict(self.detail)}

    @classmethod
    def from_json(cls, row: Mapping[str, JSON]) -> Verdict:
        """Read what `as_json` wrote; raises KeyError or TypeError for anything else."""
        score = row["score"]
        if not isinstance(score, int | float | None):
            raise TypeError(f"score is {score!r}")
        detail = cast("Mapping[str, JSON]", row["detail"])
        number = float("nan") if score is None else float(score)
        return cls(str(row["id"]), number, str(row["raw"]), str(row["prompt"]), dict(detail))


@runtime_checkable
class Judge(Protocol):
    """Something that scores answers."""

    @property
    def name(self) -> str:
        """How tables and logs call it."""
        ...

    @property
    def batch_size(self) -> int:
        """How many items to judge between two writes to the log; 1 where each verdict costs money."""
        ...

    def settings(self) -> Mapping[str, JSON]:
        """Return everything that decides a verdict; logs of other settings are not resumed. Holds no secrets."""
        ...

    def judge(self, items: Sequence[Judged]) -> list[Verdict]:
        """Return one verdict for each item, in order."""
        ...


def filled(template: str, item: Judged, **more: str) -> str:
    """Write an item into a template that names {question}, {answer} and keys of its extras.

    Raises:
        InputError: a field that the item lacks, or a stray brace.
    """
    values: dict[str, object] = {**item.extras, "question": item.question, "answer": item.answer, **more}
    try:
        return template.format_map(values)
    except KeyError as error:
        name = str(error.args[0])
        raise InputError(
            f"the template names {{{name}}}, which {item.id!r} has not: it has {', '.join(values)}."
            f"{nearest(name, values)} Put it into the item's extras."
        ) from error
    except (ValueError, IndexError, AttributeError) as error:
        raise InputError(
            f"the template {template!r} cannot be filled in ({error}): write {{answer}} for a field, {{{{ and }}}} for "
            "braces."
        ) from error


def check_count(name: str, value: int, least: int = 1) -> int:
    """Return a whole number that is not below `least`; raises InputError for any other value."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number from {least} up, got {value!r}.")
    return value
