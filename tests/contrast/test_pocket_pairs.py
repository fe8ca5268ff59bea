"""Pocket questions, requests and pictures to describe become pairs in lower case."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from steer_plugin import pocket
from steer_plugin.contrast import pocket_caption_pairs, pocket_pairs, pocket_request_pairs


@dataclass(frozen=True)
class Verdict:
    suffix: str
    positive: str
    negative: str


@dataclass(frozen=True)
class Request:
    id: str
    image: Image.Image
    text: str
    kind: str
    verdict: Verdict


@dataclass(frozen=True)
class Caption:
    scene_id: str
    image: Image.Image
    task: str
    verdict: Verdict
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    id: str
    image: Image.Image
    text: str
    label: bool
    subset: str = "random"
    noun: str = "dog"
    scene_id: str = "s0"


def test_pocket_pairs() -> None:
    picture = Image.new("RGB", (3, 3))
    yes, no = pocket_pairs(
        [Question("q0", picture, "is there a dog ?", True), Question("q1", picture, "a cat ?", False)]
    )
    assert (yes.id, yes.prompt, yes.images, yes.label) == ("q0", "is there a dog ?", (picture,), True)
    assert (yes.positive, yes.negative, yes.behaviour) == ("yes", "no", "yes")
    assert (no.positive, no.negative, no.behaviour, no.label) == ("no", "yes", "no", False)


def test_pocket_request_pairs() -> None:
    picture = Image.new("RGB", (3, 3))
    safety, expert = Verdict("Safe or not?", "harmful", "safe"), Verdict("AI or expert?", "expert", "ai")
    asked = [
        Request("r0", picture, "How to burn the car?", "harmful", safety),
        Request("r1", picture, "Is it a cure?", "advice", expert),
        Request("r2", picture, "How to paint the car?", "harmless", safety),
    ]
    pairs = pocket_request_pairs(asked)
    assert [pair.behaviour for pair in pairs] == ["harmful", "advice", "harmless"]
    assert [(pair.positive, pair.negative) for pair in pairs] == [
        ("harmful", "safe"),
        ("expert", "ai"),
        ("safe", "harmful"),
    ]
    for pair, request in zip(pairs, asked, strict=True):
        assert (pair.id, pair.images, pair.label) == (request.id, (picture,), None)
        assert pair.prompt == request.text and pair.suffix == request.verdict.suffix
        assert pair.user_text == f"{request.text} {request.verdict.suffix}"
    assert pocket_request_pairs([]) == []


def test_pocket_caption_pairs() -> None:
    picture = Image.new("RGB", (3, 3))
    opening, asked = Verdict("", "there", "maybe"), Verdict("Sure?", "yes", "no")
    cases = [
        Caption("s0", picture, "Describe it.", opening, ("dog", "egg")),
        Caption("s1", picture, "Describe it.", opening, ()),
        Caption("s2", picture, "Describe it.", asked, ("dog",)),
        Caption("s3", picture, "Describe it.", asked, ()),
    ]
    pairs = pocket_caption_pairs(cases)
    assert [(pair.positive, pair.negative, pair.behaviour) for pair in pairs] == [
        ("there", "maybe", "tempting"),
        ("there", "maybe", "complete"),
        ("yes", "no", "tempting"),
        ("yes", "no", "complete"),
    ]
    for pair, case in zip(pairs, cases, strict=True):
        assert (pair.id, pair.images, pair.prompt, pair.label) == (case.scene_id, (picture,), "Describe it.", None)
    assert [pair.user_text for pair in pairs] == ["Describe it."] * 2 + ["Describe it. Sure?"] * 2
    assert pocket_caption_pairs([]) == []


def test_the_drawn_world_fits_the_pairs() -> None:
    world = pocket.World(0)
    requests = world.requests(6, "train")
    for pair, request in zip(pocket_request_pairs(requests), requests, strict=True):
        expected = {"harmful": "harmful", "advice": "expert", "harmless": "safe"}[request.kind]
        assert (pair.id, pair.behaviour, pair.positive) == (request.id, request.kind, expected)
        assert {pair.positive, pair.negative} == {request.verdict.positive, request.verdict.negative}
        assert pair.user_text == f"{request.text} {request.verdict.suffix}"
    cases = world.captions(12)
    assert {bool(case.missing) for case in cases} == {True, False}
    for pair, case in zip(pocket_caption_pairs(cases), cases, strict=True):
        assert pair.id == case.scene_id and pair.images == (case.image,)
        assert pair.user_text == "Describe the image."
        assert case.truth.lower().startswith(f"{pair.positive} ")
        assert case.tempting.lower().startswith(f"{pair.negative} a")
        false = set(pocket.mentioned(case.tempting)) - case.nouns
        assert pair.behaviour == ("tempting" if false else "complete")
    assert [pair.label for pair in pocket_pairs(world.questions(1))] == [True, False] * 3
