"""A log of JSON lines: resumed at every byte a writer may have died at, and nobody else's file is touched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_plugin.atomic import JSON
from steer_plugin.errors import InputError, JobError
from steer_plugin.jsonl import JsonLines

JOB: Mapping[str, JSON] = {"model": "tiny", "sizes": (1, 2), "note": {"alpha": 2.0, "site": "resid_post.1"}}
ROWS: list[dict[str, JSON]] = [{"id": "a", "n": 1}, {"id": "b é \n", "n": [1, 2]}, {"id": "c", "n": None}]


def opened(path: Path, job: Mapping[str, JSON] = JOB) -> JsonLines:
    return JsonLines(path, job, "numbers")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("log") / "a.jsonl"
    book = opened(path)
    book.add(ROWS[:2])
    book.add(ROWS[2:])
    return path.read_bytes()


def test_a_line_for_the_job_and_one_for_each_row(whole: bytes):
    job, *rows = [json.loads(line) for line in whole.decode().splitlines()]
    assert job == {"job": {"model": "tiny", "sizes": [1, 2], "note": {"alpha": 2.0, "site": "resid_post.1"}}}
    assert rows == ROWS
    assert whole.endswith(b"\n")


@settings(max_examples=60)
@given(data=st.data())
def test_cut_at_any_byte_it_is_finished_to_the_same_bytes(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    book = opened(path)
    lines = whole[:cut].count(b"\n")
    assert book.rows == ROWS[: max(lines - 1, 0)]
    book.add(ROWS[len(book.rows) :])
    assert path.read_bytes() == whole
    assert book.rows == opened(path).rows == ROWS


@pytest.mark.parametrize(
    "content",
    [
        b"no log", b'{"a": 1}\n', b"[1, 2]\n", b'{"job": "x"}\n', b'{"job": {}}\n[]\n', b"\xff\xfe\n",
        b'{"job": {"model": "t',
    ],
)  # fmt: skip
def test_a_file_that_is_no_log_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes):
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    with pytest.raises(JobError, match=r"mine\.txt (is no log of numbers|holds numbers of another job)"):
        opened(path, {"other": 1})
    assert path.read_bytes() == content


def test_half_a_line_in_the_log_of_another_job_is_left_as_it_is(tmp_path: Path, whole: bytes):
    path = tmp_path / "a.jsonl"
    path.write_bytes(whole[:-4])
    with pytest.raises(JobError, match="another job"):
        opened(path, {**JOB, "model": "other"})
    assert path.read_bytes() == whole[:-4]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, whole: bytes):
    path = tmp_path / "a.jsonl"
    lines = whole.splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"id": \n' + lines[1])
    with pytest.raises(JobError, match=r"a\.jsonl is no log of numbers .*choose another file, or delete it"):
        opened(path)


def test_the_difference_between_two_jobs_is_named_with_both_values(tmp_path: Path):
    opened(tmp_path / "a.jsonl")
    with pytest.raises(JobError) as caught:
        opened(tmp_path / "a.jsonl", {"model": "tiny", "note": {"alpha": 3.0, "site": "resid_post.1"}, "new": True})
    said = str(caught.value)
    for part in ("a.jsonl holds numbers of another job", "note.alpha is '2.0' there and '3.0' here",
                 "new is 'None' there and 'True' here", "sizes is '[1, 2]' there", "Choose another place"):  # fmt: skip
        assert part in said
    assert "model is" not in said and "note.site" not in said


def test_a_folder_is_no_log(tmp_path: Path):
    with pytest.raises(JobError, match=r"cannot read .*Choose another file"):
        opened(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_json_cannot_hold_is_refused_and_writes_nothing(tmp_path: Path, value: float):
    book = opened(tmp_path / "a.jsonl")
    before = book.path.read_bytes()
    with pytest.raises(InputError, match=r"a\.jsonl cannot hold 'x': .*use plain JSON"):
        book.add([{"id": "y", "n": 1}, {"id": "x", "n": value}][::-1])
    assert book.path.read_bytes() == before and book.rows == []


def test_a_full_disk_leaves_whole_lines_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    book = opened(tmp_path / "a.jsonl")
    book.add(ROWS[:1])
    before = book.path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(JobError, match=r"No space left.*Free some space.*resumes"):
        patched.setattr("os.fsync", full)
        book.add(ROWS[1:])
    assert book.path.read_bytes() == before
    again = opened(book.path)
    again.add(ROWS[1:])
    assert opened(book.path).rows == ROWS


def test_folders_are_made_and_an_empty_file_is_a_new_log(tmp_path: Path):
    path = tmp_path / "deep" / "er" / "a.jsonl"
    opened(path)
    (tmp_path / "empty.jsonl").touch()
    opened(tmp_path / "empty.jsonl")
    assert path.read_bytes() == (tmp_path / "empty.jsonl").read_bytes()
