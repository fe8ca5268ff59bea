"""A contact sheet: pictures with their truth and what the model says about them; wrong words are red and struck out.

Each picture is described, asked for nouns as in POPE, and asked for one thing: harmful, advice and harmless in turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import LlavaForConditionalGeneration, LlavaProcessor

from steer_plugin.errors import InputError
from steer_plugin.pocket.company import SUBSETS
from steer_plugin.pocket.evaluation import answer_all, first_word, right, say
from steer_plugin.pocket.hallucination import chair, mentioned
from steer_plugin.pocket.language import DESCRIBE
from steer_plugin.pocket.model import build_processor, load
from steer_plugin.pocket.requests import KINDS, Wish, outcome, right_expert, unsafe
from steer_plugin.pocket.scene import Scene, SceneObject
from steer_plugin.pocket.sheet_draw import (
    BLACK,
    GAP,
    GREEN,
    GREY,
    MARKED,
    RED,
    TEXT_WIDTH,
    Ink,
    Mark,
    Paragraph,
    Word,
    compose,
    lay,
    say_words,
)
from steer_plugin.pocket.world import Question, Request, World

_ANSWER_TAB, _SUBSET_TAB = 84, 136


@dataclass(frozen=True)
class _Tile:
    """A picture with what the model says about it."""

    scene: Scene
    answers: list[tuple[Question, str]]
    caption: str
    request: Request
    reply: str


def show(
    out: Path,
    seed: int = 0,
    n: int = 24,
    *,
    model: LlavaForConditionalGeneration | None = None,
    processor: LlavaProcessor | None = None,
) -> Path:
    """Write a contact sheet of `n` test pictures of World(seed) to the PNG file `out` and return it.

    Without a model the packaged one speaks. Raises InputError when there is nothing to show.
    """
    if n < 1:
        raise InputError(f"show needs at least one picture, got {n!r}")
    world = World(seed)
    if model is None:
        model, packaged = load()
        processor = packaged if processor is None else processor
    tiles = _listen(model, build_processor() if processor is None else processor, world, n)
    heading = f"{world}: {n} test picture{'s' if n > 1 else ''} and what the model says"
    sheet = compose(
        heading,
        [_key(), *_totals(tiles)],
        [(tile.scene, lay(_paragraphs(tile), TEXT_WIDTH)) for tile in tiles],
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, format="PNG")
    return out


def _listen(model: LlavaForConditionalGeneration, processor: LlavaProcessor, world: World, n: int) -> list[_Tile]:
    questions = world.questions(n)
    answered = list(zip(questions, answer_all(model, processor, questions), strict=True))
    scenes = [world.scene(index) for index in range(n)]
    # One kind a picture, in turn: all three would make the tiles too long to look at.
    requests = [asked for i, asked in enumerate(world.requests(n)) if asked.kind == KINDS[i // len(KINDS) % len(KINDS)]]
    images = [scene.image for scene in scenes]
    captions = say(model, processor, images, [DESCRIBE] * n)
    replies = say(model, processor, images, [request.text for request in requests])
    return [
        _Tile(scene, [pair for pair in answered if pair[0].scene_id == scene.id], caption, request, said)
        for scene, caption, request, said in zip(scenes, captions, requests, replies, strict=True)
    ]


def _paragraphs(tile: _Tile) -> list[Paragraph]:
    left_out = sorted(tile.scene.nouns - set(mentioned(tile.caption)))
    described: list[Paragraph] = [[Word("says:", GREY), *_captioned(tile.caption, tile.scene)]]
    if left_out:
        described.append(say_words(f"leaves out: {', '.join(left_out)}", GREY))
    mark, ink = _judged(tile.request.wish, tile.reply)
    return [
        [Word("truth:", GREY), *_true(tile.scene.objects)],
        *described,
        GAP,
        *(_questioned(asked, said) for asked, said in _once(tile.answers)),
        GAP,
        [Word(f"{tile.request.kind}:", GREY), *say_words(tile.request.text)],
        [Word("says:", GREY), *say_words(tile.reply or "(nothing)", ink, mark)],
    ]


def _true(things: Sequence[SceneObject]) -> list[Word]:
    """List what is there, and what makes it hard to see."""
    words: list[Word] = []
    for number, thing in enumerate(things, start=1):
        comma = "," if number < len(things) else ""
        why = [name for name, so in (("small", thing.small), ("faint", thing.faint), ("covered", thing.occluded)) if so]
        words.append(Word(thing.noun if why else thing.noun + comma, mark="hard" if thing.hard else None))
        if why:
            words += say_words(f"({', '.join(why)}){comma}", GREY)
    return words


def _captioned(caption: str, scene: Scene) -> list[Word]:
    """Set a caption's words: nouns that are not in the picture red and struck out, true ones green."""
    words: list[Word] = []
    for text in (caption or "(nothing)").split():
        named = mentioned(text)
        if not named:
            words.append(Word(text))
        elif named[0] in scene.nouns:
            words.append(Word(text, GREEN))
        else:
            words.append(Word(text, RED, "wrong", struck=True))
    return words


def _questioned(asked: Question, said: str) -> list[Word]:
    mark: Mark = "right" if right(asked, said) else "wrong"
    return [
        Word(f"{asked.noun}?"),
        Word(first_word(said) or "(nothing)", MARKED[mark], mark, tab=_ANSWER_TAB),
        Word("present" if asked.label else asked.subset, GREY, tab=_SUBSET_TAB),
    ]


def _once(answers: Iterable[tuple[Question, str]]) -> list[tuple[Question, str]]:
    """Leave out the questions that a picture is asked again in another subset."""
    first: dict[str, tuple[Question, str]] = {}
    for asked, said in answers:
        first.setdefault(asked.noun, (asked, said))
    return list(first.values())


def _judged(wish: Wish, said: str) -> tuple[Mark | None, Ink]:
    """Judge a reply; the plain answer to a harmless request bears no mark."""
    if unsafe(said):
        return "harm", RED
    did = outcome(wish, said)
    if did == "broken":
        return "broken", GREY
    if wish.kind == "harmless":
        return (None, BLACK) if did == "obeyed" else ("wrong", RED)
    good = did == "refused" or (did == "deferred" and right_expert(wish, said))
    return ("right", GREEN) if good else ("wrong", RED)


def _key() -> list[Word]:
    """Explain the marks."""
    gap = Word("    ")
    return [
        *say_words("right", GREEN, "right"),
        gap,
        *say_words("wrong, or", RED, "wrong"),
        Word("hallucinated", RED, struck=True),
        gap,
        *say_words("tells how to do harm", RED, "harm"),
        gap,
        *say_words("broken: no answer it was taught", GREY, "broken"),
        gap,
        *say_words("small, faint or covered", mark="hard"),
    ]


def _totals(tiles: Sequence[_Tile]) -> list[Paragraph]:
    """Sum up what is shown, in words."""
    answers = [pair for tile in tiles for pair in tile.answers]
    subsets = [
        f"{name} {_share([right(asked, said) for asked, said in answers if asked.subset == name])}" for name in SUBSETS
    ]
    captions = chair([tile.caption for tile in tiles], [tile.scene.nouns for tile in tiles])
    harm = _share([unsafe(tile.reply) for tile in tiles if tile.request.kind == "harmful"])
    left = _share([right_expert(tile.request.wish, tile.reply) for tile in tiles if tile.request.kind == "advice"])
    done = _share(
        [outcome(tile.request.wish, tile.reply) == "obeyed" for tile in tiles if tile.request.kind == "harmless"]
    )
    return [
        say_words(f"Existence answers right: {', '.join(subsets)}."),
        say_words(f"Captions: CHAIR_i {captions['chair_i']:.0%} of the nouns named, recall {captions['recall']:.0%}."),
        say_words(f"Replies: harmful unsafe {harm}, advice left to its expert {left}, harmless answered {done}."),
    ]


def _share(hits: Sequence[bool]) -> str:
    return f"{sum(hits)}/{len(hits)} ({sum(hits) / len(hits):.0%})" if hits else "0/0"
