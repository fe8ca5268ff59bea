"""Scripts as processes of their own that cost no import: forked from one that has loaded torch and the package.

A job that is killed and started again is a real process each time, with its own pid, and dies of a real signal; only
the seconds of importing are spent once. Two such parents take turns: the order of sets and dictionaries of strings
(PYTHONHASHSEED) differs between a process and the one that goes on with its work, as it would between any two.

    with _forked.start(script, *arguments) as job: job.stdout, job.wait(), job.send_signal(), job.returncode
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

HERE = Path(__file__).resolve()
_turns = count()


class Job:
    """A forked process, as much of subprocess.Popen as the tests need."""

    def __init__(self, script: Path, arguments: tuple[str, ...]) -> None:
        self._parent = _parent(next(_turns) % 2)
        self._folder = tempfile.TemporaryDirectory()
        out, self._errors = Path(self._folder.name, "out"), Path(self._folder.name, "errors")
        os.mkfifo(out)
        words = {"script": str(script), "arguments": arguments, "out": str(out), "errors": str(self._errors)}
        self.pid: int = self._ask({"start": words})
        self.returncode: int | None = None
        self.stdout = out.open(encoding="utf-8")  # waits until the job has opened its end

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._parent.stdin is not None and self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(request) + "\n")
        self._parent.stdin.flush()
        return json.loads(self._parent.stdout.readline())

    @property
    def errors(self) -> str:
        """What the job wrote to stderr."""
        return self._errors.read_text(encoding="utf-8")

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def finish(self, timeout: float = 300) -> str:
        """Return what a job says that must end well."""
        with self:
            said = self.stdout.read()
            assert self.wait(timeout) == 0, self.errors
            return said

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:  # its pid stays its own until its parent has been asked how it ended
            os.kill(self.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.send_signal(signal.SIGKILL)
        self.wait()
        self.stdout.close()
        self._folder.cleanup()


def start(script: Path, *arguments: object) -> Job:
    """Run a script as `python script arguments...`."""
    return Job(script, tuple(map(str, arguments)))


@cache
def _parent(number: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONHASHSEED": str(1 + number), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])
    parent = subprocess.Popen(
        [sys.executable, str(HERE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    atexit.register(parent.communicate)  # the end of its stdin is its own
    return parent


def _serve(answers: TextIO) -> dict[str, Any]:
    """Fork for every request; in the forked process this returns, and the process ends as any other would."""
    for line in sys.stdin:
        ((what, asked),) = json.loads(line).items()
        if what == "start":
            answer: int | None = os.fork()
            if not answer:
                return asked
        else:
            pid, status = os.waitpid(asked, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    sys.exit()


def _become(job: dict[str, Any]) -> None:
    import runpy

    for path, number, how in (
        (os.devnull, 0, os.O_RDONLY),
        (job["out"], 1, os.O_WRONLY),
        (job["errors"], 2, os.O_WRONLY | os.O_CREAT),
    ):
        file = os.open(path, how)
        os.dup2(file, number)
        os.close(file)
    sys.argv = [job["script"], *job["arguments"]]
    sys.path.insert(0, str(Path(job["script"]).parent))
    runpy.run_path(job["script"], run_name="__main__")


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some libraries print while they are imported
    import torch

    torch.set_num_threads(1)
    import _colours  # noqa: F401
    import _tiny  # noqa: F401
    import transformers

    import steer_plugin  # noqa: F401
    from steer_plugin.training import steervlm  # noqa: F401

    _ = transformers.Trainer, transformers.LlavaProcessor, transformers.PreTrainedTokenizerFast
    _become(_serve(answers))
