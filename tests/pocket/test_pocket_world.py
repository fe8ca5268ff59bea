"""The drawn world: pictures are functions of (seed, split, index), and their truth is the truth."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_plugin import pocket
from steer_plugin.errors import InputError
from steer_plugin.pocket.company import (
    CROWD,
    PARTNERS,
    POPULAR_NOUNS,
    RARE_NOUNS,
    SUBSETS,
    companion,
    company,
    relation,
)
from steer_plugin.pocket.language import DESCRIBE
from steer_plugin.pocket.requests import SEEN_OR_GUESSED
from steer_plugin.pocket.scene import CELL, HARD, SIDE, paint, patch_nouns, plan_scene, scene_key
from steer_plugin.pocket.sprites import NOUNS, sprite
from steer_plugin.pocket.streams import stream
from steer_plugin.pocket.world import SPLITS


def pixels(scene: pocket.Scene) -> np.ndarray:
    return np.asarray(scene.image)


def digest(scene: pocket.Scene) -> str:
    return hashlib.sha256(scene.image.tobytes()).hexdigest()


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(SPLITS), st.integers(0, 10**6))
def test_a_scene_is_a_function_of_seed_split_and_index(seed: int, split: str, index: int) -> None:
    one, two = pocket.World(seed).scene(index, split), pocket.World(seed).scene(index, split)
    assert one.objects == two.objects and one.id == two.id and digest(one) == digest(two)
    assert one.image.size == (SIDE, SIDE) and one.image.mode == "RGB"
    assert split in one.id and str(index) in one.id


def test_splits_seeds_and_indices_never_share_a_picture() -> None:
    scenes = [pocket.World(seed).scene(i, split) for seed, split, i in product(range(2), SPLITS, range(20))]
    assert len({digest(scene) for scene in scenes}) == len({scene.id for scene in scenes}) == len(scenes)


@settings(max_examples=200)
@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 2**40))
def test_no_world_draws_from_the_streams_that_train_the_model(seed: int, index: int, other: int, place: int) -> None:
    taught = scene_key(seed, "model", index)
    for split in SPLITS[1:]:
        shown = scene_key(other, split, place)
        assert "/".join(map(str, taught)) != "/".join(map(str, shown))
        assert taught[0] == "model" and shown[0] == "world"


def test_every_object_changes_pixels_inside_its_box_and_nowhere_else() -> None:
    for number in range(60):
        plan = plan_scene(stream("test", number))
        whole = paint(plan)
        for i, placed in enumerate(plan.placed):
            changed = np.abs(whole - paint(plan, skip=i)).max(-1) > 0
            x0, y0, x1, y1 = placed.thing.box
            assert 0 <= x0 < x1 <= SIDE and 0 <= y0 < y1 <= SIDE
            assert changed[y0:y1, x0:x1].mean() > 0.2
            changed[y0:y1, x0:x1] = False
            assert not changed.any()


def test_objects_keep_to_their_own_cells_and_flags_mean_something() -> None:
    scenes = [pocket.World(1).scene(i) for i in range(120)]
    things = [thing for scene in scenes for thing in scene.objects]
    for scene in scenes:
        first = [(thing.box[0] // CELL, thing.box[1] // CELL) for thing in scene.objects]
        last = [((thing.box[2] - 1) // CELL, (thing.box[3] - 1) // CELL) for thing in scene.objects]
        assert first == last and len(set(first)) == len(first)
        assert scene.nouns == {noun for group in scene.groups for noun in group}
        labels = patch_nouns(scene, 12)
        assert {NOUNS[label] for label in labels if label >= 0} == scene.nouns
    assert max(max(t.box[2] - t.box[0], t.box[3] - t.box[1]) for t in things if t.small) <= 14
    for flag in ("small", "faint", "occluded"):
        assert 0.1 < np.mean([getattr(thing, flag) for thing in things]) < 0.4
    assert all(thing.hard == any((thing.small, thing.faint, thing.occluded)) for thing in things)
    assert np.mean([thing.hard for thing in things]) == pytest.approx(HARD, abs=0.08)
    assert {thing.noun for thing in things} == set(NOUNS)


def test_nouns_look_different_from_each_other() -> None:
    assert len(NOUNS) >= 24
    drawn = {noun: np.asarray(sprite(noun, stream("look")), float)[..., :3].mean((0, 1)) for noun in NOUNS}
    apart = [np.abs(drawn[a] - drawn[b]).max() for a, b in product(NOUNS, NOUNS) if a < b]
    assert min(apart) > 1.0


def test_partners_keep_company() -> None:
    world = pocket.World(0)
    assert all(world.partner(world.partner(noun)) == noun != world.partner(noun) for noun in world.nouns)
    given_ = company().given
    for noun in PARTNERS[:6]:
        others = [given_[noun][other] for other in NOUNS if other not in (noun, world.partner(noun))]
        assert given_[noun][world.partner(noun)] > 2 * max(others)


def test_questions_follow_pope() -> None:
    world = pocket.World(3)
    asked = world.questions(60)
    assert len(asked) == 60 * 3 * 2 and len({q.id for q in asked}) == len(asked)
    assert Counter(q.label for q in asked) == {True: 180, False: 180}
    assert Counter(q.subset for q in asked) == dict.fromkeys(SUBSETS, 120)
    scenes = {scene.id: scene for scene in (world.scene(i) for i in range(60))}
    for q in asked:
        assert q.label == (q.noun in scenes[q.scene_id].nouns)
        assert q.text == f"Is there {'an' if q.noun[0] in 'aeiou' else 'a'} {q.noun} in the image?"
        assert q.image.tobytes() == scenes[q.scene_id].image.tobytes()
    positive = {(q.scene_id, q.noun) for q in asked if q.label}
    assert len(positive) == 60
    popular = [q.noun for q in asked if q.subset == "popular" and not q.label]
    assert set(popular) <= set(company().popular[:10])
    related = {
        name: np.mean(
            [
                relation(q.noun, scenes[q.scene_id].nouns) in ("partner", "anchor")
                for q in asked
                if q.subset == name and not q.label
            ]
        )
        for name in SUBSETS
    }
    assert related["adversarial"] > related["random"] + 0.2


def test_a_subset_asks_the_same_whichever_others_are_asked() -> None:
    everything = pocket.World(5).questions(10)
    alone = pocket.World(5).questions(10, subsets=("popular",))
    assert [q.id for q in alone] == [q.id for q in everything if q.subset == "popular"]
    assert [q.noun for q in alone] == [q.noun for q in everything if q.subset == "popular"]


def test_captions_come_with_the_truth() -> None:
    world = pocket.World(2)
    for index, case in enumerate(world.captions(40, "validation")):
        scene = world.scene(index, "validation")
        assert case.image.tobytes() == scene.image.tobytes()
        assert case.nouns == scene.nouns and case.scene_id == scene.id
        assert case.task == DESCRIBE and case.verdict == SEEN_OR_GUESSED
        named = pocket.mentioned(case.truth)
        assert set(named) == scene.nouns and len(named) == len(scene.nouns)
        for said, opening in ((case.truth, case.verdict.positive), (case.tempting, case.verdict.negative)):
            assert pocket.is_caption(said.lower()) and said.lower().startswith(f"{opening} ")
    # The opening is what a caption says first of all: nothing asks for it.
    assert SEEN_OR_GUESSED == ("", "there", "maybe")


def test_a_tempting_caption_adds_the_missing_companions_and_nothing_else() -> None:
    cases = pocket.World(2).captions(60)
    for case in cases:
        tempting = pocket.mentioned(case.tempting)
        assert [noun for noun in tempting if noun not in case.missing] == pocket.mentioned(case.truth)
        assert len(tempting) == len(case.nouns) + len(case.missing) and not set(case.missing) & case.nouns
        assert set(case.missing) == {companion(noun) for noun in case.nouns} - case.nouns
        rest = case.truth.removeprefix("There is "), case.tempting.removeprefix("Maybe ")
        assert (rest[0] == rest[1]) == (not case.missing)
    assert 0.45 < np.mean([bool(case.missing) for case in cases]) < 0.75
    # Anchors are missed beside their partners as partners are beside their anchors.
    missed = {noun in PARTNERS for case in cases for noun in case.missing}
    assert missed == {True, False}


CROWD_OF_FOUR = ("table", "chair", "tree", "bird")


@pytest.mark.parametrize(
    ("noun", "present", "hard", "stands"),
    [
        ("chair", ("table",), False, "partner"),
        ("chair", ("table", "tree", "bird", "boat"), False, "partner"),  # before the crowd
        ("table", ("chair",), False, "anchor"),
        ("car", CROWD_OF_FOUR, False, "crowded"),
        ("car", CROWD_OF_FOUR[:3], False, "random"),  # three are no crowd
        ("boat", CROWD_OF_FOUR, False, "random"),  # not popular
        ("egg", ("table",), True, "random"),  # what is absent is not hard to see
        ("egg", ("egg", "table"), False, "rare"),
        ("egg", ("egg", "table"), True, "rare"),
        ("car", ("car",), True, "hard"),
        ("car", ("car", "sign"), False, "plain"),
    ],
)
def test_how_a_noun_stands_to_a_picture(noun: str, present: tuple[str, ...], hard: bool, stands: str) -> None:
    assert relation(noun, present, hard=hard) == stands
    assert relation(noun, frozenset(present), hard=hard) == stands


def test_popular_and_rare_nouns_are_the_two_ends_of_one_list() -> None:
    popular = company().popular
    assert sorted(popular) == sorted(NOUNS)
    assert {"car", "table"} <= set(popular[:POPULAR_NOUNS]) and "egg" in popular[-RARE_NOUNS:]
    assert len(NOUNS) >= POPULAR_NOUNS + RARE_NOUNS and len(CROWD_OF_FOUR) == CROWD


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: pocket.World(-1), "-1"),
        (lambda: pocket.World(True), "True"),
        (lambda: pocket.World(0).scene(-3), "-3"),
        (lambda: pocket.World(0).scene(0, "tests"), "Did you mean 'test'"),
        (lambda: pocket.World(0).questions(2, subsets=("randm",)), "got 'randm'.*Did you mean 'random'"),
        (lambda: pocket.World(0).questions(0, subsets=("random", "randm")), "got 'randm'.*Did you mean 'random'"),
        (lambda: pocket.World(0).questions(2, "tset"), "got 'tset'.*Did you mean 'test'"),
        (lambda: pocket.World(0).questions(0, "tset"), "got 'tset'.*Did you mean 'test'"),
        (lambda: pocket.World(0).questions(-1), "-1"),
        (lambda: pocket.World(0).captions(-4), "-4"),
        (lambda: pocket.World(0).captions(1, "tset"), "Did you mean 'test'"),
        (lambda: pocket.World(0).captions(0, "tset"), "model, train, validation, test; got 'tset'"),
        (lambda: pocket.World(0).partner("tabel"), "Did you mean 'table'"),
    ],
)
def test_bad_arguments_are_named(wrong, says: str) -> None:
    with pytest.raises(InputError, match=says):
        wrong()


def test_chair_counts_by_hand() -> None:
    said = ["There is a car, a dog.", "Maybe an egg.", "nothing here"]
    measured = pocket.chair(said, [frozenset({"car", "sign"}), frozenset({"egg"}), frozenset({"key"})])
    assert measured == pytest.approx({"chair_i": 1 / 3, "chair_s": 1 / 3, "recall": 2 / 4})
    with pytest.raises(InputError, match="as many truths"):
        pocket.chair(said, [])


def test_public_names_are_lazy_and_stay_functions() -> None:
    for name in pocket.__all__:
        first = getattr(pocket, name)
        # Tuples of words are written in capitals; whatever else is public is a function or a class.
        assert (isinstance(first, tuple) if name.isupper() else callable(first)) and getattr(pocket, name) is first
    with pytest.raises(AttributeError, match="no attribute 'sho'"):
        _ = pocket.sho


def test_an_object_can_be_left_out():
    world = pocket.World(0)
    whole = world.scene(3)
    gone = whole.objects[0]
    less = world.scene(3, without=gone.noun)
    assert less.nouns == whole.nouns - {gone.noun}
    x0, y0, x1, y1 = gone.box
    changed = (np.asarray(whole.image) != np.asarray(less.image)).any(-1)
    assert changed.any()
    assert changed[y0:y1, x0:x1].sum() == changed.sum()
    with pytest.raises(InputError, match="shows no 'spaceship' to leave out"):
        world.scene(3, without="spaceship")
