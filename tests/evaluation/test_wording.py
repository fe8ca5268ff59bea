"""Other wordings: the same inputs under the same ids, keys that never collide, answers that find their way back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _colours import TOKENS, Colours, plain_answer
from _steerings import attached
from _tiny import tiny_llava, tiny_processor
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import steer_plugin as sp
from steer_plugin.contrast import ContrastivePair
from steer_plugin.errors import InputError, JobError
from steer_plugin.evaluation.asking import Asked, Method, answers
from steer_plugin.evaluation.lineup import Entry
from steer_plugin.evaluation.runner import Runner
from steer_plugin.evaluation.wording import (
    CHANGES,
    by_item,
    changes,
    reworded_benchmark,
    reworded_pairs,
    typos,
    wordings,
)

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


@dataclass(frozen=True)
class Item:
    id: str
    text: str

    @property
    def key(self) -> str:
        return f"{self.id}|{self.text}"

    def load_images(self) -> list[Image.Image]:
        return [PICTURE]


ITEMS = [Item("a", "w20 w21"), Item("b", "w30 w31 w32")]


def test_every_item_under_every_change() -> None:
    found = wordings(ITEMS)
    assert list(found) == list(CHANGES)
    for name, items in found.items():
        for one, item in zip(items, ITEMS, strict=True):
            assert isinstance(one, Asked) and one.id == item.id and one.item is item
            assert one.text == CHANGES[name](item.text) and one.load_images() == [PICTURE]
    keys = [one.key for items in found.values() for one in items] + [item.key for item in ITEMS]
    assert len(set(keys)) == len(keys)


def test_named_changes_by_hand() -> None:
    asked = "Is there a Chair in the image?"
    said = {name: change(asked) for name, change in CHANGES.items()}
    assert said["lower case"] == "is there a chair in the image?"
    assert said["upper case"] == "IS THERE A CHAIR IN THE IMAGE?"
    assert said["typos"] == "Is tehre a Cahir in the iamge?"
    for name in ("polite", "remark", "instruction", "quoted"):
        assert asked in said[name] and said[name] != asked
    assert len(set(said.values())) == len(said)


@given(st.text(max_size=60))
def test_typos_keep_the_letters(text: str) -> None:
    found = typos(text)
    assert sorted(found) == sorted(text) and found.split(" ") != [] and len(found.split()) == len(text.split())
    assert typos("a bcd, efg!") == "a bcd, efg!"


def test_own_changes_and_one_name_for_two() -> None:
    own = wordings(ITEMS, {"shout": str.upper})["shout"]
    assert [one.text for one in own] == ["W20 W21", "W30 W31 W32"]
    other = wordings(ITEMS, {"shout": lambda text: f"{text} w60"})["shout"]
    assert {one.key for one in own}.isdisjoint(one.key for one in other)
    assert list(changes(["typos", "polite"])) == ["typos", "polite"]


def test_answers_come_back_under_the_items_keys() -> None:
    vlm: Any = attached("torch", tiny_llava())
    found = wordings(ITEMS, {"longer": lambda text: f"{text} w60 w61 w62", "as it is": lambda text: text})
    asked = [one for items in found.values() for one in items]
    said = answers(vlm, asked, Method("none"), max_new_tokens=4, progress=False)
    plain = answers(vlm, ITEMS, Method("none"), max_new_tokens=4, progress=False)
    assert len(said) == 4 and by_item(found["as it is"], said) == plain
    assert by_item(found["longer"], said).keys() == plain.keys()
    with pytest.raises(InputError, match="no answer to 'a' reworded as 'longer'"):
        by_item(found["longer"], plain)


def test_pairs() -> None:
    pair = ContrastivePair("a", (PICTURE,), "w20 w21", "w10", "w11", "w60", "yes", True)
    for change in ("upper case", str.upper):
        (found,) = reworded_pairs([pair], change)
        assert (found.prompt, found.user_text) == ("W20 W21", "W20 W21 w60")
        assert (found.id, found.images, found.positive, found.label) == ("a", (PICTURE,), "w10", True)


def test_bad_input() -> None:
    pair = ContrastivePair("a", (PICTURE,), "w20", "w10", "w11")
    for call, message in (
        (lambda: wordings(ITEMS, ["polit"]), r"'polit'. Did you mean 'polite'\? Known: polite, remark"),
        (lambda: wordings(ITEMS, "polite"), r"write \['polite'\]"),
        (lambda: wordings(ITEMS, []), "no change of wording"),
        (lambda: wordings(ITEMS, {"gone": lambda text: " "}), "'gone' made ' ' of the text of 'a'"),
        (lambda: wordings(ITEMS, {"none": lambda text: None}), "'none' made None"),  # type: ignore[dict-item]
        (lambda: reworded_pairs([pair], "polit"), "Did you mean 'polite'"),
        (lambda: reworded_pairs([pair], lambda text: ""), "'your change' made ''"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_a_benchmark_in_other_words_asks_them_and_scores_as_before(tmp_path: Path) -> None:
    """What reaches the model are the changed words; keys, metrics and training are the benchmark's own."""
    usual = Colours(range(4))
    other = reworded_benchmark(usual, lambda text: f"{text} w44 w45")
    assert [item.key for item in other.items] == [item.key for item in usual.items]
    assert other.training is usual.training
    vlm, method = sp.attach(tiny_llava(), tiny_processor()), Method("none")
    asked = answers(vlm, other.items, method, max_new_tokens=TOKENS, progress=False)
    assert asked == {ask.key: plain_answer(ask, text=f"{ask.text} w44 w45") for ask in usual.asks}
    # Two wordings are two jobs: one folder cannot mix them.
    entries = [Entry("none", ((0, method),))]
    Runner(vlm, usual, tmp_path, costed=0, progress=False).run(entries)
    with pytest.raises(JobError, match="another job"):
        Runner(vlm, other, tmp_path, costed=0, progress=False).run(entries)
    assert "wording" not in usual.source
    assert other.source["wording"] == "your change"


def test_a_benchmark_takes_named_changes_and_refuses_unknown_ones() -> None:
    usual = Colours(range(2))
    assert reworded_benchmark(usual, "polite").items[0].text == CHANGES["polite"](usual.items[0].text)
    with pytest.raises(InputError, match="unknown change of wording 'polit'"):
        reworded_benchmark(usual, "polit")
