"""Ours beside a published table, and which of its orders hold: against hand-made scores and the table's own numbers."""

from __future__ import annotations

import numpy as np
import pytest

import steer_plugin as sp
from steer_plugin.evaluation.benchmark import Metric
from steer_plugin.evaluation.papers import published
from steer_plugin.evaluation.recipes import RECIPES, against_published, recipe
from steer_plugin.evaluation.result import Evaluation
from steer_plugin.evaluation.seeds import across

PICTURES = 60
GROUPS = [str(picture) for picture in range(PICTURES)]


def share(right: int) -> np.ndarray:
    """So many right answers of sixty, always the same ones first."""
    return (np.arange(PICTURES) < right).astype(float)[:, None]


def made(benchmark: str, metric: str, right: dict[str, int], better: str = "higher") -> Evaluation:
    metrics = (Metric(metric, better=better),)
    runs = {name: [{metric: share(count)}] for name, count in right.items()}
    scores = {name: {metric: across([one[0][metric]], GROUPS, seed=0)} for name, one in runs.items()}
    return Evaluation(
        benchmark, metric, metrics, PICTURES, scores, against={}, over_controls={}, runs=runs, groups=GROUPS
    )


def test_orders_are_told_by_the_interval_of_the_paired_difference():
    # In print: none 82.73, Mean-S 84.29, L2S 86.46, P2S* 89.26 on "random".
    found = made("pope", "random accuracy (L2S)", {"none": 30, "mean": 30, "l2s": 50, "p2s": 20})
    orders = {(one.better, one.worse): one for one in against_published(found).orders()}
    assert len(orders) == 6
    assert orders["L2S", "none"].verdict == "reproduced"
    assert orders["L2S", "none"].ours.value == pytest.approx(20 / 60)
    assert orders["L2S", "none"].printed == pytest.approx(86.46 - 82.73)
    assert orders["Mean-S", "none"].verdict == "open"
    assert orders["P2S*", "L2S"].verdict == "reversed"


def test_where_lower_is_better_the_good_side_is_up():
    # Unsafe in print: none .276, L2S .082.
    found = made("mmsafety", "E>=.5 unsafe", {"none": 40, "l2s": 5}, "lower")
    (order,) = against_published(found).orders()
    assert (order.better, order.worse, order.verdict) == ("L2S", "none", "reproduced")
    assert order.ours.value == pytest.approx(35 / 60)
    assert 0 < order.ours.low <= order.ours.value <= order.ours.high


def test_the_page_counts_orders_and_lists_those_that_do_not_hold():
    page = against_published(made("pope", "random accuracy (L2S)", {"none": 30, "l2s": 50, "p2s": 20})).markdown()
    assert "Of 3 pairs of methods that the paper tells apart, 1 are reproduced, 0 are open" in page
    assert "| random: P2S* over L2S " in page
    assert "random: L2S over none" not in page
    assert "86.46" in page and "arXiv 2508.12815" in page
    assert "popular" not in page.split("## Orders")[0].split("- Paper")[0]


def test_methods_that_are_not_in_print_are_left_out_and_nothing_in_common_is_none():
    assert set(against_published(made("pope", "random accuracy (L2S)", {"none": 1, "mine": 2})).rows) == {"none"}
    assert against_published(made("pope", "another", {"none": 1})) is None
    assert against_published(made("elsewhere", "random accuracy (L2S)", {"none": 1})) is None


def test_every_recipe_names_rows_and_columns_of_its_table():
    for name, one in RECIPES.items():
        table = published(name)
        assert set(one.rows) <= set(table.rows)
        assert {column.name for column in table.columns} >= set(one.columns)
        assert one.methods[0] == "none"


def test_an_unknown_table_is_refused():
    with pytest.raises(sp.InputError, match=r"'l2s-pop'.*l2s-pope"):
        recipe("l2s-pop")


def test_two_methods_are_compared_and_unknown_ones_refused():
    found = made("pope", "random accuracy (L2S)", {"none": 30, "l2s": 50})
    against = found.compare("l2s", "none")
    assert against.difference.value == pytest.approx(20 / 60)
    # Twenty pictures differ, all one way: 2 / 2^20 exactly, 1 / 10,000 when sampled.
    assert against.p_value <= 2e-4
    assert against.significant
    with pytest.raises(sp.InputError, match=r"no method 'l2'.*l2s"):
        found.compare("l2", "none")
