from __future__ import annotations

import base64
import io
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from steer_plugin.errors import FrameworkError, InputError, JobError
from steer_plugin.evaluation.judges import Budget, Judged, OpenAIJudge, verdicts

pytest.importorskip("openai", reason="the extra 'judge' is not installed")

KEY = "sk-test-0123456789abcdef"
ITEMS = [Judged(str(i), f"question {i}?", f"answer {i}") for i in range(4)]


def said(text: str | None, tokens: int | None = 20, **message: object) -> tuple[int, Any, dict[str, str]]:
    """Build a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": "stop"}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "tiny-1", "choices": [choice]}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": tokens}
    return 200, body | ({} if tokens is None else {"usage": usage}), {}


def failed(status: int, code: str = "", **headers: str) -> tuple[int, Any, dict[str, str]]:
    return status, {"error": {"message": f"trouble {status}", "code": code}}, headers


Answer = Callable[[], tuple[int, Any, dict[str, str]]]


@dataclass
class Server:
    """A chat-completions server on this machine: gives its answers in turn, the last one for ever."""

    url: str = ""
    answers: list[tuple[int, Any, dict[str, str]] | Answer] = field(default_factory=lambda: [said("Fine.\nScore: 7")])
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, body: dict[str, Any], key: str) -> tuple[int, Any, dict[str, str]]:
        with self.lock:
            answer = self.answers[min(len(self.bodies), len(self.answers) - 1)]
            self.bodies.append(body)
            self.keys.append(key)
            self.times.append(time.monotonic())
        return answer() if callable(answer) else answer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            key = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status, answer, headers = made.reply({"path": self.path, **body}, key)
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            try:
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client had no patience

        def log_message(self, format: str, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    made.url = f"http://127.0.0.1:{httpd.server_port}/v1"
    yield made
    httpd.shutdown()
    httpd.server_close()


def judge(server: Server, **more: Any) -> OpenAIJudge:
    return OpenAIJudge("tiny", server.url, **{"back_off": 0.01, "timeout": 5.0, **more})


def test_a_score_with_its_prompt_and_raw_answer(server: Server):
    (verdict,) = judge(server, scale=(0, 10)).judge(ITEMS[:1])
    assert (verdict.score, verdict.raw) == (7.0, "Fine.\nScore: 7")
    assert verdict.detail == {"finish": "stop", "model": "tiny-1", "tokens": 20}
    (body,) = server.bodies
    assert body["path"] == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": verdict.prompt}]
    assert (body["model"], body["temperature"], body["seed"]) == ("tiny", 0, 0)
    assert "question 0?" in verdict.prompt and "answer 0" in verdict.prompt and "from\n0 to 10" in verdict.prompt


def test_pictures_are_sent_as_they_are(server: Server):
    picture = Image.linear_gradient("L").resize((9, 7)).convert("RGB")
    item = Judged("p", "what?", "grey", picture)
    judge(server).judge([item])
    judge(server, images=False).judge([item])
    shown, hidden = (body["messages"][0]["content"] for body in server.bodies)
    assert [part["type"] for part in shown] == ["text", "image_url"]
    data = base64.b64decode(shown[1]["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).tobytes() == picture.tobytes()
    assert hidden == shown[0]["text"]


def test_429_then_success(server: Server):
    server.answers = [failed(429, **{"Retry-After": "0.3"}), failed(503), said("Score: 4")]
    assert judge(server).judge(ITEMS[:1])[0].score == 4.0
    first, second, third = server.times
    assert second - first >= 0.3
    assert third - second >= 0.02  # twice the first back-off


def test_errors_until_it_gives_up(server: Server, tmp_path: Path):
    server.answers = [said("Score: 4"), *[failed(500)] * 3, said("Score: 5")]
    log = tmp_path / "v.jsonl"
    with pytest.raises(JobError, match=r"failed 3 times, last: .*trouble 500.*to resume"):
        verdicts(judge(server, retries=2), ITEMS, log=log, progress=False)
    assert len(server.bodies) == 4
    found = verdicts(judge(server), ITEMS, log=log, progress=False)
    assert [one.score for one in found] == [4, 5, 5, 5]
    assert len(server.bodies) == 7  # the first was not asked again


@pytest.mark.parametrize("answer", [failed(401), failed(400), failed(429, "insufficient_quota")])
def test_a_refusal_is_not_tried_again(server: Server, answer: tuple[int, Any, dict[str, str]]):
    server.answers = [answer]
    with pytest.raises(JobError, match=f"refuses: .*trouble {answer[0]}"):
        judge(server).judge(ITEMS[:1])
    assert len(server.bodies) == 1


@pytest.mark.parametrize("text", ["I would rather not say.", "", None, "Score: 70/100", "Score: eleven"])
def test_an_answer_without_a_number(server: Server, tmp_path: Path, text: str | None):
    server.answers = [said(text), said("Score: 3")]
    for _ in range(2):  # the log gives back what it was given
        first, second = verdicts(judge(server), ITEMS[:2], log=tmp_path / "v.jsonl", progress=False)
        assert first.score != first.score
        assert first.raw == (text or "")
        assert first.detail["unread"]
        assert second.score == 3.0
    assert len(server.bodies) == 2


def test_a_refusal_of_the_model_is_kept(server: Server):
    server.answers = [said(None, refusal="I cannot grade this.")]
    assert judge(server).judge(ITEMS[:1])[0].raw == "I cannot grade this."


@pytest.mark.parametrize(
    "broken",
    [
        (200, b"<html>busy</html>", {"Content-Type": "text/html"}),
        (200, b"{half", {}),
        (200, {"choices": []}, {}),
        (200, {"choices": None, "error": "loading"}, {}),
        (200, [], {}),
    ],
)
def test_no_chat_completion_at_all(server: Server, broken: tuple[int, Any, dict[str, str]]):
    server.answers = [broken, said("Score: 2")]
    assert judge(server).judge(ITEMS[:1])[0].score == 2.0
    server.answers = [broken]
    with pytest.raises(JobError, match="failed 2 times"):
        judge(server, retries=1).judge(ITEMS[:1])


def test_a_slow_server(server: Server):
    def slow() -> tuple[int, Any, dict[str, str]]:
        time.sleep(1.0)
        return said("Score: 1")

    server.answers = [slow, said("Score: 6")]
    assert judge(server, timeout=0.3).judge(ITEMS[:1])[0].score == 6.0
    server.answers, server.bodies = [slow], []
    with pytest.raises(JobError, match="failed 2 times, last: APITimeoutError"):
        judge(server, timeout=0.3, retries=1).judge(ITEMS[:1])


def test_nobody_listens(server: Server):
    with pytest.raises(JobError, match="failed 2 times, last: APIConnectionError"):
        OpenAIJudge("tiny", "http://127.0.0.1:9/v1", retries=1, back_off=0.01).judge(ITEMS[:1])


def test_the_pace_is_kept(server: Server):
    begun = time.monotonic()
    judge(server, requests_per_minute=300).judge(ITEMS)
    # Of the sending, not of the arrivals: a busy machine may deliver late.
    assert time.monotonic() - begun >= 3 * 0.2


@pytest.mark.parametrize(
    ("budget", "spent"), [(Budget(requests=2), "2 requests"), (Budget(tokens=21), r"21 tokens is spent \(40 used\)")]
)
def test_the_budget_is_kept_and_the_rest_resumed(server: Server, tmp_path: Path, budget: Budget, spent: str):
    log = tmp_path / "v.jsonl"
    with pytest.raises(JobError, match=f"budget of {spent}.*same log.*to resume"):
        verdicts(judge(server, budget=budget), ITEMS, log=log, progress=False)
    assert len(server.bodies) == 2
    assert len(verdicts(judge(server, budget=budget), ITEMS, log=log, progress=False)) == 4
    assert len(server.bodies) == 4


def test_tries_count_as_requests(server: Server):
    server.answers = [failed(500)]
    with pytest.raises(JobError, match="budget of 3 requests"):
        judge(server, budget=Budget(requests=3)).judge(ITEMS)
    assert len(server.bodies) == 3


def test_a_budget_of_tokens_needs_a_server_that_counts(server: Server, tmp_path: Path):
    server.answers = [said("Score: 7", tokens=None)]
    with pytest.raises(JobError, match="does not say how many tokens"):
        verdicts(judge(server, budget=Budget(tokens=99)), ITEMS, log=tmp_path / "v.jsonl", progress=False)
    assert len((tmp_path / "v.jsonl").read_text().splitlines()) == 2  # what was paid for is kept


def test_the_cache_answers_the_second_time(server: Server, tmp_path: Path):
    cache = tmp_path / "cache"
    first = judge(server, cache=cache).judge(ITEMS[:2])
    assert judge(server, cache=cache).judge(ITEMS[:2]) == first
    assert len(server.bodies) == len(list(cache.iterdir())) == 2
    picture = Image.new("RGB", (4, 4), "red")
    for change in ({"rubric": "{answer}? {high}"}, {"options": {"seed": 1}}):
        judge(server, cache=cache, **change).judge(ITEMS[:1])
    for image in (picture, Image.new("RGB", (4, 4), "blue")):
        judge(server, cache=cache).judge([Judged("0", ITEMS[0].question, ITEMS[0].answer, image)])
    assert len(server.bodies) == 6
    next(cache.iterdir()).write_text("{}")
    with pytest.raises(JobError, match="no cached answer"):
        for item in ITEMS[:2]:
            judge(server, cache=cache).judge([item])
        for change in ({"rubric": "{answer}? {high}"}, {"options": {"seed": 1}}):
            judge(server, cache=cache, **change).judge(ITEMS[:1])
        for image in (picture, Image.new("RGB", (4, 4), "blue")):
            judge(server, cache=cache).judge([Judged("0", ITEMS[0].question, ITEMS[0].answer, image)])


def test_the_key_is_read_late_and_written_nowhere(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    monkeypatch.delenv("OPENAI_API_KEY")
    made = judge(server, env="MY_KEY", cache=tmp_path / "cache", retries=0)
    with pytest.raises(InputError, match="MY_KEY is empty"):
        made.judge(ITEMS[:1])
    monkeypatch.setenv("MY_KEY", KEY)
    echo = {"error": {"message": f"wrong key {KEY}", "code": "invalid_api_key"}}
    server.answers = [said(f"Your key is {KEY}. Score: 7"), (401, echo, {}), (500, echo, {}), (200, {"error": KEY}, {})]
    errors: list[str] = []
    for _ in ITEMS:
        try:
            verdicts(made, ITEMS, log=tmp_path / "v.jsonl", progress=False)
        except JobError as error:
            chain: BaseException | None = error
            while chain is not None:
                errors.append(f"{chain!r} {chain}")
                chain = chain.__cause__ or chain.__context__
    assert server.keys == [KEY] * 5
    kept = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert any("Your key is ***" in text for text in kept)
    assert any("wrong key ***" in text for text in errors)
    held = [repr(made), repr(vars(made)), repr(vars(made.server)), str(made.settings()), caplog.text]
    assert [text for text in (*kept, *errors, *held) if KEY in text] == []


def test_a_server_without_keys(server: Server):
    judge(server, env=None).judge(ITEMS[:1])
    assert server.keys == ["none"]


def test_the_address_may_come_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    made = OpenAIJudge("tiny")
    assert made.settings()["base_url"] == server.url
    assert made.judge(ITEMS[:1])[0].score == 7.0


def test_bad_settings(monkeypatch: pytest.MonkeyPatch):
    url = "http://localhost/v1"
    for bad, message in (
        ({"rubric": "grade it"}, "does not name {answer}"),
        ({"scale": (10, 0)}, "scale must be"),
        ({"options": {"messages": []}}, "must not name messages"),
        ({"requests_per_minute": 0}, "requests_per_minute must be"),
        ({"timeout": float("inf")}, "timeout must be"),
        ({"retries": -1}, "retries must be"),
    ):
        with pytest.raises(InputError, match=message):
            OpenAIJudge("m", url, **bad)
    with pytest.raises(InputError, match=r"Budget\.tokens must be"):
        Budget(tokens=0)
    for address in ("localhost/v1", "ftp://host", "http://me:secret@host/v1", "http://host/v1?api-key=secret"):
        with pytest.raises(InputError, match="base_url") as caught:
            OpenAIJudge("m", address)
        assert "secret" not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(FrameworkError, match=r"steer-plugin\[judge\]"):
        OpenAIJudge("m", url).judge(ITEMS)
