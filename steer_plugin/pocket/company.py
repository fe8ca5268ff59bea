"""Which nouns keep company: P(noun) and P(a | b) of the drawn world, and the relation of a noun to a picture.

Nouns come in pairs (anchor, partner). An anchor is drawn with weight 1 / (rank + 2.5), its partner joins it with
probability 0.8, and a partner shows up alone with probability 0.12; that is all the co-occurrence there is.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from steer_plugin.pocket.sprites import NOUNS
from steer_plugin.pocket.streams import stream

Relation = Literal["partner", "anchor", "crowded", "random", "rare", "hard", "plain"]
Subset = Literal["random", "popular", "adversarial"]
SUBSETS: tuple[Subset, ...] = ("random", "popular", "adversarial")

ANCHORS: tuple[str, ...] = NOUNS[::2]
PARTNERS: tuple[str, ...] = NOUNS[1::2]
JOINS = 0.8
ALONE = 0.12
STRAY = 0.35
POPULAR_NOUNS = 6
RARE_NOUNS = 10
CROWD = 4
_WEIGHTS = [1 / (rank + 2.5) for rank in range(len(ANCHORS))]


def companion(noun: str) -> str:
    """Return the other noun of the pair."""
    return NOUNS[NOUNS.index(noun) ^ 1]


def draw_groups(rng: random.Random) -> tuple[tuple[str, ...], ...]:
    """Draw which nouns a picture holds: one to three groups of one noun or one pair, no noun twice."""
    wanted = 1 if rng.random() < 0.45 else 2
    anchors: list[str] = []
    while len(anchors) < wanted:
        drawn = rng.choices(ANCHORS, _WEIGHTS)[0]
        if drawn not in anchors:
            anchors.append(drawn)
    groups: list[tuple[str, ...]] = []
    for anchor in anchors:
        if rng.random() < ALONE:
            groups.append((companion(anchor),))
        elif rng.random() < JOINS:
            groups.append((anchor, companion(anchor)))
        else:
            groups.append((anchor,))
    if rng.random() < STRAY:
        anchor = rng.choices(ANCHORS, _WEIGHTS)[0]
        if anchor not in anchors:
            groups.append((rng.choice((anchor, companion(anchor))),))
    return tuple(groups)


@dataclass(frozen=True)
class Company:
    """Frequencies of the drawn world: `popular` nouns in falling order, `given[a][b]` = P(a there | b there)."""

    popular: tuple[str, ...]
    given: dict[str, dict[str, float]]


@cache
def company() -> Company:
    """Count the company that nouns keep in 6,000 drawn layouts; always the same numbers."""
    rng = stream("company")
    together = np.zeros((len(NOUNS), len(NOUNS)))
    for _ in range(6000):
        present = [NOUNS.index(noun) for group in draw_groups(rng) for noun in group]
        together[np.ix_(present, present)] += 1
    often = together.diagonal()
    popular = tuple(NOUNS[i] for i in np.argsort(-often, kind="stable"))
    share = together / often[None, :]
    given = {a: {b: float(share[i, j]) for j, b in enumerate(NOUNS)} for i, a in enumerate(NOUNS)}
    return Company(popular, given)


def absent_noun(present: Collection[str], subset: Subset, rng: random.Random) -> str:
    """Choose a noun that is not in the picture, the way POPE's subset of that name does."""
    absent = [noun for noun in NOUNS if noun not in present]
    if subset == "random":
        return rng.choice(absent)
    if subset == "popular":
        return rng.choice([noun for noun in company().popular if noun not in present][:4])
    given = company().given
    closest = sorted(absent, key=lambda noun: -max(given[noun][other] for other in present))
    return closest[0] if rng.random() < 0.7 else closest[1]


def relation(noun: str, present: Collection[str], *, hard: bool = False) -> Relation:
    """Say how a noun stands to a picture that is asked for it; the first that fits.

    Absent: partner or anchor of a noun that is there, a popular noun where the picture is crowded, or random.
    Present: a rare noun, one that is hard to see (`hard`: small, faint or covered), or plain.
    """
    popular = company().popular
    if noun in present:
        return "rare" if noun in popular[-RARE_NOUNS:] else "hard" if hard else "plain"
    if companion(noun) in present:
        return "partner" if noun in PARTNERS else "anchor"
    return "crowded" if noun in popular[:POPULAR_NOUNS] and len(present) >= CROWD else "random"
