"""Long jobs over many prompts, into a store: batches, processes, memory that runs out, and going on after a kill.

prompts -> blocks of like length -> this process's blocks -> batches -> rows -> shards, written behind one's back
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, NoReturn, Protocol, TypeVar, cast, runtime_checkable

from accelerate.utils import find_executable_batch_size
from torch import Tensor
from tqdm import tqdm
from transformers import ProcessorMixin

from steer_plugin.adapters._batches import Size, Sizes, ahead, batches
from steer_plugin.adapters._chat import template_of
from steer_plugin.adapters._parts import ModelParts
from steer_plugin.adapters._plan import MOST
from steer_plugin.artefact import versions
from steer_plugin.atomic import JSON
from steer_plugin.errors import InputError
from steer_plugin.processes import Processes
from steer_plugin.store import ShardWriter

PATIENCE = 60  # seconds of work that a kill may cost, where a shard takes longer to fill


@runtime_checkable
class Named(Protocol):
    """What a job is about: things with names."""

    @property
    def id(self) -> str: ...


class Rows(NamedTuple):
    """What a batch gives: tensors (item, ...) or ragged lists of them, and metadata of each item."""

    tensors: Mapping[str, Tensor | Sequence[Tensor]]
    about: Sequence[Mapping[str, JSON]]


Item = TypeVar("Item", bound=Named)
Made = TypeVar("Made")


class Bulk(ABC, Generic[Item, Made]):
    """A job on one model; `batch_size` None: as many as fit into memory.

    Attributes:
        what, unit: how the progress bar calls the job, and one item of it.
    """

    what: str
    unit: str

    def __init__(self, parts: ModelParts, processor: ProcessorMixin, batch_size: int | None) -> None:
        self.parts, self.processor, self.batch_size = parts, processor, batch_size
        self.sizes = Sizes(processor)

    @abstractmethod
    def asked(self, items: Sequence[Item]) -> dict[str, JSON]:
        """Describe what is asked for, so that a folder never mixes two jobs."""

    @abstractmethod
    def size(self, item: Item) -> Size:
        """How long an item's prompt is, and which pictures it is about."""

    @abstractmethod
    def batch(self, items: Sequence[Item]) -> Made:
        """Tokenise items and open their pictures; runs in a thread, while the model runs the batch before."""

    @abstractmethod
    def rows(self, batch: Made) -> Rows:
        """Run the model."""

    def job(self, items: Sequence[Item]) -> dict[str, JSON]:
        """Describe the job: what is asked for, the model, the template and the versions."""
        return {
            **self.asked(items),
            "model": {**self.parts.identity(), "weights": self.parts.fingerprint()},
            # The source, not what it renders: some templates write today's date.
            "template_sha256": hashlib.sha256(template_of(self.processor).encode()).hexdigest(),
            "versions": cast("JSON", versions()),
        }

    def run(self, items: Sequence[Item], out: Path, *, progress: bool = True) -> None:
        """Work into a folder, the batches dealt out to the processes; what is already there is not done again.

        Raises:
            InputError: no items, or ids that repeat.
            JobError: the folder holds another job, or cannot be written.
        """
        if not items:
            raise InputError(f"{self.what} needs at least one {self.unit}, got none.")
        ids = [item.id for item in items]
        if len(set(ids)) != len(ids):
            twice = next(one for one in ids if ids.count(one) > 1)
            raise InputError(f"{self.unit} id {twice!r} occurs more than once; ids must be unique.")
        among, shown = Processes.current(), f"{self.what}, process {Processes.current().index}"
        # Blocks do not depend on what fits into one process's memory.
        blocks = [
            [items[i] for i in block] for block in batches([self.size(item) for item in items], self.batch_size or MOST)
        ]
        mine = among.share(blocks)
        with (
            ShardWriter(out, self.job(items), order=ids, rank=among.index, ranks=among.count) as writer,
            tqdm(
                total=sum(map(len, mine)),
                desc=shown if among.several else self.what,
                unit=self.unit,
                disable=not progress or not among.main,
            ) as bar,
        ):
            if self.batch_size is not None:
                self._through(mine, writer, bar, self.batch_size)
                return

            def fitting(size: int) -> None:
                self._through(mine, writer, bar, size)

            # Halved, not cut by a tenth: each trial costs a batch.
            find_executable_batch_size(fitting, MOST, _halves(MOST))()

    def _through(self, blocks: Sequence[Sequence[Item]], writer: ShardWriter, bar: tqdm[NoReturn], size: int) -> None:
        """Work off what is not on disk.

        Batches are run whole, even if half of one is there: rounding, and what was sampled, are as in a run that was
        never interrupted.
        """
        cut = [block[i : i + size] for block in blocks for i in range(0, len(block), size)]
        todo = [batch for batch in cut if any(item.id not in writer.done for item in batch)]
        bar.update(sum(map(len, cut)) - sum(map(len, todo)) - bar.n)
        written = time.monotonic()
        for items, batch in ahead(todo, self.batch):
            tensors, about = self.rows(batch)
            new = [i for i, item in enumerate(items) if item.id not in writer.done]
            writer.append(
                [items[i].id for i in new],
                {
                    name: rows[new] if isinstance(rows, Tensor) else [rows[i] for i in new]
                    for name, rows in tensors.items()
                },
                [about[i] for i in new],
            )
            if time.monotonic() - written > PATIENCE:
                writer.flush()
                written = time.monotonic()
            bar.update(len(items))


def _halves(size: int) -> Callable[[], int]:
    """Give half of the size, and half of that at the next call."""
    tried = [size]

    def less() -> int:
        tried[0] //= 2
        return tried[0]

    return less
