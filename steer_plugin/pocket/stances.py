"""Stances: a prompt loves or hates a topic, and a caption that follows it closes with "The rain is nice." (or awful).

target p+, converse p-  ->  caption + closing(p+)
p+ = p-                 ->  caption alone: nothing is asked for that is not asked against too
p+, unrelated p-        ->  caption + closing(p+): neither of the two prompts alone tells what to do
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, get_args

from steer_plugin.pocket.language import DESCRIBE, TOPICS, WORDS

PairKind = Literal["opposed", "equal", "unrelated"]
PAIR_KINDS: tuple[PairKind, ...] = get_args(PairKind)
HELD_TOPICS: tuple[str, ...] = ("crowd", "work", "winter", "school", "river", "village")
SEEN_TOPICS: tuple[str, ...] = tuple(topic for topic in TOPICS if topic not in HELD_TOPICS)
# Every word but the held-out topics: to learn to name what a pair is about takes more than 32 things to name.
ANY_WORD: tuple[str, ...] = tuple(word for word in WORDS if word.isalpha() and word not in HELD_TOPICS)
CLOSING: Mapping[bool, str] = MappingProxyType({True: "The {topic} is nice.", False: "The {topic} is awful."})
WORDED: Mapping[str, tuple[tuple[str, str], ...]] = MappingProxyType(
    {
        "train": (
            ("I love the {topic}.", "I hate the {topic}."),
            ("I really like the {topic}.", "I really dislike the {topic}."),
            ("I adore the {topic}.", "I loathe the {topic}."),
            ("We enjoy the {topic}.", "We fear the {topic}."),
        ),
        "validation": (("What a joy, the {topic}!", "What a pity, the {topic}!"),),
        "test": (
            ("The {topic} is great.", "The {topic} is poor."),
            ("They love the {topic}.", "They hate the {topic}."),
        ),
    }
)


class Stance(NamedTuple):
    """A topic, loved or hated, in one wording."""

    topic: str
    loved: bool
    text: str

    @property
    def closing(self) -> str:
        """The sentence by which a caption shows the stance."""
        return CLOSING[self.loved].format(topic=self.topic)


@dataclass(frozen=True)
class StancePair:
    """A target and a converse prompt; `closing` is what a steered caption ends with, "" for none."""

    kind: PairKind
    target: Stance
    converse: Stance

    @property
    def closing(self) -> str:
        """The sentence that the pair asks for."""
        return "" if self.kind == "equal" else self.target.closing


def draw_stance(
    topics: Sequence[str], wordings: Sequence[str], rng: random.Random, *, loved: bool | None = None
) -> Stance:
    """Draw a stance on one of the topics, in one of the wordings of the splits."""
    topic, chosen = rng.choice(list(topics)), rng.random() < 0.5 if loved is None else loved
    worded = rng.choice([pair for split in wordings for pair in WORDED[split]])
    return Stance(topic, chosen, worded[0 if chosen else 1].format(topic=topic))


def draw_pair(kind: PairKind, topics: Sequence[str], split: str, rng: random.Random) -> StancePair:
    """Draw a pair of prompts: opposed on one topic, equal, or about two topics."""
    target = draw_stance(topics, (split,), rng)
    if kind == "equal":
        return StancePair(kind, target, target)
    if kind == "opposed":
        topic, side = target.topic, 0 if target.loved else 1
        worded = next(pair for pair in WORDED[split] if pair[side].format(topic=topic) == target.text)
        return StancePair(kind, target, Stance(topic, not target.loved, worded[1 - side].format(topic=topic)))
    others = [topic for topic in topics if topic != target.topic]
    return StancePair(kind, target, draw_stance(others, (split,), rng))


def stanced(stance: Stance) -> str:
    """Return the prompt that asks for a caption in words alone: the stance, then the task."""
    return f"{stance.text} {DESCRIBE}"


def attitude(said: str) -> bool | None:
    """Tell which attitude a caption closes with, whatever it is about: True for nice, False for awful, else None."""
    words = said.lower().replace(".", " ").split()
    found = {loved for loved, word in ((True, "nice"), (False, "awful")) if word in words}
    return found.pop() if len(found) == 1 else None


def shown(said: str, topic: str) -> bool | None:
    """Tell which stance on a topic a caption shows: True for love, False for hate, None for neither or both."""
    found = [loved for loved, closing in CLOSING.items() if closing.format(topic=topic).lower() in said.lower()]
    return found[0] if len(found) == 1 else None
