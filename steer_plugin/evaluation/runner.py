"""One runner for every benchmark: ask, judge, score, compare, cost; into a folder that a killed run resumes.

{out}/answers/{method}[-seed].jsonl    {out}/verdicts/...    {out}/costs/...    {out}/shifts/...
{out}/metrics.json    {out}/table.md    {out}/*.png

Several processes share the questions, verdicts and costs; each has the whole result, and the first one writes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
from jaxtyping import Float

from steer_plugin.adapters import AttachedModel
from steer_plugin.artefact import sha256, versions
from steer_plugin.atomic import JSON, atomic_write_bytes, atomic_write_json
from steer_plugin.errors import InputError
from steer_plugin.evaluation.answers import Answer
from steer_plugin.evaluation.asking import Asked, Method, Sampling, answered, distinct
from steer_plugin.evaluation.benchmark import Benchmark, Metric
from steer_plugin.evaluation.comparing import Runs, against_all, by_picture, comparable, scored_rows
from steer_plugin.evaluation.cost_log import ItemCost, MethodCosts, item_costs, method_costs
from steer_plugin.evaluation.judges import Verdict, verdicts
from steer_plugin.evaluation.lineup import Entry
from steer_plugin.evaluation.result import Evaluation
from steer_plugin.evaluation.seeds import SeedSummary, across
from steer_plugin.processes import Processes

COSTED = 200


@dataclass
class Runner:
    """How an evaluation is run.

    Attributes:
        batch_size: questions asked at once.
        seed: of the bootstrap and the permutations.
        sampling: draw the answers; greedy without.
        max_new_tokens: longest answer, instead of the benchmark's.
        costed: how many different items KL and perplexity are measured on; 0 leaves them out.
    """

    vlm: AttachedModel
    benchmark: Benchmark
    out: Path
    batch_size: int = 32
    seed: int = 0
    sampling: Sampling | None = None
    max_new_tokens: int | None = None
    costed: int = COSTED
    progress: bool = True
    unread: dict[str, int] = field(default_factory=dict[str, int], init=False)

    def run(self, entries: Sequence[Entry], provenance: Mapping[str, JSON] | None = None) -> Evaluation:
        """Ask, score and write everything; return what was found.

        A metric with scores on fewer than two pictures has no interval and is left out.

        Raises:
            InputError: as `check`; no "none" among the entries, two of one name, a headline on fewer than two pictures.
            JobError: the folder holds another job, or cannot be written.
        """
        self.check()
        names = [entry.name for entry in entries]
        files = [entry.log(seed) for entry in entries for seed, _ in entry.runs]
        if names.count("none") != 1 or len(set(names)) < len(names):
            raise InputError(f"the methods are {names}: expected each once, 'none' among them.")
        if clash := [file for file in files if files.count(file) > 1]:
            raise InputError(f"two of the methods {names} would both write {clash[0]}: rename one of them.")
        runs: dict[str, Runs] = {}
        costs: dict[str, MethodCosts] = {}
        for entry in entries:
            found: list[dict[str, Float[np.ndarray, "item column"]]] = []
            for number, (seed, method) in enumerate(entry.runs):
                answers = self._ask(entry, seed, method)
                found.append(self._values(entry, seed, answers))
                if not number:
                    costs[entry.name] = self._costs(entry, seed, method, answers)
            runs[entry.name] = found
        result = self._result(entries, runs, costs, provenance or {})
        processes = Processes.current()
        if processes.main:
            atomic_write_json(self.out / "metrics.json", result.as_json())
            atomic_write_bytes(self.out / "table.md", result.markdown().encode())
        processes.wait()
        return result

    @property
    def tokens(self) -> int:
        """Longest answer."""
        return self.benchmark.max_new_tokens if self.max_new_tokens is None else self.max_new_tokens

    def check(self) -> None:
        """Refuse, before any work, what cannot be run.

        Raises:
            InputError: no items, or those of one picture; no room for an answer; costs on one picture.
        """
        name, items, groups = self.benchmark.name, self.benchmark.items, self.benchmark.groups
        if not items:
            raise InputError(f"{name} has no items to ask about.")
        if len(groups) != len(items) or len(set(groups)) < 2:
            raise InputError(
                f"{name} has {len(items)} items, {len(groups)} groups and {len(set(groups))} pictures: expected the "
                "picture of every item, and at least two, which intervals resample."
            )
        if self.tokens < 1:
            raise InputError(f"an answer needs at least one token, got max_new_tokens={self.tokens}.")
        pictures = self._pictures()
        if self.costed < 0 or (self.costed and len({pictures[item.key] for item in self._costed()}) < 2):
            raise InputError(f"costed={self.costed} items: expected 0 for no costs, or items of at least two pictures.")

    def _job(self) -> dict[str, JSON]:
        parts = self.vlm.parts
        template = str(getattr(self.vlm.processor, "chat_template", None))
        return {
            "model": {**parts.identity(), "weights": parts.fingerprint()},
            "template": sha256(template.encode()), "data": dict(self.benchmark.source),
            "benchmark": self.benchmark.name,
        }  # fmt: skip

    def _ask(self, entry: Entry, seed: int, method: Method) -> dict[str, Answer]:
        sampling = self.sampling
        return answered(
            self.vlm, self.benchmark.items, method, batch_size=self.batch_size, max_new_tokens=self.tokens,
            sampling=sampling, log=self.out / "answers" / entry.log(seed), job=self._job(), progress=self.progress,
        )  # fmt: skip

    def _values(
        self, entry: Entry, seed: int, answers: Mapping[str, Answer]
    ) -> dict[str, Float[np.ndarray, "item column"]]:
        texts = {key: answer.text for key, answer in answers.items()}
        judged: dict[str, list[Verdict]] = {}
        for judge in self.benchmark.judges:
            judged[judge.name] = verdicts(
                judge, self.benchmark.judged(judge, texts), progress=self.progress, job={"method": entry.name},
                log=self.out / "verdicts" / f"{judge.name}-{entry.log(seed)}",
            )  # fmt: skip
            unread = sum(math.isnan(one.score) for one in judged[judge.name])
            if unread:
                self.unread[f"{judge.name} on {entry.name}"] = unread
        return self.benchmark.values(texts, judged)

    def _costs(self, entry: Entry, seed: int, method: Method, answers: Mapping[str, Answer]) -> MethodCosts:
        found: dict[str, ItemCost] = {}
        if self.costed:
            found = item_costs(
                self.vlm, self._costed(), method, answers, batch_size=self.batch_size, job=self._job(),
                log=self.out / "costs" / entry.log(seed), progress=self.progress,
            )  # fmt: skip
        return method_costs(self.vlm, answers, found, self._pictures(), seed=self.seed)

    def _costed(self) -> list[Asked]:
        """Items that costs are measured on, spread over the whole benchmark: the first ones may all be of one kind."""
        asked = distinct(self.benchmark.items)
        return [asked[i] for i in np.unique(np.linspace(0, len(asked) - 1, self.costed).round().astype(int))]

    def _pictures(self) -> dict[str, str]:
        return {item.key: group for item, group in zip(self.benchmark.items, self.benchmark.groups, strict=True)}

    def _result(
        self,
        entries: Sequence[Entry],
        runs: Mapping[str, Runs],
        costs: Mapping[str, MethodCosts],
        provenance: Mapping[str, JSON],
    ) -> Evaluation:
        benchmark, groups = self.benchmark, list(self.benchmark.groups)
        scores = {
            name: {
                metric.name: _summary(metric, groups, found, self.seed)
                for metric in benchmark.metrics
                if comparable(metric.name, groups, found)
            }
            for name, found in runs.items()
        }
        if benchmark.headline not in scores["none"]:
            raise InputError(
                f"{benchmark.headline!r} of {benchmark.name} has scores on fewer than two pictures, which intervals "
                "resample: take more pictures."
            )
        controls = {entry.name: entry.control_of for entry in entries if entry.control_of is not None}
        against, over = against_all(benchmark, runs, controls, seed=self.seed)
        return Evaluation(
            benchmark.name, benchmark.headline, tuple(benchmark.metrics), len(benchmark.items), scores, against, over,
            costs, controls, {**self._provenance(entries), **provenance}, runs, groups,
        )  # fmt: skip

    def _provenance(self, entries: Sequence[Entry]) -> dict[str, JSON]:
        decoding: dict[str, JSON] = {"do_sample": self.sampling is not None, "max_new_tokens": self.tokens}
        if self.sampling is not None:
            decoding |= {**self.sampling.as_json(), "batch_size": self.batch_size}
        methods: dict[str, JSON] = {
            entry.name: [
                {"seed": seed, "prefix": method.prefix, "worded": method.worded is not None, "note": method.note}
                for seed, method in entry.runs
            ]
            for entry in entries
        }  # fmt: skip
        return {
            **self._job(), "decoding": decoding, "seed": self.seed, "methods": methods,
            "judges": {judge.name: dict(judge.settings()) for judge in self.benchmark.judges},
            "unread_verdicts": dict(self.unread), "costed": min(self.costed, len(distinct(self.benchmark.items))),
            "versions": cast(JSON, versions()),
        }  # fmt: skip


def _summary(metric: Metric, pictures: Sequence[str], runs: Runs, seed: int) -> SeedSummary:
    use = scored_rows(metric.name, runs)
    groups = [picture for picture, chosen in zip(pictures, use, strict=True) if chosen]
    return across(*by_picture([run[metric.name][use] for run in runs], groups, metric.statistic), seed=seed)
