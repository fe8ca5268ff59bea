"""A hand-made benchmark of one-coloured pictures for the tiny model, a judge of lengths, and answers by plain torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from _tiny import adding, greedy, plain_hooks, tiny_llava, tiny_processor
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from steer_plugin.contrast import ContrastivePair
from steer_plugin.evaluation.benchmark import Benchmark, Metric, Texts, Training, Verdicts, column
from steer_plugin.evaluation.intervals import ratio
from steer_plugin.evaluation.judges import Judge, Judged, Verdict

TOKENS = 4
KINDS = ("red", "blue", "still")


def colour(number: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (number * 37 % 256, 250 - number * 23 % 250, number * 71 % 256))


@dataclass(frozen=True)
class Ask:
    """A question on a picture; `watch` is told whenever the picture is opened to be asked about."""

    number: int
    word: int
    watch: Callable[[str], None] | None = None

    @property
    def id(self) -> str:
        return f"{self.number}-{self.word}"

    @property
    def key(self) -> str:
        return f"key {self.id}"

    @property
    def text(self) -> str:
        return f"w{self.word} w{10 + self.number % 7}"

    def load_images(self) -> Sequence[Image.Image]:
        if self.watch is not None:
            self.watch(self.id)
        return [colour(self.number)]

    @property
    def pair(self) -> ContrastivePair:
        return ContrastivePair(
            self.id, (colour(self.number),), self.text, f"w{30 + self.number % 5}", "w40", behaviour=self.kind
        )

    @property
    def kind(self) -> str:
        return KINDS[(self.number + self.word) % 3]


class Lengths:
    """A judge whose score is the number of words; None above `most`, as of a judge whose answer cannot be read."""

    batch_size = 5

    def __init__(self, name: str = "lengths", most: int = 99) -> None:
        self.name, self.most, self.judged = name, most, 0

    def settings(self) -> dict[str, int]:
        return {"most": self.most}

    def judge(self, items: Sequence[Judged]) -> list[Verdict]:
        self.judged += len(items)
        counts = [len(item.answer.split()) for item in items]
        scores = [float(n) if n <= self.most else float("nan") for n in counts]
        return [Verdict(item.id, score, item.answer, "") for item, score in zip(items, scores, strict=True)]


def numbers(text: str) -> list[int]:
    return [int(one) for one in re.findall(r"w(\d+)", text)]


class Colours(Benchmark):
    """Two questions on each picture; how many words of the answers are even."""

    name = "colours"
    headline = "even"
    max_new_tokens = TOKENS
    prompt = "w50 w51"

    def __init__(
        self,
        pictures: Sequence[int] = range(6),
        *,
        training: bool = True,
        judges: Sequence[Judge] = (),
        watch: Callable[[str], None] | None = None,
        validation: Sequence[int] = (),
        learning_rate: float | None = None,
    ) -> None:
        self.asks = [Ask(number, word, watch) for number in pictures for word in (20, 21)]
        self.items = self.asks
        self.groups = [str(ask.number) for ask in self.asks]
        self.judges = judges
        self.metrics = [
            Metric("even"),
            Metric("share", ratio),
            Metric("odd pictures", better="lower", scale=1.0, digits=2),
            *(Metric(judge.name, better="neither", scale=1.0) for judge in judges),
            Metric("never asked"),
        ]
        self.source = {"pictures": list(pictures)}
        if training:
            self.training = Training(
                pairs=[Ask(number, word).pair for number in range(100, 108) for word in (20, 21)],
                oracle=[ask.pair for ask in self.asks],
                validation=Colours(validation, watch=watch) if validation else None,
                preset="mse",
                learning_rate=learning_rate,
                target="last",
                neutral=("still",),
                told={ask.id: ask.kind for ask in self.asks},
            )

    def judged(self, judge: Judge, texts: Texts) -> list[Judged]:
        return [Judged(ask.id, ask.text, texts[ask.key]) for ask in self.asks]

    def values(self, texts: Texts, verdicts: Verdicts) -> dict[str, Float[np.ndarray, "item column"]]:
        said = [numbers(texts[ask.key]) for ask in self.asks]
        even = [sum(one % 2 == 0 for one in row) for row in said]
        odd = np.array(
            [[float(len(row)) if ask.number % 2 else np.nan] for ask, row in zip(self.asks, said, strict=True)]
        )
        return {
            "even": column([bool(row) and row[0] % 2 == 0 for row in said]),
            "share": np.array([[float(e), float(len(row))] for e, row in zip(even, said, strict=True)]),
            "odd pictures": odd,
            "never asked": np.full((len(said), 1), np.nan),
            **{name: column([one.score for one in found]) for name, found in verdicts.items()},
        }


@cache
def second() -> Any:
    """Return a second copy of the model, made once."""
    return tiny_llava()


def prompt_of(text: str, picture: Image.Image) -> dict[str, Tensor]:
    """What the chat template and the processor make of one question."""
    return dict(tiny_processor()(images=[[picture]], text=[f"USER: <image>\n{text} ASSISTANT:"], return_tensors="pt"))


def plain_read(ask: Ask, layer: int) -> Tensor:
    """(d_model,) of the residual stream behind a layer at the last prompt token, by a plain hook."""
    got: list[Tensor] = []
    with (
        torch.no_grad(),
        plain_hooks(second(), ("resid_post", layer, lambda hidden: got.append(hidden[0, -1].clone()))),
    ):
        second()(**prompt_of(ask.text, colour(ask.number)))
    return got[0]


def plain_answer(ask: Ask, layer: int = 2, vector: Tensor | None = None, text: str | None = None) -> str:
    """Greedy answer of a second copy of the model, a vector being added from the last prompt token on."""
    hf, inputs = second(), prompt_of(ask.text if text is None else text, colour(ask.number))
    last = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    last[:, -1] = True
    hooks = [] if vector is None else [("resid_post", layer, adding(vector, last, True))]
    with plain_hooks(hf, *hooks):
        ids = greedy(hf, inputs, TOKENS)
    return tiny_processor().batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def plain_answers(asks: Sequence[Ask], vectors: Mapping[str, Tensor] | Tensor | None = None) -> dict[str, str]:
    """Answers by key; `vectors` is one for all, or one by id."""
    return {
        ask.key: plain_answer(ask, vector=vectors[ask.id] if isinstance(vectors, Mapping) else vectors) for ask in asks
    }
