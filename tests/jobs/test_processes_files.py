"""Files of several processes, without starting any: each process is one environment, and waiting is left out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from _colours import Colours, Lengths
from _tiny import D_MODEL, draw, tiny_llava, tiny_processor

import steer_plugin as sp
from steer_plugin import cli
from steer_plugin.atomic import JSON
from steer_plugin.errors import InputError, JobError
from steer_plugin.evaluation.asking import Method, answers
from steer_plugin.evaluation.calibrate import calibrate
from steer_plugin.evaluation.judges import Judged, verdicts
from steer_plugin.jsonl import JsonLines
from steer_plugin.loading import load_plain
from steer_plugin.processes import Processes

JOB: Mapping[str, JSON] = {"model": "tiny"}


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch):
    """Make this process one of several."""
    monkeypatch.setattr(Processes, "wait", lambda processes: None)

    def as_process(index: int, count: int, local: int | None = None) -> Processes:
        for name, value in (("WORLD_SIZE", count), ("RANK", index), ("LOCAL_RANK", index if local is None else local)):
            monkeypatch.setenv(name, str(value))
        return Processes.current()

    return as_process


def opened(path: Path, job: Mapping[str, JSON] = JOB) -> JsonLines:
    return JsonLines(path, job, "numbers")


def row(number: int) -> dict[str, JSON]:
    return {"id": f"n{number}", "n": number}


def lines(path: Path) -> list[object]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(become, path: Path, shares: Mapping[tuple[int, int], list[int]]) -> None:
    """Let processes (index, count) append numbers, and die."""
    for (index, count), numbers in shares.items():
        become(index, count)
        opened(path).add([row(number) for number in numbers])


def test_what_a_launcher_says(become, monkeypatch: pytest.MonkeyPatch):
    assert Processes.current() == Processes(0, 1, 0) and Processes.current().main
    assert become(5, 8, 1) == Processes(5, 8, 1)
    assert become(0, 1) == Processes()
    for index, count in ((2, 2), (-1, 2), ("", 2), (0, "many")):
        with pytest.raises(InputError, match=r"WORLD_SIZE=.*accelerate launch --num_processes"):
            become(index, count)


def test_shares_are_everything_once(become):
    for count in (1, 2, 3, 7):
        shares = [become(index, count).share(range(5)) for index in range(count)]
        assert sorted(number for share in shares for number in share) == list(range(5))
        assert all(become(index, count).mine(number) for index, share in enumerate(shares) for number in share)


def test_each_process_has_a_gpu_of_its_own(become, monkeypatch: pytest.MonkeyPatch):
    assert Processes().device() == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert Processes().device() == "cuda"
    assert [become(index, 12, index % 6).device() for index in (0, 3, 5, 9)] == ["cuda:0", "cuda:3", "cuda:1", "cuda:3"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert become(1, 2).device() == "cpu"


def test_any_number_of_processes_goes_on_from_the_files_of_any_other(become, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    written(become, path, {(0, 3): [0, 3], (1, 3): [1], (2, 3): [2]})
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.p1", "a.jsonl.p2"]
    for index, count in ((1, 2), (0, 1)):
        become(index, count)
        book = opened(path)
        assert sorted(int(str(one["n"])) for one in book.rows) == [0, 1, 2, 3]
    book.add([row(4)])
    book.gather(lambda one: int(str(one["n"])))
    assert lines(path) == [{"job": JOB}, *(row(number) for number in range(5))] and book.rows == lines(path)[1:]
    assert [one.name for one in tmp_path.iterdir()] == ["a.jsonl"]


def test_half_a_line_is_cut_off_by_its_own_process_alone(become, tmp_path: Path):
    path, other = tmp_path / "a.jsonl", tmp_path / "a.jsonl.p1"
    written(become, path, {(0, 2): [0], (1, 2): [1]})
    for place in (path, other):
        with place.open("ab") as file:
            file.write(b'{"id": "n')
    before = other.read_bytes()
    become(0, 2)
    assert opened(path).rows == [row(0), row(1)]
    assert path.read_bytes().endswith(b"\n") and other.read_bytes() == before
    become(1, 2)
    opened(path).add([row(3)])
    assert lines(other) == [{"job": JOB}, row(1), row(3)]


def test_killed_between_the_whole_file_and_the_end_of_the_others(become, tmp_path: Path, monkeypatch):
    path = tmp_path / "a.jsonl"
    written(become, path, {(0, 2): [0], (1, 2): [1]})
    become(0, 2)
    book = opened(path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        book.gather(lambda one: int(str(one["n"])))
    assert (tmp_path / "a.jsonl.p1").exists() and lines(path)[1:] == [row(0), row(1)]
    book = opened(path)
    assert book.rows == [row(0), row(1)]
    book.gather(lambda one: int(str(one["n"])))
    assert lines(path)[1:] == [row(0), row(1)] and not (tmp_path / "a.jsonl.p1").exists()


@pytest.mark.parametrize("index", [0, 1])
def test_another_job_of_another_process_is_refused_and_left_alone(become, tmp_path: Path, index: int):
    path = tmp_path / "a.jsonl"
    written(become, path, {(1, 2): [1]})
    before = (tmp_path / "a.jsonl.p1").read_bytes()
    become(index, 2)
    with pytest.raises(JobError, match=r"a\.jsonl\.p1 holds numbers of another job: model is 'tiny' there"):
        opened(path, {"model": "large"})
    assert [one.name for one in tmp_path.iterdir()] == ["a.jsonl.p1"]
    assert (tmp_path / "a.jsonl.p1").read_bytes() == before


def test_a_log_may_be_called_like_another_ones_part(become, tmp_path: Path):
    written(become, tmp_path / "a.jsonl", {(0, 1): [0]})
    written(become, tmp_path / "a.p1.jsonl", {(0, 1): [1]})
    assert opened(tmp_path / "a.jsonl").rows == [row(0)]


def test_a_folder_that_is_not_shared(become, tmp_path: Path):
    become(1, 2)
    book = opened(tmp_path / "a.jsonl")
    book.add([row(1)])
    (tmp_path / "a.jsonl").write_text('{"job": {"model": "tiny"}}\n')  # the first process saw no a.jsonl.p1
    with pytest.raises(JobError, match="lacks numbers that process 1 wrote: do all processes see the same folder"):
        book.gather(lambda one: 0.0)


def test_several_processes_need_a_place_to_meet(become):
    vlm, asks = sp.attach(tiny_llava(), tiny_processor()), Colours(training=False).asks
    become(1, 2)
    for call, what in (
        (lambda: answers(vlm, asks, Method("none")), "asking"),
        (lambda: verdicts(Lengths(), [Judged("a", "q", "x")]), "judging"),
        (lambda: calibrate(vlm, sp.add("resid_post.1", draw(D_MODEL)), asks, lambda texts: []), "choosing a strength"),
    ):
        with pytest.raises(InputError, match=f"{what} in 2 processes needs a file or folder that all of them see"):
            call()


@pytest.mark.parametrize("command", ["fit", "demo", ""])
def test_commands_of_one_process_refuse_several(become, monkeypatch, capsys, command: str):
    become(1, 2)
    monkeypatch.setattr("sys.argv", ["steer-plugin", *command.split()])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and f"'{command}' runs in one process, and 2 were started" in capsys.readouterr().err


def test_one_process_speaks(become, capsys):
    for index in (0, 1):
        become(index, 2)
        cli.say(f"from {index}")
    assert capsys.readouterr().out == "from 0\n"


def test_a_model_of_several_processes_lies_where_its_process_says(become, tmp_path: Path, monkeypatch):
    where: list[str] = []
    tiny_llava().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    monkeypatch.setattr("torch.nn.Module.to", lambda model, place: where.append(place) or model)
    monkeypatch.setattr(Processes, "device", lambda processes: f"cuda:{processes.local}")
    become(3, 4, 1)
    load_plain(str(tmp_path))
    load_plain(str(tmp_path), "cpu")
    assert where == ["cuda:1", "cpu"]
