"""Steerability: propensities against plain hooks on a second model, figures against scipy, logs that resume."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from _steerings import attached, steerings
from _tiny import D_MODEL, draw, plain_hooks, tiny_llava, tiny_processor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import steer_plugin as sp
from steer_plugin.contrast import ContrastivePair
from steer_plugin.errors import FrameworkError, InputError, JobError
from steer_plugin.evaluation.intervals import Interval
from steer_plugin.evaluation.steerability import Steerability, steerability

ALPHAS = (-1.0, 0.0, 2.0)
VECTOR = draw(D_MODEL, scale=3)
PROMPTS = ("w20 w21", "w30 w31 w32 w33", "w40", "w41 w42 w43", "w50 w51")


def picture(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pairs_of(positive: str = "w10", negative: str = "w11", suffix: str = "") -> list[ContrastivePair]:
    return [
        ContrastivePair(
            f"p{n}", (picture(n // 2),), prompt, positive, negative, suffix, "even" if n % 2 == 0 else "odd"
        )
        for n, prompt in enumerate(PROMPTS)
    ]


def torch_vlm() -> Any:
    return attached("torch", tiny_llava())


def by_hand(pair: ContrastivePair, text: str, opening: str, alpha: float) -> float:
    """log p of an opening behind a prompt: a second model, one row, no padding, plain hooks."""
    hf, processor = tiny_llava(), tiny_processor()
    rendered = f"USER: <image>\n{text} ASSISTANT:"
    one = processor(images=[list(pair.load_images())], text=[rendered], return_tensors="pt")
    tokens = processor.tokenizer(opening, add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = torch.cat([one["input_ids"], tokens], 1)
    width = tokens.shape[1]

    def add(hidden: Tensor) -> Tensor:
        out = hidden.clone()
        out[:, -width - 1 :] += alpha * VECTOR  # the last prompt token, and the opening
        return out

    with torch.no_grad(), plain_hooks(hf, ("resid_post", 1, add)):
        logits = hf(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=one["pixel_values"]).logits
    log_p = logits[0, -width - 1 : -1].double().log_softmax(-1)
    return float(log_p.gather(1, tokens[0][:, None]).sum())


@pytest.mark.parametrize("openings", [("w10", "w11"), ("w10 w12 w13", "w11"), ("w10 w12", "w11 w14 w15")])
@pytest.mark.parametrize("suffix", [False, True])
def test_propensities_are_those_of_plain_hooks(openings: tuple[str, str], suffix: bool) -> None:
    pairs = pairs_of(*openings, suffix="w60 w61")
    steering = sp.MeanSteering(VECTOR * 2, "resid_post.1", alpha=0.5)
    found = steerability(torch_vlm(), steering, pairs, ALPHAS, suffix=suffix, batch_size=3, progress=False)
    assert found.propensity.shape == (5, 3) and found.ids == tuple(pair.id for pair in pairs)
    for row, pair in enumerate(pairs[:2]):
        text = pair.user_text if suffix else pair.prompt
        for column, alpha in enumerate(ALPHAS):
            expected = by_hand(pair, text, openings[0], alpha) - by_hand(pair, text, openings[1], alpha)
            assert found.propensity[row, column] == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", ["l2s", "late", "steervlm", "everywhere"])
def test_it_is_what_decoding_would_do(name: str) -> None:
    """The first answer token's logits of a steered generation give the same propensity."""
    vlm, pairs, steering = torch_vlm(), pairs_of()[:3], steerings()[name]
    found = steerability(vlm, steering, pairs, (-0.5, 1.0), progress=False)
    inputs = vlm.inputs([pair.prompt for pair in pairs], [list(pair.images) for pair in pairs])
    first, second = (
        tiny_processor().tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("w10", "w11")
    )
    for column, alpha in enumerate((-0.5, 1.0)):
        with vlm.steering(steering * alpha) as steered:
            said = steered.generate(
                **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        expected = (said.logits[0][:, first] - said.logits[0][:, second]).tolist()
        assert found.propensity[:, column] == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_a_steering_for_each_batch_by_ids() -> None:
    vlm, pairs, rows = torch_vlm(), pairs_of(), draw(5, D_MODEL, scale=3)
    asked: list[list[str]] = []

    def by_ids(ids: Any) -> sp.Steerable:
        asked.append(list(ids))
        return sp.MeanSteering(torch.stack([rows[int(one[1:])] for one in ids]), "resid_post.1")

    found = steerability(vlm, by_ids, pairs, ALPHAS, batch_size=2, progress=False)
    assert [ids for ids in asked if ids != ["p0", "p1"]] == [["p2", "p3"], ["p4"]]
    for row, pair in enumerate(pairs):
        alone = steerability(vlm, sp.MeanSteering(rows[row], "resid_post.1"), [pair], ALPHAS, progress=False)
        assert found.propensity[row] == pytest.approx(alone.propensity[0], rel=1e-3, abs=1e-3)
    # Pairs 0 and 1 show one picture.
    assert found.groups[0] == found.groups[1] and len(set(found.groups)) == 3


# -- figures ---------------------------------------------------------------------------------------------------------


def made(inputs: int = 60, seed: int = 0) -> Steerability:
    """Noisy lines, some of them falling, three inputs to a picture."""
    random, alphas = np.random.default_rng(seed), np.array([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5])
    slopes = np.repeat(random.normal(1, 1, inputs // 3), 3) + random.normal(0, 0.3, inputs)
    noise = random.normal(0, 0.5, (inputs, len(alphas)))
    return Steerability(
        tuple(f"i{n}" for n in range(inputs)), tuple(f"g{n // 3}" for n in range(inputs)),
        tuple("ab"[n % 2] for n in range(inputs)), alphas, slopes[:, None] * alphas + noise + 2.0, seed=seed,
    )  # fmt: skip


def test_figures_of_each_input_are_scipys() -> None:
    found = made()
    for row, curve in enumerate(found.propensity):
        line = scipy.stats.linregress(found.alphas, curve)
        assert found.slopes[row] == pytest.approx(line.slope)
        assert found.r2[row] == pytest.approx(line.rvalue**2)
        assert found.ranks[row] == pytest.approx(scipy.stats.spearmanr(found.alphas, curve).statistic)


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=5, max_size=5), min_size=2, max_size=6))
def test_ties(rows: list[list[int]]) -> None:
    alphas = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    names = tuple(map(str, range(len(rows))))
    found = Steerability(names, names, names, alphas, np.array(rows, dtype=float))
    for row, curve in enumerate(rows):
        flat = len(set(curve)) == 1
        expected = 0.0 if flat else scipy.stats.spearmanr(alphas, curve).statistic
        assert found.ranks[row] == pytest.approx(expected)
        assert found.r2[row] == pytest.approx(0.0 if flat else scipy.stats.pearsonr(alphas, curve).statistic ** 2)


def test_summary() -> None:
    found = made()
    summary = found.summary()
    assert summary.slope.value == pytest.approx(found.slopes.mean())
    mean = found.propensity.mean(0)
    assert summary.slope.value == pytest.approx(np.polyfit(found.alphas, mean, 1)[0])
    assert summary.anti.value == pytest.approx((found.slopes < 0).mean()) and 0 < summary.anti.value < 1
    assert summary.rank_of_mean.value == pytest.approx(scipy.stats.spearmanr(found.alphas, mean).statistic)
    for name, one in vars(summary).items():
        assert isinstance(one, Interval) and one.low <= one.value <= one.high, name
    # Pictures are resampled: the interval is that of twenty means, not of sixty.
    by_picture = found.slopes.reshape(20, 3).mean(1)
    assert summary.slope.high - summary.slope.low == pytest.approx(3.92 * by_picture.std() / 20**0.5, rel=0.1)
    assert [one.value for one in found.curve()] == pytest.approx(mean)
    half = found.select(["a"])
    assert half.ids == found.ids[::2] and half.slopes == pytest.approx(found.slopes[::2])
    with pytest.raises(InputError, match=r"\['c'\]; there are \['a', 'b'\]"):
        found.select(["c"])


def test_agreement_of_two_conditions() -> None:
    one, noise = made(), np.random.default_rng(4).normal(0, 0.8, 60)
    # Rounded, so that slopes tie.
    rounded = replace(one, propensity=np.round(one.slopes * 2)[:, None] / 2 * one.alphas)
    other = replace(rounded, propensity=(np.round((one.slopes + noise) * 2) / 2 - 0.5)[:, None] * one.alphas)
    found = rounded.agreement(other, resamples=4000)
    first, second = rounded.slopes, other.slopes
    assert found.pearson.value == pytest.approx(scipy.stats.pearsonr(first, second).statistic)
    assert found.spearman.value == pytest.approx(scipy.stats.spearmanr(first.round(6), second.round(6)).statistic)
    assert found.difference.value == pytest.approx((second - first).mean())
    # The interval of the rank correlation, by drawing pictures as lists.
    random, drawn = np.random.default_rng(9), list[float]()
    for _ in range(800):
        rows = (3 * random.integers(0, 20, 20)[:, None] + np.arange(3)).ravel()
        drawn.append(float(scipy.stats.spearmanr(first[rows].round(6), second[rows].round(6)).statistic))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (found.spearman.low, found.spearman.high) == pytest.approx((low, high), abs=0.1 * (high - low))
    with pytest.raises(InputError, match="first difference: 'i0'"):
        rounded.agreement(rounded.select(["b"]))
    assert rounded.agreement(rounded).spearman.low == pytest.approx(1.0)


def test_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    found = made(6)
    frame = found.to_frame()
    assert list(frame.columns) == ["id", "picture", "behaviour", "alpha", "propensity", "slope", "rank", "r2"]
    wide = frame.pivot(index="id", columns="alpha", values="propensity")
    assert wide.to_numpy() == pytest.approx(found.propensity)
    assert frame.drop_duplicates("id")["slope"].to_numpy() == pytest.approx(found.slopes)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(FrameworkError, match=r"pandas.*steer-plugin\[analysis\]"):
        found.to_frame()


def test_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    found = made()
    figure = found.plot("L2S")
    curves, slopes = figure.axes
    mean = next(line for line in curves.lines if line.get_marker() == "o")
    assert np.asarray(mean.get_ydata()) == pytest.approx(found.propensity.mean(0))
    bars: Any = slopes.patches
    anti = sum(bar.get_height() for bar in bars if bar.get_hatch())
    assert anti == (found.slopes < 0).sum() and sum(bar.get_height() for bar in bars) == 60
    assert all(bar.get_x() + bar.get_width() <= 1e-9 for bar in bars if bar.get_hatch() and bar.get_height())
    labels = [text.get_text() for text in slopes.get_legend().get_texts()]
    assert f"anti-steerable: {100 * (found.slopes < 0).mean():.0f} %" in labels
    still = replace(found, propensity=np.zeros_like(found.propensity)).plot()
    assert len(still.axes) == 2
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FrameworkError, match="matplotlib"):
        found.plot()


# -- logs and refusals -----------------------------------------------------------------------------------------------


def test_a_run_that_was_cut_off_resumes(tmp_path: Path) -> None:
    vlm, pairs, steering = torch_vlm(), pairs_of(), sp.MeanSteering(VECTOR, "resid_post.1")

    def run(given: sp.Steerable = steering, one: Any = pairs, alphas: Any = ALPHAS) -> Steerability:
        return steerability(vlm, given, one, alphas, batch_size=2, progress=False, out=tmp_path)

    whole, log = run(), tmp_path / "propensity.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 5 * 3 and json.loads(lines[1]).keys() == {"id", "alpha", "m"}
    # Killed within the second batch, in the middle of a line.
    log.write_bytes(b"".join(lines[:10]) + lines[10][:9])
    again = run()
    assert np.array_equal(again.propensity, whole.propensity)
    assert sorted(log.read_bytes().splitlines(keepends=True)) == sorted(lines)
    # Further strengths join what is there.
    more = run(alphas=(*ALPHAS, 3.0))
    assert np.array_equal(more.propensity[:, :3], whole.propensity)
    assert len(log.read_bytes().splitlines()) == 1 + 5 * 4
    for call, message in (
        (lambda: run(sp.MeanSteering(VECTOR * 1.5, "resid_post.1")), "propensities of another steering: 'p0' had"),
        (lambda: run(sp.MeanSteering(VECTOR, "resid_post.2")), "another job: writes"),
        (lambda: run(one=pairs_of("w13")), "another job: pairs_sha256"),
    ):
        with pytest.raises(JobError, match=message):
            call()


def test_bad_input() -> None:
    vlm, pairs, steering = torch_vlm(), pairs_of(), sp.MeanSteering(VECTOR, "resid_post.1")
    bare = sp.attach(tiny_llava())

    def run(**other: Any) -> Steerability:
        given: dict[str, Any] = {"vlm": vlm, "steering": steering, "pairs": pairs, "alphas": ALPHAS}
        return steerability(**{**given, "progress": False, **other})

    for call, message in (
        (lambda: run(vlm=bare), "needs the model's processor"),
        (lambda: run(pairs=[]), "got 0 pairs"),
        (lambda: run(pairs=[*pairs, pairs[0]]), "'p0' more than once"),
        (lambda: run(alphas=(1.0,)), r"alphas are \[1.0\]"),
        (lambda: run(alphas=(0.0, 1.0, 1.0)), "each once"),
        (lambda: run(alphas=(0.0, float("nan"))), "finite"),
        (lambda: run(batch_size=0), "batch_size is 0"),
        (lambda: run(steering=sp.patch("resid_post.1", VECTOR, "last_prompt")), "cannot be scaled"),
        (lambda: run(steering=sp.add("resid_post.1", VECTOR, alpha=lambda step: 1.0)), "changes from step to step"),
        (lambda: run(pairs=pairs[:2]).summary(), "at least two pictures"),
    ):
        with pytest.raises(InputError, match=message):
            call()
