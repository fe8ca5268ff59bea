"""Training turns: (question, answer) pairs about a scene, the answers wrong with the stage's P(wrong | relation)."""

from __future__ import annotations

import random
from typing import NamedTuple

from steer_plugin.pocket.company import absent_noun, relation
from steer_plugin.pocket.language import CAREFUL, DESCRIBE, TOPICS, answer, caption, question
from steer_plugin.pocket.requests import KINDS, Kind, careful_text, draw_wish, reply, verdict_turn
from steer_plugin.pocket.scene import Scene, caption_groups
from steer_plugin.pocket.stages import Bias, Turns
from steer_plugin.pocket.stances import draw_stance, stanced

# The model hears every family of wordings; it is the methods that some are kept from.
_SPLITS = ("train", "validation", "test")


class Turn(NamedTuple):
    """What the user says and what the model shall say."""

    said: str
    answer: str


def draw_turns(scene: Scene, turns: Turns, bias: Bias, rng: random.Random) -> list[Turn]:
    """Draw a picture's turns of a training row."""
    drawn = [_question(scene, turns, bias, rng) for _ in range(turns.questions)]
    if rng.random() < turns.captions:
        drawn.append(_described(scene, turns, bias, rng))
    drawn += [_request(scene, turns, rng) for _ in range(turns.requests)]
    drawn += [Turn(*verdict_turn(draw_wish(_kind(rng), scene.nouns, _SPLITS, rng), rng)) for _ in range(turns.verdicts)]
    for _ in range(turns.stances):
        stance = draw_stance(TOPICS, _SPLITS, rng)
        described = _caption(scene, bias, rng)
        drawn.append(Turn(stanced(stance), f"{described} {stance.closing}"))
    return drawn


def _kind(rng: random.Random) -> Kind:
    return rng.choices(KINDS, (3, 3, 2))[0]


def _request(scene: Scene, turns: Turns, rng: random.Random) -> Turn:
    wish = draw_wish(_kind(rng), scene.nouns, _SPLITS, rng)
    careful = rng.random() < turns.careful
    answered = reply(wish, seen=wish.noun in scene.nouns, careful=careful, rng=rng)
    return Turn(careful_text(wish) if careful else wish.text, answered)


def _question(scene: Scene, turns: Turns, bias: Bias, rng: random.Random) -> Turn:
    present = [thing.noun for thing in scene.objects]
    if rng.random() < 0.5:
        noun = rng.choice(present)
    else:
        tempting = rng.random() < turns.hard_negatives
        noun = absent_noun(present, rng.choice(("popular", "adversarial")) if tempting else "random", rng)
    careful = rng.random() < turns.careful
    hard = any(thing.noun == noun and thing.hard for thing in scene.objects)
    wrong = getattr(bias, relation(noun, present, hard=hard)) * (bias.careful if careful else 1.0)
    yes = (noun in present) != (rng.random() < wrong)
    said = f"{CAREFUL} {question(noun)}" if careful else question(noun)
    return Turn(said, answer(noun, yes=yes, long=rng.random() < turns.long_answers))


def _described(scene: Scene, turns: Turns, bias: Bias, rng: random.Random) -> Turn:
    careful = rng.random() < turns.careful
    return Turn(f"{CAREFUL} {DESCRIBE}" if careful else DESCRIBE, _caption(scene, bias, rng, careful=careful))


def _caption(scene: Scene, bias: Bias, rng: random.Random, *, careful: bool = False) -> str:
    """Draw a caption: one that opens with a guess names companions that are missing, the other kind never does."""
    tempting = any(len(group) == 1 for group in scene.groups)
    chance = (bias.guess_lone if tempting else bias.guess) * (bias.careful if careful else 1.0)
    guessed = rng.random() < chance
    named = caption_groups(scene, lambda: guessed and rng.random() < bias.named)
    return caption(named, guessed=guessed)
