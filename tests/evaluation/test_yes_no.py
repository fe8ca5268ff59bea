"""POPE's measures as its benchmark gives them: published rows, by hand, against scikit-learn; two F1 are told apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from _figures import question
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from steer_plugin.evaluation.benchmarks import PopeBenchmark

MEASURES = ("accuracy", "precision", "recall", "F1", "yes-ratio")


def asking(labels: Sequence[bool]) -> PopeBenchmark:
    """A question for each label, on a picture of its own."""
    return PopeBenchmark([question("random", f"p{k}", "dog", label) for k, label in enumerate(labels)])


def measured(benchmark: PopeBenchmark, said: Sequence[bool], *names: str) -> list[float]:
    """Figures of the benchmark's only subset, which are those over all of them."""
    texts = {item.key: "Yes" if one else "No" for item, one in zip(benchmark.items, said, strict=True)}
    rows, ones = benchmark.values(texts, {}), np.ones((1, len(said)))

    def figures(part: str) -> list[float]:
        found = [f"{part} {name}" for name in names or MEASURES]
        return [float(benchmark.metric(name).statistic(rows[name], ones)[0]) for name in found]

    assert figures("mean") == figures("random")
    return figures("random")


def answers(hits: int, false_alarms: int, n: int = 3000) -> tuple[list[bool], list[bool]]:
    """Predictions and labels for balanced questions with so many true and false yeses."""
    labels = [True] * (n // 2) + [False] * (n // 2)
    said = [k < hits for k in range(n // 2)] + [k < false_alarms for k in range(n // 2)]
    return said, labels


@pytest.fixture(scope="module")
def balanced() -> PopeBenchmark:
    return asking(answers(0, 0)[1])


@pytest.fixture(scope="module")
def affirmed() -> PopeBenchmark:
    return asking([True] * 10000)


@pytest.mark.parametrize(
    ("hits", "false_alarms", "published"),
    [
        # POPE (arXiv 2305.10355), COCO random: accuracy, precision, recall, F1, yes ratio, in per cent.
        (1487, 1476, [50.37, 50.19, 99.13, 66.64, 98.77]),  # LLaVA
        (1427, 270, [88.57, 84.09, 95.13, 89.27, 56.57]),  # InstructBLIP
        (1233, 343, [79.67, 78.24, 82.20, 80.17, 52.53]),  # MiniGPT-4
    ],
)
def test_published_rows(balanced: PopeBenchmark, hits: int, false_alarms: int, published: list[float]) -> None:
    assert len(balanced.items) == 3000
    found = measured(balanced, answers(hits, false_alarms)[0])
    assert [round(100 * value, 2) for value in found] == published


def test_by_hand() -> None:
    said, labels = [True, True, True, False, False], [True, True, False, True, False]
    assert measured(asking(labels), said) == pytest.approx([3 / 5, 2 / 3, 2 / 3, 2 / 3, 3 / 5])


def test_yes_ratio_is_that_of_the_predictions() -> None:
    assert measured(asking([True, True, False, False]), [False] * 4) == [0.5, 0.0, 0.0, 0.0, 0.0]
    assert measured(asking([False] * 4), [True] * 4) == [0.0, 0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("accuracy", [82.73, 84.91, 86.46, 89.26, 76.82, 0.0, 100.0])
def test_f1_of_l2s(affirmed: PopeBenchmark, accuracy: float) -> None:
    """With every label taken as True, precision is 1 and recall the accuracy."""
    right = round(accuracy * 100)
    a, f1, a_l2s, f1_l2s = measured(
        affirmed, [k < right for k in range(10000)], "accuracy", "F1", "accuracy (L2S)", "F1 (L2S)"
    )
    assert a_l2s == a == pytest.approx(accuracy / 100)
    assert f1_l2s == pytest.approx(f1, abs=1e-12)
    assert f1_l2s == pytest.approx(2 * a / (1 + a))


def test_f1_of_l2s_hides_the_bias(balanced: PopeBenchmark) -> None:
    """A model that says no to everything: POPE's F1 is 0, the derived one two thirds."""
    assert measured(balanced, [False] * 3000, "F1", "F1 (L2S)") == [0, pytest.approx(2 / 3)]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=25))
def test_measures_are_scikit_learns_and_hang_together(pairs: list[tuple[bool, bool]]) -> None:
    said, labels = [a for a, _ in pairs], [b for _, b in pairs]
    accuracy, precision, recall, f1, yes_ratio = measured(asking(labels), said)
    theirs = precision_recall_fscore_support(labels, said, average="binary", zero_division=0)
    assert (precision, recall, f1) == pytest.approx(theirs[:3])
    assert accuracy == pytest.approx(accuracy_score(labels, said))
    flipped = measured(asking([not b for b in labels]), [not a for a in said], "accuracy", "yes-ratio")
    assert (accuracy, 1 - yes_ratio) == (pytest.approx(flipped[0]), pytest.approx(flipped[1]))
    assert min(precision, recall) <= f1 + 1e-12 <= max(precision, recall) + 2e-12
    if precision and recall:
        assert f1 == pytest.approx(2 / (1 / precision + 1 / recall))


@pytest.mark.parametrize("subset", ["random", "popular", "adversarial"])
def test_the_published_questions(shared: Path, subset: str) -> None:
    path = shared / "data" / "pope" / f"coco_pope_{subset}.json"
    if not path.is_file():
        pytest.skip(f"the shared material has no {path.name}")
    labels = [json.loads(line)["label"] == "yes" for line in path.read_text().splitlines()]
    benchmark = asking(labels)
    assert len(benchmark.items) == 3000
    assert measured(benchmark, [True] * 3000) == [0.5, 0.5, 1.0, pytest.approx(2 / 3), 1.0]
