"""Stances: captions in the spirit of a target prompt and against its converse, by SteerVLM and by what others do.

    target    share of captions that close with the target's topic and attitude
    converse  share that close with the converse's
    attitude  share with the target's attitude, whatever they are about
    recall    true nouns named / true nouns;  kept = recall less that of the unsteered captions

Groups: pairs as in training on new pictures ("trained"), topics that no training pair was about ("held topics", and
"fresh topics", which played no part in the choice of the recipe), wordings that none had ("held wordings"), and both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from steer_plugin.atomic import JSON
from steer_plugin.demo.bench import Bench
from steer_plugin.evaluation.asking import Method
from steer_plugin.evaluation.intervals import Interval, bootstrap_interval, ratio
from steer_plugin.intervention import Steerable, add
from steer_plugin.methods import SteerVLM
from steer_plugin.pocket import HELD_TOPICS, SEEN_TOPICS, StanceCase, World, attitude, mentioned, shown
from steer_plugin.pocket.language import DESCRIBE
from steer_plugin.pocket.stances import stanced
from steer_plugin.sites import resid_post

# Held out of the packaged module's training too; first scored when all of its recipe but the reduction was settled.
FRESH_TOPICS: tuple[str, ...] = ("fog", "garden", "music", "sport", "dust", "mountain")
TRAINED_TOPICS: tuple[str, ...] = tuple(topic for topic in SEEN_TOPICS if topic not in FRESH_TOPICS)
GROUPS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "trained": (TRAINED_TOPICS, "train"),
    "held topics": (HELD_TOPICS, "train"),
    "fresh topics": (FRESH_TOPICS, "train"),
    "held wordings": (TRAINED_TOPICS, "test"),
    "both held": (HELD_TOPICS, "test"),
}
METRICS = ("target", "converse", "attitude", "recall")
METHODS = ("none", "prompt", "actadd", "caa", "steervlm", "steervlm 1.5", "swapped", "equal")
TOKENS = 40
Counts: TypeAlias = Float[np.ndarray, "row 2"]  # numerator and denominator of each caption


@dataclass(frozen=True)
class StanceItem:
    """A picture to describe, with the pair that its caption shall follow; `worded` asks for it in words."""

    case: StanceCase
    group: str
    worded: bool = False

    @property
    def id(self) -> str:
        """The case's name, with its group: a picture occurs once in each."""
        return f"{self.group}/{self.case.id}"

    @property
    def text(self) -> str:
        """The task, behind the target's prompt for the prompting baseline."""
        return stanced(self.case.pair.target) if self.worded else DESCRIBE

    @property
    def key(self) -> str:
        """Identity of what is asked."""
        return f"{self.id}, worded" if self.worded else self.id

    def load_images(self) -> Sequence[Image.Image]:
        """Return the picture."""
        return [self.case.image]


def stance_items(
    world: World, pictures: int, split: str = "test", groups: Sequence[str] = tuple(GROUPS)
) -> list[StanceItem]:
    """Draw the cases of each group."""
    return [
        StanceItem(case, group)
        for group in groups
        for case in world.stances(pictures, split, topics=GROUPS[group][0], wordings=GROUPS[group][1])
    ]


@dataclass(frozen=True)
class Choice:
    """Where and how strongly a vector method writes, and all that was tried."""

    layer: int = 0
    alpha: float = 1.0
    tried: list[JSON] = field(default_factory=list[JSON])


class StanceMethods:
    """Every method on the same pairs.

    ActAdd: h(p+) - h(p-) at the last token of the bare prompts. CAA: mean over training pictures and answer tokens of
    h(task, closing of p+) - h(task, closing of p-); so it is told the words that SteerVLM has to find. Both are added
    on the positions that SteerVLM steers.
    """

    def __init__(self, bench: Bench, steervlm: SteerVLM, pictures: int = 8) -> None:
        self.bench, self.steervlm, self.pictures = bench, steervlm, pictures
        self._closings: dict[str, str] = {}
        self._known: dict[tuple[str, str, str], Float[Tensor, "layer d_model"]] = {}

    def method(self, name: str, items: Sequence[StanceItem], layer: int = 0, alpha: float = 1.0) -> Method:
        """Return a method by its name in `METHODS`, or "steervlm ALPHA"."""
        pairs = {item.id: (item.case.pair.target.text, item.case.pair.converse.text) for item in items}
        stances = [stance for item in items for stance in (item.case.pair.target, item.case.pair.converse)]
        self._closings |= {stance.text: stance.closing for stance in stances}
        if name.startswith("steervlm"):
            strength = float(name.removeprefix("steervlm") or 1.0)
            return Method(name, lambda ids: self._steered([pairs[i] for i in ids], strength), note={"alpha": strength})
        if name == "swapped":
            return Method(name, lambda ids: self._steered([pairs[i][::-1] for i in ids], 1.0))
        if name == "equal":
            return Method(name, lambda ids: self._steered([(pairs[i][0],) * 2 for i in ids], 1.0))
        if name in ("caa", "actadd"):
            return Method(
                name, lambda ids: self._added(name, [pairs[i] for i in ids], layer, alpha),
                note={"layer": layer, "alpha": alpha, "pictures": self.pictures},
            )  # fmt: skip
        return Method(name, lambda ids: None)

    def _steered(self, pairs: Sequence[tuple[str, ...]], alpha: float) -> Steerable:
        bound = self.steervlm.pair([pair[0] for pair in pairs], [pair[1] for pair in pairs])
        return bound.with_alpha(alpha)

    def _added(self, name: str, pairs: Sequence[tuple[str, str]], layer: int, alpha: float) -> Steerable:
        for pair in dict.fromkeys(pairs):
            if (name, *pair) not in self._known:
                found = self._caa(pair) if name == "caa" else self._actadd(pair)
                # A pair and its reverse are opposite: what is known of one serves the other.
                self._known[name, pair[0], pair[1]], self._known[name, pair[1], pair[0]] = found, -found
        vectors = torch.stack([self._known[name, pair[0], pair[1]][layer] for pair in pairs])
        return add(resid_post(layer), vectors, self.steervlm.positions, alpha)

    @cached_property
    def _training(self) -> list[Image.Image]:
        return [case.image for case in self.bench.world.stances(self.pictures, "train")]

    def _caa(self, pair: tuple[str, str]) -> Float[Tensor, "layer d_model"]:
        plus, minus = (self._answered(self._closings[text]) for text in pair)
        return plus - minus

    def _answered(self, closing: str) -> Float[Tensor, "layer d_model"]:
        """Mean over the tokens of a forced answer and over training pictures, at every layer."""
        vlm = self.bench.vlm
        inputs = dict(vlm.inputs([DESCRIBE] * self.pictures, self._training))
        tokenizer = cast("Any", vlm.processor).tokenizer
        answer = torch.tensor([tokenizer(closing, add_special_tokens=False)["input_ids"]] * self.pictures)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], 1)
        sites = [resid_post(layer) for layer in range(vlm.n_layers)]
        cache = vlm.cache(inputs, sites, "completion", completion_tokens=answer.shape[1])
        return torch.stack([cache[site].mean((0, 1)) for site in sites])

    def _actadd(self, pair: tuple[str, str]) -> Float[Tensor, "layer d_model"]:
        plus, minus = (self._last(text) for text in pair)
        return plus - minus

    def _last(self, prompt: str) -> Float[Tensor, "layer d_model"]:
        """The last token of a bare prompt, at every layer."""
        vlm = self.bench.vlm
        sites = [resid_post(layer) for layer in range(vlm.n_layers)]
        cache = vlm.cache(vlm.inputs([prompt]), sites, "user_end")
        return torch.stack([cache[site][0, 0] for site in sites])


def counted(items: Sequence[StanceItem], texts: Mapping[str, str]) -> dict[str, dict[str, Counts]]:
    """For each group and metric a numerator and a denominator per caption."""
    rows: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for item in items:
        said, pair, true = texts[item.key], item.case.pair, set(nouns_of(item.case))
        here = rows.setdefault(item.group, {metric: [] for metric in METRICS})
        here["target"].append((float(shown(said, pair.target.topic) == pair.target.loved), 1))
        here["converse"].append((float(shown(said, pair.converse.topic) == pair.converse.loved), 1))
        here["attitude"].append((float(attitude(said) == pair.target.loved), 1))
        here["recall"].append((len(set(mentioned(described(said))) & true), len(true)))
    return {
        group: {metric: np.array(values, dtype=np.float64) for metric, values in found.items()}
        for group, found in rows.items()
    }


def described(said: str) -> str:
    """Cut the closing off a caption: "the dog is nice" names a dog that nobody saw."""
    sentences = [part for part in said.split(".") if attitude(part) is None]
    return ".".join(sentences)


def nouns_of(case: StanceCase) -> list[str]:
    """Return what the true caption names."""
    return mentioned(described(case.answer))


def scored(rows: Mapping[str, Mapping[str, Counts]], seed: int) -> dict[str, dict[str, Interval]]:
    """Shares with bootstrap intervals over pictures."""
    return {
        group: {metric: bootstrap_interval(values, statistic=ratio, seed=seed) for metric, values in found.items()}
        for group, found in rows.items()
    }


def choose(methods: StanceMethods, name: str, pictures: int, alphas: Sequence[float]) -> Choice:
    """Choose layer and strength of a vector method on validation pictures, wordings as trained.

    Most captions in the target stance, then in its attitude, among choices that keep the recall within five points.
    """
    items = stance_items(methods.bench.world, pictures, "validation", ("trained",))
    plain = _means(items, methods.bench.try_out(items, methods.method("none", items), TOKENS))
    tried: dict[tuple[int, float], dict[str, float]] = {}
    for layer in range(methods.bench.vlm.n_layers):
        for alpha in alphas:
            texts = methods.bench.try_out(items, methods.method(name, items, layer, alpha), TOKENS)
            tried[layer, alpha] = _means(items, texts)
    kept = {at: found for at, found in tried.items() if found["recall"] >= plain["recall"] - 0.05} or tried
    layer, alpha = max(kept, key=lambda at: (kept[at]["target"] - kept[at]["converse"], kept[at]["attitude"]))
    return Choice(layer, alpha, [{"layer": at[0], "alpha": at[1], **found} for at, found in tried.items()])


def _means(items: Sequence[StanceItem], texts: Mapping[str, str]) -> dict[str, float]:
    (rows,) = counted(items, texts).values()
    return {metric: float(values[:, 0].sum() / values[:, 1].sum()) for metric, values in rows.items()}
