"""Who may take part: every refusal names what is wrong and what to do, before anything is asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from _colours import Colours
from _steerings import PAIR, drawn_module
from _tiny import D_MODEL, draw

import steer_plugin as sp
from steer_plugin.errors import InputError, SteeringError
from steer_plugin.evaluation.asking import Method
from steer_plugin.evaluation.benchmark import Training
from steer_plugin.evaluation.lineup import METHODS, Entry, Lineup

MEAN = sp.MeanSteering(draw(D_MODEL), "resid_post.1")
MODULE = sp.SteerVLM(drawn_module())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("none", "l2")}, r"unknown method 'l2'\. Did you mean 'l2s'\?.*Known: none, prompt"),
        ({"methods": ("mean",), "steerings": {"mean": MEAN}}, "a saved steering is called 'mean', as is a method"),
        ({"steerings": {"none": MEAN}}, "called 'none'.*rename it"),
        ({"steerings": {"": MEAN}}, "has no name: expected {name: steering}"),
        ({"seeds": ()}, r"seeds are \(\): expected at least one"),
        ({"seeds": (1, 1)}, r"seeds are \(1, 1\): expected at least one, each once"),
        ({"methods": ("l2s",), "alphas": {"l2": 1.0}}, r"for 'l2', which is not fitted here \(l2s\)\. Did you mean"),
        ({"methods": ("none",), "alphas": {"l2s": 1.0}}, r"for 'l2s', which is not fitted here \(nothing is\)"),
        ({"alpha": float("nan")}, "alpha must be a finite number, got nan"),
        ({"alphas": {"l2s": float("inf")}}, "alpha must be a finite number, got inf"),
        ({"positions": "lastprompt"}, "last_prompt"),
        ({"write": "resid_pots.1"}, "resid_pots"),
        ({"read": "resid_post.x"}, r"resid_post\.x"),
    ],
)
def test_impossible_choices_are_refused_when_they_are_made(changes: dict[str, Any], message: str):
    with pytest.raises(SteeringError, match=message):
        Lineup(**changes)


def test_a_saved_steering_may_be_called_as_a_method_that_does_not_take_part():
    assert set(Lineup(("none",), {"l2s": MEAN, "mean": MEAN}).steerings) == {"l2s", "mean"}
    assert Lineup(("steervlm",), {"steervlm": MODULE}, pair=PAIR).methods == ("steervlm",)


def trained(**changes: Any) -> Colours:
    made = Colours()
    assert isinstance(made.training, Training)
    made.training = replace(made.training, **changes)
    return made


def plain(**changes: Any) -> Colours:
    made = Colours(training=False)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


SITE = {"write": "resid_post.1"}


@pytest.mark.parametrize(
    ("changes", "benchmark", "message"),
    [
        ({"methods": ("mean", "l2s"), **SITE}, plain(), "mean, l2s on colours need contrastive pairs to fit on; give"),
        ({"methods": ("mean",)}, trained(), "need a site to write at"),
        ({"methods": ("p2s",), **SITE}, trained(oracle=()), "p2s needs the contrastive pair of every test item; '0"),
        (
            {"methods": ("norm_rnd",), **SITE}, trained(oracle=[one.pair for one in Colours().asks[:-1]]),
            "norm_rnd needs the contrastive pair of every test item; '5-21' has none",
        ),
        ({"methods": ("mean_ba",), **SITE}, trained(told={}), "mean_ba needs the behaviour of every item.*'0-20'"),
        (
            {"methods": ("mean_ba",), **SITE}, trained(told={one.id: "red" for one in Colours().asks[1:]}),
            "colours tells none of '0-20'",
        ),
        ({"methods": ("prompt",)}, plain(prompt=""), "colours has no instruction for the prompt baseline; give prompt"),
        ({"methods": ("steervlm",)}, plain(), "steervlm comes trained: give a saved SteerVLM"),
        ({"methods": ("none",), "steerings": {"mine": MODULE}}, plain(), "mine needs a prompt pair on colours: give"),
        (
            {"methods": ("none",), "steerings": {"mine": MODULE}}, plain(pairs={"0-20": PAIR}),
            "mine needs the prompt pair of every item; '0-21' has none",
        ),
        ({"methods": ("actadd",), **SITE}, plain(), "actadd on colours needs a site.*and a pair of prompts"),
        ({"methods": ("actadd",), "pair": PAIR}, plain(), "actadd on colours needs a site"),
        ({"methods": ("actadd",), **SITE}, plain(pairs={"0-20": PAIR}), "actadd needs the prompt pair of every item"),
    ],
)  # fmt: skip
def test_what_a_benchmark_cannot_host_is_refused(changes: dict[str, Any], benchmark: Colours, message: str):
    with pytest.raises(InputError, match=message):
        Lineup(**changes).check(benchmark)


def test_what_a_benchmark_can_host_passes():
    every = Lineup(METHODS, {"vlm": MODULE}, "resid_post.1", pair=PAIR)
    every.check(Colours())
    Lineup(("none",), {"vlm": MODULE.pair(*PAIR)}).check(plain())
    Lineup(("prompt",), prompt="w1").check(plain(prompt=""))
    Lineup(("prompt",)).check(plain(prompt="", worded={"0-20": "w1"}))


def test_norm_random_is_as_strong_as_the_l2s_that_it_controls_for():
    lineup = Lineup(("mean", "l2s", "p2s", "norm_rnd"), alpha=2.0, alphas={"l2s": 5.0})
    assert [lineup.of(name) for name in ("mean", "l2s", "norm_rnd")] == [2.0, 5.0, 5.0]
    assert replace(lineup, alphas={"l2s": 5.0, "norm_rnd": 1.0}).of("norm_rnd") == 1.0
    assert Lineup(("p2s", "norm_rnd"), alphas={"p2s": 3.0}).of("norm_rnd") == 3.0


@pytest.mark.parametrize(
    ("name", "seeds", "file"),
    [
        ("l2s", (0,), "l2s.jsonl"),
        ("l2s", (0, 3), "l2s-seed3.jsonl"),
        ("vlm, pair swapped", (3,), "vlm-pair-swapped.jsonl"),
        ("a/b, random", (3, 4), "a-b-random-seed3.jsonl"),
    ],
)
def test_files_are_named_by_method_and_seed(name: str, seeds: tuple[int, ...], file: str):
    assert Entry(name, tuple((seed, Method(name)) for seed in seeds)).log(3) == file
