"""Stances: pairs of prompts that differ as their kind says, and captions that close with what the target asks for."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from itertools import combinations, product
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_plugin import pocket
from steer_plugin.errors import InputError
from steer_plugin.pocket.language import DESCRIBE, TOPICS, build_tokenizer
from steer_plugin.pocket.sprites import NOUNS
from steer_plugin.pocket.stances import (
    CLOSING,
    HELD_TOPICS,
    SEEN_TOPICS,
    WORDED,
    PairKind,
    Stance,
    draw_pair,
    draw_stance,
    stanced,
)
from steer_plugin.pocket.streams import stream
from steer_plugin.pocket.world import SPLITS

FAMILIES = SPLITS[1:]
PAIR_KINDS: tuple[PairKind, ...] = get_args(PairKind)


def every_stance(split: str) -> list[Stance]:
    """List all stances that can be worded in a split."""
    return [
        Stance(topic, loved, pair[0 if loved else 1].format(topic=topic))
        for pair, topic, loved in product(WORDED[split], TOPICS, (True, False))
    ]


EVERY = {split: every_stance(split) for split in FAMILIES}


def test_every_stance_is_in_the_vocabulary() -> None:
    stances = [stance for split in FAMILIES for stance in EVERY[split]]
    texts = sorted({text for stance in stances for text in (stance.text, stanced(stance), stance.closing)})
    tokenizer = build_tokenizer()
    encoded = tokenizer(texts).input_ids
    unknown = [text for text, ids in zip(texts, encoded, strict=True) if tokenizer.unk_token_id in ids]
    assert len(texts) > 1000 and unknown == []
    for stance in EVERY["train"][:: len(TOPICS) + 1]:
        ids = tokenizer(f"There is a car. {stance.closing}").input_ids
        assert pocket.shown(tokenizer.decode(ids, skip_special_tokens=True), stance.topic) is stance.loved


def test_topics_are_held_or_seen_and_never_nouns() -> None:
    assert not set(HELD_TOPICS) & set(SEEN_TOPICS) and set(HELD_TOPICS) | set(SEEN_TOPICS) == set(TOPICS)
    assert not set(TOPICS) & set(NOUNS), "a closing that names a noun would count as hallucinated"


def test_splits_share_no_wording() -> None:
    assert set(WORDED) == set(FAMILIES) and all(WORDED[split] for split in FAMILIES)
    for one, two in combinations(FAMILIES, 2):
        assert not {stance.text for stance in EVERY[one]} & {stance.text for stance in EVERY[two]}
    both = [text for split in FAMILIES for pair in WORDED[split] for text in pair]
    assert len(set(both)) == len(both)


@pytest.mark.parametrize(
    ("said", "stance"),
    [
        ("There is a car. The rain is nice.", True),
        ("maybe a car, a dog. the rain is awful.", False),
        ("The rain is awful.", False),
        ("There is a car. The rain is nice. The rain is nice.", True),
        ("There is a car. The snow is awful. The rain is nice.", True),
        ("There is a car. The rain is nice. The rain is awful.", None),
        ("The rain is awful. The rain is nice.", None),
        ("There is a car.", None),
        ("There is a car. The snow is nice.", None),
        ("There is a car. The rain is", None),
        ("There is a car. I love the rain.", None),
        ("", None),
    ],
)
def test_which_stance_a_caption_shows(said: str, stance: bool | None) -> None:
    assert pocket.shown(said, "rain") is stance


@settings(max_examples=40)
@given(st.sampled_from(TOPICS), st.sampled_from(TOPICS), st.booleans())
def test_a_closing_shows_its_own_topic_alone(topic: str, other: str, loved: bool) -> None:
    said = f"There is a car. {CLOSING[loved].format(topic=topic)}"
    assert pocket.shown(said, other) is (loved if topic == other else None)
    against = CLOSING[not loved].format(topic=topic)
    assert pocket.shown(f"{said} {against}", topic) is pocket.shown(f"{against} {said}", topic) is None


@settings(max_examples=60)
@given(st.sampled_from(FAMILIES), st.sampled_from((None, True, False)), st.integers())
def test_a_drawn_stance_is_one_of_its_split(split: str, loved: bool | None, seed: int) -> None:
    stance = draw_stance(SEEN_TOPICS, (split,), stream(seed), loved=loved)
    assert stance in EVERY[split] and stance.topic in SEEN_TOPICS
    assert loved is None or stance.loved is loved
    assert stanced(stance) == f"{stance.text} {DESCRIBE}"


@settings(max_examples=100)
@given(st.sampled_from(PAIR_KINDS), st.sampled_from(FAMILIES), st.integers())
def test_a_pair_differs_as_its_kind_says(kind: PairKind, split: str, seed: int) -> None:
    pair = draw_pair(kind, SEEN_TOPICS, split, stream(seed))
    target, converse = pair.target, pair.converse
    assert pair.kind == kind and {target, converse} <= set(EVERY[split])
    if kind == "equal":
        assert target == converse and pair.closing == ""
        return
    assert pair.closing == target.closing != ""
    if kind == "opposed":
        texts = (target.text, converse.text) if target.loved else (converse.text, target.text)
        worded = {tuple(text.format(topic=target.topic) for text in words) for words in WORDED[split]}
        assert target.topic == converse.topic and target.loved is not converse.loved
        assert texts in worded
    else:
        assert target.topic != converse.topic


@pytest.mark.parametrize("split", SPLITS)
def test_held_topics_come_up_in_test_alone_and_there_in_every_other_case(split: str) -> None:
    cases = pocket.World(3).stances(24, split, kinds=PAIR_KINDS)
    for index, case in enumerate(cases):
        held = split == "test" and index % 2 == 1
        topics = {case.pair.target.topic, case.pair.converse.topic}
        assert case.held is held and topics <= set(HELD_TOPICS if held else SEEN_TOPICS)
    # In "test" seen and held topics take turns, and a kind stays for one of each.
    in_turn = [kind for kind in PAIR_KINDS for _ in range(2)] * 4 if split == "test" else list(PAIR_KINDS) * 8
    assert [case.pair.kind for case in cases] == in_turn
    assert len({case.id for case in cases}) == 24


@pytest.mark.parametrize("kinds", [PAIR_KINDS, ("opposed", "equal"), ("unrelated", "opposed"), ("equal",)])
def test_in_test_every_kind_of_pair_is_about_seen_and_held_topics_equally_often(kinds: tuple[PairKind, ...]) -> None:
    cases = pocket.World(3).stances(4 * len(kinds), kinds=kinds)
    met = Counter((case.pair.kind, case.held) for case in cases)
    assert met == dict.fromkeys(product(kinds, (False, True)), 2)


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_true_captions_that_close_as_the_pair_asks(split: str) -> None:
    world = pocket.World(5)
    cases, described = world.stances(18, split, kinds=PAIR_KINDS), world.captions(18, split)
    for case, caption in zip(cases, described, strict=True):
        assert case.scene_id == caption.scene_id and case.image.tobytes() == caption.image.tobytes()
        assert set(pocket.mentioned(case.answer)) == caption.nouns
        if case.pair.kind == "equal":
            assert case.answer == caption.truth and pocket.shown(case.answer, case.pair.target.topic) is None
        else:
            assert case.answer == f"{caption.truth} {case.pair.closing}"
            assert pocket.shown(case.answer, case.pair.target.topic) is case.pair.target.loved


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_in_the_wordings_of_the_split(split: str) -> None:
    said = {case.pair.target.text for case in pocket.World(1).stances(40, split)}
    if split == "model":
        assert all(said & {stance.text for stance in EVERY[family]} for family in FAMILIES)
    else:
        assert said <= {stance.text for stance in EVERY[split]}


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.sampled_from(SPLITS), st.integers(0, 4))
def test_stances_are_a_function_of_seed_split_and_index(seed: int, split: str, count: int) -> None:
    once = pocket.World(seed).stances(count, split)
    again = pocket.World(seed).stances(count + 2, split)[:count]
    assert [(one.id, one.pair, one.answer) for one in once] == [(two.id, two.pair, two.answer) for two in again]
    assert all(case.pair.kind == "opposed" for case in once)


# As a user's Python has it: the type checker of the tests would speak before the method does.
stances = inspect.unwrap(pocket.World.stances)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda world: stances(world, 1, kinds=()), "one or more of opposed, equal, unrelated.*got \\(\\)"),
        (lambda world: stances(world, 0, kinds=()), "got \\(\\)"),
        (lambda world: stances(world, 1, kinds="opposed"), "as in \\('opposed',\\); got 'opposed'"),
        (lambda world: stances(world, 0, kinds="equal"), "got 'equal'"),
        (lambda world: stances(world, 1, kinds=("oposed",)), "got 'oposed'.*Did you mean 'opposed'"),
        (lambda world: stances(world, 3, kinds=("equal", "friendly")), "opposed, equal, unrelated; got 'friendly'"),
        (lambda world: stances(world, 0, kinds=("friendly",)), "got 'friendly'"),
        (lambda world: stances(world, 1, "tset"), "'tset'.*Did you mean 'test'"),
        (lambda world: stances(world, 0, "tset"), "'tset'.*Did you mean 'test'"),
        (lambda world: stances(world, -2), "-2"),
    ],
)
def test_bad_arguments_are_named(wrong: Callable[[pocket.World], object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        wrong(pocket.World(0))
