"""A judge behind any OpenAI-compatible server: a rubric, a picture where there is one, a number at the end.

Answers are cached on disk by what was asked: {cache}/{sha256 of server, model, options, prompt, image}.json.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import cast

from steer_plugin.artefact import sha256
from steer_plugin.atomic import JSON, atomic_write_json, make_folder
from steer_plugin.errors import InputError, JobError
from steer_plugin.evaluation.judges._chat import Budget, ChatServer, Reply
from steer_plugin.evaluation.judges._score import read_score
from steer_plugin.evaluation.judges.base import Judged, Verdict, filled
from steer_plugin.evaluation.judges.rubrics import QUALITY

# As repeatable as a server can be; models that refuse one of these are given other options.
OPTIONS: Mapping[str, JSON] = MappingProxyType({"temperature": 0, "seed": 0, "max_tokens": 300})
_OURS = ("model", "messages", "stream", "n")


class OpenAIJudge:
    """Grades answers on a scale; a score that cannot be read is NaN, with the reason in the verdict's detail.

    Attributes:
        model: the model's name at the server.
        base_url: the server; else OPENAI_BASE_URL, else OpenAI's.
        rubric: the prompt, which names {answer}, {question}, {low}, {high} and keys of an item's extras.
        scale: the least and the greatest score.
        env: the environment variable that holds the key, read at each request; None for a server without keys.
        budget: the most requests (tries included) and tokens that this object may spend.
        retries: how often a request is tried again after 408, 409, 429, 5xx, a timeout or a lost connection, after
            `back_off` seconds, twice that, four times, up to a minute; a server's Retry-After counts too.
        cache: a folder for answers that other runs may reuse.
        images: whether pictures are shown to the judge.
        options: what else the request's body holds (temperature, seed, max_tokens).

    Raises:
        InputError: a rubric without {answer}, an empty scale, or another value that makes no sense.
    """

    # Each verdict costs money: it goes into the log before the next is asked for.
    batch_size = 1

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        rubric: str = QUALITY,
        scale: tuple[float | int, float | int] = (0, 10),
        env: str | None = "OPENAI_API_KEY",
        requests_per_minute: float | int | None = None,
        budget: Budget = Budget(),  # noqa: B008 - frozen
        retries: int = 5,
        back_off: float | int = 1.0,
        timeout: float | int = 60.0,
        cache: Path | None = None,
        images: bool = True,
        options: Mapping[str, JSON] = OPTIONS,
        name: str = "openai",
    ) -> None:
        if not scale[0] < scale[1]:
            raise InputError(f"scale must be (least, greatest), got {scale!r}.")
        if "{answer" not in rubric:
            raise InputError("the rubric does not name {answer}: the judge would not see what it grades.")
        if clash := [key for key in options if key in _OURS]:
            raise InputError(f"options must not name {', '.join(clash)}: the judge sets them itself.")
        self.model, self.rubric, self.scale, self.images, self.name = model, rubric, scale, images, name
        self.options = dict(options)
        self.cache = None if cache is None else Path(cache)
        self.server = ChatServer(
            base_url, env, requests_per_minute=requests_per_minute, budget=budget, retries=retries, back_off=back_off,
            timeout=timeout,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"OpenAIJudge({self.model!r}, {self.server.base_url!r})"

    def settings(self) -> dict[str, JSON]:
        """Return model, server, rubric, scale and options; neither key nor limits."""
        return {
            "model": self.model,
            "base_url": self.server.base_url,
            "rubric": self.rubric,
            "scale": list(self.scale),
            "images": self.images,
            "options": dict(self.options),
        }

    def judge(self, items: Sequence[Judged]) -> list[Verdict]:
        """Grade items one after the other.

        Raises:
            FrameworkError: the openai package is missing.
            InputError: no key, a rubric that names what an item lacks, a picture that cannot be read.
            JobError: the budget is spent, or the server refuses or fails; run again to resume.
        """
        return [self._one(item) for item in items]

    def _one(self, item: Judged) -> Verdict:
        low, high = self.scale
        prompt = filled(self.rubric, item, low=f"{low:g}", high=f"{high:g}")
        image = _png(item) if self.images else None
        place = self._place(prompt, image)
        reply = None if place is None else _cached(place)
        if reply is None:
            reply = self.server.ask(self.model, [{"role": "user", "content": _content(prompt, image)}], self.options)
            if place is not None:
                self._keep(place, prompt, image, reply)
        score, reason = read_score(reply.text, low, high)
        detail: dict[str, JSON] = {"finish": reply.finish, "model": reply.model, "tokens": reply.tokens}
        if reason is not None:
            detail["unread"] = reason
        return Verdict(item.id, score, reply.text, prompt, detail)

    def _place(self, prompt: str, image: bytes | None) -> Path | None:
        """Name the cache's file for a request."""
        if self.cache is None:
            return None
        seen = None if image is None else sha256(image)
        asked = [self.server.base_url, self.model, self.options, prompt, seen]
        return self.cache / f"{sha256(json.dumps(asked, sort_keys=True).encode())}.json"

    def _keep(self, place: Path, prompt: str, image: bytes | None, reply: Reply) -> None:
        make_folder(place.parent)
        kept: dict[str, JSON] = {
            "model": self.model, "prompt": prompt, "image": None if image is None else sha256(image),
            "text": reply.text, "finish": reply.finish, "answered_by": reply.model, "tokens": reply.tokens,
        }  # fmt: skip
        atomic_write_json(place, kept)


def _content(prompt: str, image: bytes | None) -> JSON:
    """Text alone as a plain string, which servers without pictures expect."""
    if image is None:
        return prompt
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    return [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": {"url": url}}]


def _png(item: Judged) -> bytes | None:
    picture = item.picture()
    if picture is None:
        return None
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _cached(place: Path) -> Reply | None:
    """Read a cached answer, None where there is none; JobError for a file that nobody here wrote."""
    if not place.is_file():
        return None
    try:
        row = cast("dict[str, JSON]", json.loads(place.read_bytes()))
        text, finish, model, tokens = (row[key] for key in ("text", "finish", "answered_by", "tokens"))
    except (ValueError, KeyError, TypeError) as error:
        raise JobError(f"{place} is no cached answer of a judge ({error!r}); delete it and run again.") from error
    return Reply(
        str(text), None if finish is None else str(finish), None if model is None else str(model),
        tokens if isinstance(tokens, int) else None,
    )  # fmt: skip
