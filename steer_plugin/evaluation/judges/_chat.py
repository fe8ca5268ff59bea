"""One chat completion after another from an OpenAI-compatible server: paced, retried, within a budget.

The key is read from the environment for each request and kept in no attribute; what a server echoes of it is blacked
out before anybody sees it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from steer_plugin.atomic import JSON
from steer_plugin.errors import FrameworkError, InputError, JobError
from steer_plugin.evaluation.judges.base import check_count

if TYPE_CHECKING:
    from openai import OpenAI

LONGEST_WAIT = 60.0
_DEFAULT_URL = "https://api.openai.com/v1"
_NO_KEY = "none"
# Shorter ones are placeholders of local servers; blacking out "1" would change what the judge said.
_SHORTEST_SECRET = 8
_RESUME = (
    "Run the same again with the same log (and cache) to resume: verdicts that are there are not asked for twice, and "
    "a new judge starts with a fresh budget."
)


@dataclass(frozen=True)
class Budget:
    """The most that a judge may spend; None is no limit. Tokens are known after an answer: one may go over.

    Raises:
        InputError: a limit below 1.
    """

    requests: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("requests", self.requests), ("tokens", self.tokens)):
            if value is not None:
                check_count(f"Budget.{name}", value)


@dataclass(frozen=True)
class Reply:
    """A server's answer: its text ("" for none), why it ended, which model spoke, and the tokens it cost."""

    text: str
    finish: str | None
    model: str | None
    tokens: int | None


@dataclass(frozen=True)
class _Failed:
    """A request that went wrong: whether another try may help, and how long the server wants to be left alone."""

    reason: str
    again: bool
    wait: float = 0.0


class ChatServer:
    """A server, and how it may be used; waits are in seconds.

    Raises:
        InputError: a limit that makes no sense, or an address that may hold a secret.
    """

    def __init__(
        self,
        base_url: str | None,
        env: str | None,
        *,
        requests_per_minute: float | int | None,
        budget: Budget,
        retries: int,
        back_off: float | int,
        timeout: float | int,
    ) -> None:
        self.base_url = _checked_url(base_url or os.environ.get("OPENAI_BASE_URL") or _DEFAULT_URL)
        self.env = env
        self.budget = budget
        self.retries = check_count("retries", retries, 0)
        self.back_off = _positive("back_off", back_off)
        self.timeout = _positive("timeout", timeout)
        self.pause = 0.0 if requests_per_minute is None else 60 / _positive("requests_per_minute", requests_per_minute)
        self.requests = 0
        self.tokens = 0
        self._uncounted = False
        self._next = 0.0

    def ask(self, model: str, messages: Sequence[Mapping[str, JSON]], options: Mapping[str, JSON]) -> Reply:
        """Send one chat and return the answer; trouble that may pass is waited out.

        Raises:
            FrameworkError: the openai package is missing.
            InputError: the environment holds no key.
            JobError: the budget is spent, the server refuses, or every try failed.
        """
        failed = _Failed("nothing was tried", again=True)
        with self._client() as client:
            for attempt in range(self.retries + 1):
                self._allow()
                self._keep_pace()
                self.requests += 1
                result = self._once(client, model, messages, options)
                if isinstance(result, Reply):
                    return self._counted(result)
                failed = result
                if not failed.again:
                    raise JobError(f"{self.base_url} refuses: {failed.reason}. {_RESUME}")
                if attempt < self.retries:
                    time.sleep(min(LONGEST_WAIT, max(self.back_off * 2**attempt, failed.wait)))
        raise JobError(f"{self.base_url} failed {self.retries + 1} times, last: {failed.reason}. {_RESUME}")

    def hide(self, text: str) -> str:
        """Black out the key in a text."""
        key = os.environ.get(self.env, "").strip() if self.env else ""
        return text.replace(key, "***") if len(key) >= _SHORTEST_SECRET else text

    def _client(self) -> OpenAI:
        if self.env is None:
            key = _NO_KEY
        elif not (key := os.environ.get(self.env, "").strip()):
            raise InputError(
                f"the environment variable {self.env} is empty: put the judge's key there, or give env=None for a "
                "server that wants none."
            )
        return _package().OpenAI(api_key=key, base_url=self.base_url, timeout=self.timeout, max_retries=0)

    def _once(
        self, client: OpenAI, model: str, messages: Sequence[Mapping[str, JSON]], options: Mapping[str, JSON]
    ) -> Reply | _Failed:
        openai = _package()
        try:
            answer = client.chat.completions.create(
                model=model, messages=cast("Any", list(messages)), extra_body=dict(options)
            )
        except openai.APIStatusError as error:
            status = int(error.status_code)
            # Out of money is told as 429 too, and no waiting helps.
            again = (status in (408, 409, 429) or status >= 500) and error.code != "insufficient_quota"
            return _Failed(self._told(error), again, _retry_after(error.response.headers.get("retry-after")))
        except (openai.APIError, ValueError) as error:  # timeouts, lost connections, bodies that are no JSON
            return _Failed(self._told(error), again=True)
        return self._read(answer)

    def _read(self, answer: object) -> Reply | _Failed:
        # The package builds its answers without checking them: any server's idea of one comes through.
        choices: object = getattr(answer, "choices", None)
        if not isinstance(choices, list) or not choices:
            return _Failed(f"no chat completion: {self.hide(str(answer))[:200]!r}", again=True)
        choice = cast("Any", choices[0])
        message: object = getattr(choice, "message", None)
        texts = [getattr(message, name, None) for name in ("content", "refusal")]
        text = next((one for one in texts if isinstance(one, str) and one), "")
        tokens: object = getattr(getattr(answer, "usage", None), "total_tokens", None)
        finish, model = getattr(choice, "finish_reason", None), getattr(answer, "model", None)
        return Reply(
            self.hide(text), None if finish is None else str(finish), None if model is None else str(model),
            tokens if isinstance(tokens, int) else None,
        )  # fmt: skip

    def _told(self, error: Exception) -> str:
        return self.hide(f"{type(error).__name__}: {error}")[:500]

    def _counted(self, reply: Reply) -> Reply:
        if reply.tokens is None:
            self._uncounted = True
        else:
            self.tokens += reply.tokens
        return reply

    def _allow(self) -> None:
        """Refuse the next request when the budget is spent; what was paid for is in the log by then."""
        if self.budget.requests is not None and self.requests >= self.budget.requests:
            raise JobError(f"the budget of {self.budget.requests} requests is spent. {_RESUME}")
        if self.budget.tokens is None:
            return
        if self._uncounted:
            raise JobError(
                f"{self.base_url} does not say how many tokens an answer costs, so Budget(tokens=...) cannot be kept: "
                f"use Budget(requests=...). {_RESUME}"
            )
        if self.tokens >= self.budget.tokens:
            raise JobError(f"the budget of {self.budget.tokens} tokens is spent ({self.tokens} used). {_RESUME}")

    def _keep_pace(self) -> None:
        time.sleep(max(0.0, self._next - time.monotonic()))
        self._next = time.monotonic() + self.pause


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"base_url must look like https://host/v1, got {url!r}.")
    # The address goes into logs: it must not bring a secret along.
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InputError(
            f"base_url {parts.scheme}://{parts.hostname}... holds a user, a password or a query, and it is written "
            "into logs: give the bare address, and the key in the environment."
        )
    return url.rstrip("/")


def _positive(name: str, value: float | int) -> float:
    if isinstance(value, bool) or not 0 < value < float("inf"):
        raise InputError(f"{name} must be a finite number above 0, got {value!r}.")
    return float(value)


def _retry_after(header: str | None) -> float:
    """Seconds that a server wants to be left alone; 0 where it says nothing, or a date."""
    return float(header) if header is not None and header.strip().replace(".", "", 1).isdigit() else 0.0


def _package() -> Any:
    try:
        import openai
    except ImportError as error:
        raise FrameworkError("OpenAIJudge needs the openai package: pip install 'steer-plugin[judge]'.") from error
    return openai
