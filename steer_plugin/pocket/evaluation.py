"""Measured behaviour: first-word accuracy per POPE subset with Wilson intervals, CHAIR, share of well-formed text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TypedDict

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from steer_plugin.errors import InputError
from steer_plugin.pocket.company import SUBSETS
from steer_plugin.pocket.hallucination import chair
from steer_plugin.pocket.language import DESCRIBE, prompt, with_article
from steer_plugin.pocket.model import encode
from steer_plugin.pocket.sprites import NOUNS
from steer_plugin.pocket.world import Question, World

_NAMED = r"an? [a-z]+"
_CAPTION = re.compile(rf"(?:there is|maybe) ({_NAMED}(?:, {_NAMED})*)\.")


class Behaviour(TypedDict):
    """What `evaluate` reports; shares lie in 0..1, intervals are 95 % Wilson intervals of the accuracies."""

    world_seed: int
    n_pictures: int
    n_questions: int
    accuracy: dict[str, float]
    interval: dict[str, list[float]]
    mean_accuracy: float
    affirmed_present: float
    affirmed_absent: dict[str, float]
    chair_i: float
    chair_s: float
    recall: float
    wellformed: float


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson interval of a share; (0, 1) when nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    # Rounding alone can carry the ends out of 0..1.
    return max(0.0, middle - half), min(1.0, middle + half)


def say(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    images: Sequence[Image.Image],
    texts: Sequence[str],
    *,
    batch: int = 64,
    max_new_tokens: int = 24,
    opening: str = "",
) -> list[str]:
    """Let the model answer one text about each image, greedily and in batches; return the answers as text.

    An `opening` is put into the model's mouth and not returned.
    """
    said: list[str] = []
    for start in range(0, len(texts), batch):
        asked = [prompt(text) + opening for text in texts[start : start + batch]]
        inputs = encode(processor, images[start : start + batch], asked)
        with torch.no_grad():
            ids = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
                **inputs, do_sample=False, max_new_tokens=max_new_tokens
            )
        said += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def first_word(text: str) -> str:
    """Return the first word of an answer in lower case, "" when there is none."""
    found = re.match(r"[a-z]+", text.strip().lower())
    return found.group() if found else ""


def right(question: Question, said: str) -> bool:
    """Tell whether an answer's first word is the truth."""
    return first_word(said) == ("yes" if question.label else "no")


def is_answer(noun: str, said: str) -> bool:
    """Tell whether a text is one of the four answers to the question for a noun."""
    named = with_article(noun)
    return said in ("yes.", "no.", f"yes, the image shows {named}.", f"no, the image lacks {named}.")


def is_caption(said: str) -> bool:
    """Tell whether a text is a caption: an opening, then nouns of the world, each with its article."""
    found = _CAPTION.fullmatch(said)
    named = [part.split() for part in found.group(1).split(", ")] if found else []
    return bool(named) and all(noun in NOUNS and with_article(noun) == f"{a} {noun}" for a, noun in named)


def answer_all(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, questions: Sequence[Question], *, batch: int = 64
) -> list[str]:
    """Answer questions, each pair of picture and text once: a picture's positive question returns in every subset."""
    distinct = {(question.scene_id, question.text): question for question in questions}
    images, texts = [asked.image for asked in distinct.values()], [asked.text for asked in distinct.values()]
    known = dict(zip(distinct, say(model, processor, images, texts, batch=batch), strict=True))
    return [known[question.scene_id, question.text] for question in questions]


def evaluate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    world_seed: int,
    n_pictures: int,
    *,
    split: str = "test",
    batch: int = 64,
) -> Behaviour:
    """Measure answers and captions on `n_pictures` pictures of a world: six questions and one caption for each.

    Raises InputError when there is no picture.
    """
    if n_pictures < 1:
        raise InputError(f"evaluate needs at least one picture, got {n_pictures!r}")
    world = World(world_seed)
    questions = world.questions(n_pictures, split)
    answers = answer_all(model, processor, questions, batch=batch)
    cases = world.captions(n_pictures, split)
    captions = say(model, processor, [case.image for case in cases], [DESCRIBE] * len(cases), batch=batch)
    well = sum(is_answer(asked.noun, said) for asked, said in zip(questions, answers, strict=True))
    hits = {
        name: [right(q, said) for q, said in zip(questions, answers, strict=True) if q.subset == name]
        for name in SUBSETS
    }
    accuracy = {name: sum(found) / len(found) for name, found in hits.items()}
    absent = {name: _affirmed(questions, answers, name, label=False) for name in SUBSETS}
    measured = chair(captions, [case.nouns for case in cases])
    return {
        "world_seed": world_seed,
        "n_pictures": n_pictures,
        "n_questions": len(questions),
        "accuracy": accuracy,
        "interval": {name: list(wilson(sum(found), len(found))) for name, found in hits.items()},
        "mean_accuracy": sum(accuracy.values()) / len(accuracy),
        "affirmed_present": _affirmed(questions, answers, SUBSETS[0], label=True),
        "affirmed_absent": absent,
        "chair_i": measured["chair_i"],
        "chair_s": measured["chair_s"],
        "recall": measured["recall"],
        "wellformed": (well + sum(map(is_caption, captions))) / (len(answers) + len(captions)),
    }


def _affirmed(questions: Sequence[Question], answers: Sequence[str], subset: str, *, label: bool) -> float:
    pairs = zip(questions, answers, strict=True)
    said = [first_word(text) == "yes" for asked, text in pairs if asked.subset == subset and asked.label is label]
    return sum(said) / len(said)
