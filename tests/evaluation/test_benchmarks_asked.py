"""The drawn world's exports, from the folder to figures with the pocket VLM: asked, scored, extracted, steered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import steer_plugin as sp
from steer_plugin.adapters import AttachedModel, parse_target
from steer_plugin.evaluation.asking import Asked, Method, answers
from steer_plugin.evaluation.benchmark import Benchmark, asked_rows
from steer_plugin.evaluation.benchmarks import open_benchmark
from steer_plugin.evaluation.intervals import bootstrap_interval
from steer_plugin.evaluation.judges import Judged, Verdict, verdicts
from steer_plugin.pocket import World, export
from steer_plugin.training.config import fit_config


class Short:
    """A judge of lengths: the share of a hundred letters that an answer has."""

    batch_size = 16

    def __init__(self, name: str) -> None:
        self.name = name

    def settings(self) -> dict[str, str]:
        return {}

    def judge(self, items: list[Judged]) -> list[Verdict]:
        return [Verdict(item.id, min(len(item.answer), 100) / 100, item.answer, "") for item in items]


@pytest.fixture(scope="module")
def vlm() -> AttachedModel:
    model, processor = sp.pocket.load()
    return sp.attach(model, processor)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("world")
    export(World(0), place, pictures=10)
    return place


def opened(name: str, folder: Path) -> Benchmark:
    if name == "chair":
        pytest.importorskip("inflect", reason="inflect is not installed")
    if name == "mmsafety":
        judges = {"unsafe": Short("length"), "quality": Short("other")}
        return open_benchmark(name, folder / name, judges=judges, whole=False, validation=0.25)
    if name == "vnia":
        return open_benchmark(name, folder / name, judges={"stance": Short("length")})
    return open_benchmark(name, folder / name)


@pytest.mark.parametrize("name", ["pope", "chair", "mmsafety", "vnia"])
def test_from_the_folder_to_intervals(name: str, folder: Path, vlm: AttachedModel) -> None:
    benchmark = opened(name, folder)
    assert benchmark.name == name and benchmark.max_new_tokens > 0
    assert all(isinstance(item, Asked) for item in benchmark.items)
    assert len(benchmark.items) == len(benchmark.groups)
    texts = answers(vlm, benchmark.items, Method("none"), max_new_tokens=8, progress=False)
    assert set(texts) == {item.key for item in benchmark.items}
    said = {judge.name: verdicts(judge, benchmark.judged(judge, texts), progress=False) for judge in benchmark.judges}
    values = benchmark.values(texts, said)
    assert set(values) == {metric.name for metric in benchmark.metrics}
    for metric in benchmark.metrics:
        rows = values[metric.name]
        asked = asked_rows(rows)
        assert asked.any(), metric.name
        groups = [group for group, use in zip(benchmark.groups, asked, strict=True) if use]
        if len(set(groups)) > 1:
            found = bootstrap_interval(rows[asked], groups, metric.statistic, seed=0, resamples=50)
            assert found.low <= found.value <= found.high
        assert np.isfinite(metric.statistic(rows[asked], np.ones((1, int(asked.sum()))))).all()
    assert benchmark.metric(benchmark.headline).name == benchmark.headline


@pytest.mark.parametrize(("name", "target", "context"), [("pope", "average_forced", "last_prompt"),
                                                         ("mmsafety", "last", "user_end")])  # fmt: skip
def test_vectors_are_extracted_from_what_training_says(
    name: str, target: str, context: str, folder: Path, vlm: AttachedModel
) -> None:
    training = opened(name, folder).training
    assert training is not None and (training.target, training.context) == (target, context)
    assert parse_target(training.target) and fit_config(training.preset).hidden
    where = sp.resid_post(1)
    shifts = vlm.extract(list(training.pairs), write=where, read=where, target=target, context=context, progress=False)
    assert len(shifts.ids) == len(training.pairs) and shifts.counts().keys() <= set(training.told.values())
    if training.equalise:
        assert set(shifts.counts()) >= {name for group in training.equalise for name in group}
        shifts.equalised(training.equalise)
    oracle = vlm.extract(list(training.oracle), write=where, read=where, target=target, context=context, progress=False)
    # Every answer is asked for under an id that the oracle knows: P2S refuses others.
    items = opened(name, folder).items
    steered = answers(
        vlm,
        items,
        Method("p2s", lambda ids: sp.P2S.rows(oracle, ids)),
        max_new_tokens=2,
        progress=False,
    )
    assert set(oracle.ids) <= {item.id for item in items}
    assert len(set(oracle.ids)) == len(oracle.ids) == len(steered)
