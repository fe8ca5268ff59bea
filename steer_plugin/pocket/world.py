"""World(seed): scene i of a split is a function of (seed, split, i) alone; questions follow POPE, captions CHAIR.

Requests (in the manner of MM-SafetyBench) and stances (of VNIA) are worded differently in every split, and the topics
of `HELD_TOPICS` come up in "test" alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from PIL import Image

from steer_plugin.errors import InputError, nearest
from steer_plugin.pocket.company import SUBSETS, absent_noun, companion
from steer_plugin.pocket.language import DESCRIBE, caption, question
from steer_plugin.pocket.requests import ASKED, KINDS, OPENINGS, SEEN_OR_GUESSED, Kind, Verdict, Wish, draw_wish
from steer_plugin.pocket.scene import Scene, caption_groups, draw_scene
from steer_plugin.pocket.sprites import NOUNS
from steer_plugin.pocket.stances import HELD_TOPICS, PAIR_KINDS, SEEN_TOPICS, PairKind, StancePair, draw_pair
from steer_plugin.pocket.streams import stream

SPLITS: tuple[str, ...] = ("model", "train", "validation", "test")
N = TypeVar("N", bound=str)


@dataclass(frozen=True)
class Question:
    """A yes/no question about a picture; `label` is the truth, `subset` says how an absent noun would be chosen."""

    id: str
    image: Image.Image
    text: str
    label: bool
    subset: str
    noun: str
    scene_id: str


class CaptionCase(NamedTuple):
    """A picture to describe, the nouns that are truly in it, a true caption, and a guess that names `missing` ones too.

    `missing` are the companions that one would expect beside nouns that stand alone.
    """

    image: Image.Image
    nouns: frozenset[str]
    scene_id: str
    truth: str
    tempting: str
    missing: tuple[str, ...]
    task: str = DESCRIBE
    verdict: Verdict = SEEN_OR_GUESSED


@dataclass(frozen=True)
class Request:
    """Something that a user asks for about a picture; `kind` is harmful, advice (which is an expert's) or harmless."""

    id: str
    image: Image.Image
    wish: Wish
    scene_id: str

    @property
    def kind(self) -> Kind:
        """Return harmful, advice or harmless."""
        return self.wish.kind

    @property
    def text(self) -> str:
        """Return what the user says."""
        return self.wish.text

    @property
    def verdict(self) -> Verdict:
        """Return the suffix and the two verdicts of contrastive prompting."""
        return self.wish.verdict


@dataclass(frozen=True)
class StanceCase:
    """A picture to describe under a pair of prompts; `answer` is a true caption that shows the target's stance."""

    id: str
    image: Image.Image
    pair: StancePair
    answer: str
    held: bool
    scene_id: str


class World:
    """A drawn world; another seed shows other pictures of the same nouns, which keep the same company.

    Raises InputError for a seed that is no whole number from 0 up.
    """

    def __init__(self, seed: int = 0) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise InputError(f"seed must be a whole number from 0 up, got {seed!r}")
        self.seed = seed

    def __repr__(self) -> str:
        return f"World(seed={self.seed})"

    @property
    def nouns(self) -> tuple[str, ...]:
        """All nouns of the world."""
        return NOUNS

    def partner(self, noun: str) -> str:
        """Return the noun that keeps company with `noun`; InputError for a word that is no noun of the world."""
        if noun not in NOUNS:
            raise InputError(f"{noun!r} is no noun of the pocket world.{nearest(noun, NOUNS)}")
        return companion(noun)

    def scene(self, index: int, split: str = "test", *, without: str | None = None) -> Scene:
        """Draw a scene of a split; `without` leaves out the object of that noun and changes no other pixel.

        InputError for an unknown split, an index below 0, or a noun that is not in the picture.
        """
        _known("split", split, SPLITS)
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise InputError(f"a scene's index must be a whole number from 0 up, got {index!r}")
        return draw_scene(self.seed, split, index, without)

    def questions(self, n_pictures: int, split: str = "test", subsets: Sequence[str] = SUBSETS) -> list[Question]:
        """Ask about pictures 0 .. n - 1 of a split: for each picture and subset one positive and one negative question.

        A picture's positive question is the same in every subset. InputError for unknown subsets or a negative count.
        """
        chosen = _all_known("subset", subsets, SUBSETS)
        _known("split", split, SPLITS)
        asked: list[Question] = []
        for index in range(_count(n_pictures)):
            scene = self.scene(index, split)
            rng = stream("questions", self.seed, split, index)
            present = rng.choice([thing.noun for thing in scene.objects])
            # Drawn for all subsets even when few are wanted: a question never depends on which others were asked for.
            absent = {name: absent_noun(scene.nouns, name, rng) for name in SUBSETS}
            for name in chosen:
                for noun, label in ((present, True), (absent[name], False)):
                    identity = f"{scene.id}-{name}-{'yes' if label else 'no'}"
                    asked.append(Question(identity, scene.image, question(noun), label, name, noun, scene.id))
        return asked

    def captions(self, n_pictures: int, split: str = "test") -> list[CaptionCase]:
        """List pictures 0 .. n - 1 of a split with the nouns truly there."""
        _known("split", split, SPLITS)
        scenes = [self.scene(index, split) for index in range(_count(n_pictures))]
        return [_caption_case(scene) for scene in scenes]

    def requests(
        self,
        n_pictures: int,
        split: str = "test",
        kinds: Sequence[str] = KINDS,
        *,
        wordings: str | None = None,
    ) -> list[Request]:
        """Ask for one thing of each kind about pictures 0 .. n - 1 of a split, in the wordings of that split.

        `wordings` asks for the same things, under the same ids, as another split words them. InputError for an unknown
        split or kind, or a negative count.
        """
        chosen: list[Kind] = _all_known("kind", kinds, KINDS)
        _known("split", split, SPLITS)
        worded = split if wordings is None else _known("split", wordings, SPLITS)
        asked: list[Request] = []
        for index in range(_count(n_pictures)):
            scene = self.scene(index, split)
            rng = stream("requests", self.seed, split, index)
            wishes = {kind: draw_wish(kind, scene.nouns, _wordings(split), rng) for kind in KINDS}
            if worded != split:
                # A stream of its own: the things asked for must not depend on how they are worded.
                rng = stream("wordings", self.seed, split, index, worded)
                wishes = {kind: _reworded(wish, rng.choice(_wordings(worded)), rng) for kind, wish in wishes.items()}
            asked += [Request(f"{scene.id}-{kind}", scene.image, wishes[kind], scene.id) for kind in chosen]
        return asked

    def stances(
        self,
        n_pictures: int,
        split: str = "test",
        kinds: Sequence[str] = ("opposed",),
        *,
        topics: Sequence[str] | None = None,
        wordings: str | None = None,
    ) -> list[StanceCase]:
        """Pair pictures 0 .. n - 1 of a split with prompts, kinds in turn: "opposed", "equal" or "unrelated".

        In "test" every other case is about a topic of `HELD_TOPICS`, which no other split shows; kinds change after
        two of them. `topics` draws from these alone, `wordings` words the prompts as another split does. InputError for
        an unknown split or kind, no kinds or topics, or a negative count.
        """
        worded = split if wordings is None else _known("split", wordings, SPLITS)
        if topics is not None and not topics:
            raise InputError("topics is empty; name at least one word.")
        chosen: list[PairKind] = _all_known("kind", kinds, PAIR_KINDS)
        _known("split", split, SPLITS)
        cases: list[StanceCase] = []
        for index in range(_count(n_pictures)):
            scene = self.scene(index, split)
            rng = stream("stances", self.seed, split, index)
            held = split == "test" and index % 2 == 1 and topics is None
            # Pairs of a seen and a held topic: otherwise two kinds in turn would split as the topics do.
            turn = index // 2 if split == "test" else index
            pair = draw_pair(
                chosen[turn % len(chosen)],
                topics if topics is not None else HELD_TOPICS if held else SEEN_TOPICS,
                rng.choice(_wordings(worded)),
                rng,
            )
            held = pair.target.topic in HELD_TOPICS
            answer = f"{_caption_case(scene).truth} {pair.closing}".strip()
            cases.append(StanceCase(f"{scene.id}-stance", scene.image, pair, answer, held, scene.id))
        return cases


def _reworded(wish: Wish, split: str, rng: random.Random) -> Wish:
    """The same wish in the wordings of a split."""
    if wish.kind == "advice":
        text = rng.choice(OPENINGS[split]) + wish.act.format(noun=wish.noun)
        return replace(wish, text=text[0].upper() + text[1:])
    return replace(wish, text=rng.choice(ASKED[split]).format(act=wish.act, noun=wish.noun))


def _caption_case(scene: Scene) -> CaptionCase:
    true, tempting = caption_groups(scene, lambda: False), caption_groups(scene, lambda: True)
    missing = tuple(noun for noun in tempting if noun not in scene.nouns)
    return CaptionCase(scene.image, scene.nouns, scene.id, caption(true), caption(tempting, guessed=True), missing)


def _wordings(split: str) -> tuple[str, ...]:
    """Name the families of wordings that a split may use; those that train the model use all."""
    return SPLITS[1:] if split == "model" else (split,)


def _count(number: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise InputError(f"the number of pictures must be a whole number from 0 up, got {number!r}")
    return number


def _all_known(what: str, names: Sequence[str], known: tuple[N, ...]) -> list[N]:
    """Return the known names that were given, at least one; a single string would be read letter by letter."""
    if isinstance(names, str) or not names:
        raise InputError(f"{what}s must list one or more of {', '.join(known)}, as in ({known[0]!r},); got {names!r}")
    return [_known(what, name, known) for name in names]


def _known(what: str, name: object, known: tuple[N, ...]) -> N:
    """Return the known name that was given, or refuse it."""
    for one in known:
        if name == one:
            return one
    raise InputError(f"{what} must be one of {', '.join(known)}; got {name!r}.{nearest(str(name), known)}")
