"""Several processes on one job: which of them this is, what its share is, and where they wait for each other.

    accelerate launch --num_processes 8 --module steer_plugin.cli eval pope ...       (or torchrun; docs/scale.md)

accelerate and torchrun start the processes and end all of them when one dies. Work is dealt out by its number alone:
piece i belongs to process i mod count, so nothing is sent; results meet in files of a folder that all of them see.
What waits is collective: every process must call it, as often as the others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import distributed

from steer_plugin.errors import InputError, JobError

T = TypeVar("T")

# Processes may be hours apart; a dead one is noticed by its launcher and by its closed connection, not by this.
_PATIENCE = timedelta(days=30)
_POLL = 0.02  # seconds


@dataclass(frozen=True)
class Processes:
    """The processes of a job; `Processes()` is one that is alone.

    Attributes:
        index, count: which of how many, over all machines.
        local: which one on this machine; it says which GPU is its own.
    """

    index: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def current(cls) -> Processes:
        """What the launcher started, by the environment that it set; cheap, waits for nobody.

        Raises:
            InputError: an environment of several processes that says nothing of this one.
        """
        names = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
        texts = [os.environ.get(name, default) for name, default in zip(names, ("1", "", ""), strict=True)]
        if texts[0] == "1":
            return cls()
        if not all(text.isdecimal() for text in texts) or not int(texts[1]) < int(texts[0]):
            told = ", ".join(f"{name}={text!r}" for name, text in zip(names, texts, strict=True))
            raise InputError(
                f"the environment says {told}: expected the numbers that a launcher sets. Start several processes "
                "with 'accelerate launch --num_processes N', or unset WORLD_SIZE."
            )
        return cls(int(texts[1]), int(texts[0]), int(texts[2]))

    @property
    def main(self) -> bool:
        """Whether this is the process that writes what there is one of, and that shows progress."""
        return self.index == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    def share(self, items: Sequence[T]) -> list[T]:
        """Every count-th item from the index on: the shares of all processes are all items, each once."""
        return list(items[self.index :: self.count])

    def mine(self, number: int) -> bool:
        """Whether piece `number` of a job is in this process's share."""
        return number % self.count == self.index

    def device(self) -> str:
        """Where this process puts its model: its own GPU ("cuda:2"), "cuda" when it is alone, "cpu" without any.

        More processes on a machine than GPUs share them in turn.
        """
        if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
            return "cpu"
        return f"cuda:{self.local % torch.cuda.device_count()}" if self.several else "cuda"

    def wait(self) -> None:
        """Go on when every process has come here, however long that takes; nothing for one process.

        What the others wrote before is on disk then.

        Raises:
            JobError: another process has ended.
        """
        if not self.several:
            return
        try:
            work = distributed.barrier(group=_group(), async_op=True)
            # Looked at again and again, not waited for: Ctrl-C is heard meanwhile.
            while work is not None and not work.is_completed():
                time.sleep(_POLL)
            if work is not None:
                work.wait()
        except (RuntimeError, distributed.DistBackendError) as error:
            raise JobError(
                f"process {self.index} of {self.count} waited for the others, and one of them has ended: its own "
                "message says why. Run the same command again; it resumes."
            ) from error

    def need_folder(self, out: Path | str | None, what: str) -> None:
        """Refuse several processes without a place that all of them see.

        Raises:
            InputError: `out` is None and there are several processes.
        """
        if self.several and out is None:
            raise InputError(
                f"{what} in {self.count} processes needs a file or folder that all of them see, because their results "
                "meet there: give one, or run it in one process."
            )


@cache
def _group() -> distributed.ProcessGroup:
    """The processes as gloo knows them: waiting on CPUs, for as long as it takes, whatever moves the tensors."""
    # Imported here: one process does without.
    from accelerate import PartialState

    # Tensors meet wherever they lie: a model on the CPU may be trained on a machine with GPUs.
    cpu = Processes.current().device() == "cpu"
    PartialState(cpu=cpu, backend="gloo" if cpu else "cpu:gloo,cuda:nccl")
    return cast("distributed.ProcessGroup", distributed.new_group(backend="gloo", timeout=_PATIENCE))
