"""What the parts of the demo share: the model and its world, the folder, extraction, asking, the choice of alpha."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from steer_plugin.adapters import AttachedModel
from steer_plugin.atomic import JSON
from steer_plugin.contrast import ContrastivePair
from steer_plugin.evaluation.asking import Asked, Method, answers
from steer_plugin.pocket import World
from steer_plugin.pocket.language import CAREFUL
from steer_plugin.shifts import Shifts

T = TypeVar("T")
PROMPT = CAREFUL  # the instruction of the prompt baseline, which the pocket VLM heard in training


@dataclass
class Bench:
    """One model, one world, one output folder."""

    vlm: AttachedModel
    world: World
    out: Path
    seed: int
    batch_size: int = 64
    progress: bool = True
    times: dict[str, float] = field(default_factory=dict[str, float])
    encoded: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])

    def timed(self, name: str, work: Callable[[], T]) -> T:
        """Run a piece of work and add its seconds to the account of that name."""
        begun = time.perf_counter()
        result = work()
        self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - begun
        return result

    def extract(
        self, pairs: Sequence[ContrastivePair], folder: str, write: int, read: int, target: str = "average_forced"
    ) -> Shifts:
        """Extract P2S shifts into out/shifts/folder, or read what an earlier run left there."""
        work = lambda: self.vlm.extract(  # noqa: E731
            pairs, f"resid_post.{write}", f"resid_post.{read}", out=self.out / "shifts" / folder,
            target=target, batch_size=self.batch_size, progress=self.progress,
        )  # fmt: skip
        return self.timed("extract", work)

    def ask(
        self, items: Sequence[Asked], method: Method, part: str, job: Mapping[str, JSON], max_new_tokens: int = 12
    ) -> dict[str, str]:
        """Ask everything under one method; answers are kept in out/answers and asked once."""
        return answers(
            self.vlm, items, method, batch_size=self.batch_size, max_new_tokens=max_new_tokens, progress=self.progress,
            log=self.out / "answers" / f"{part}-{method.name}.jsonl",
            job={**job, "weights": self.vlm.parts.fingerprint()}, encoded=self.encoded,
        )  # fmt: skip

    def try_out(self, items: Sequence[Asked], method: Method, max_new_tokens: int = 12) -> dict[str, str]:
        """Ask everything under one method, keeping nothing on disk."""
        return answers(
            self.vlm, items, method, batch_size=self.batch_size, max_new_tokens=max_new_tokens, progress=False,
            encoded=self.encoded,
        )  # fmt: skip


def gentlest(tried: Mapping[str, float], n: int) -> float:
    """The least strength within one standard error of the best score (a share of n): they cannot be told apart."""
    best = max(tried.values())
    floor = best - math.sqrt(best * (1 - best) / n)
    return next(float(alpha) for alpha, score in tried.items() if score >= floor)
