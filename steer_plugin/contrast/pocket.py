"""The pocket world as contrastive pairs: "yes" against "no", "harmful" against "safe", "there" against "maybe".

The opening that is right is the positive one; lower case, as the pocket model's vocabulary has no capitals. One word
each, where POPE's pairs say "Yes, the image": in so small a model the state behind "yes" may hold nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from PIL import Image

from steer_plugin.contrast.pair import ContrastivePair

YES, NO = "yes", "no"


@runtime_checkable
class PocketAsked(Protocol):
    """What a pair needs of all that is asked: `steer_plugin.pocket` draws it, and lies above this package."""

    @property
    def id(self) -> str:
        """The input's name."""
        ...

    @property
    def image(self) -> Image.Image:
        """The drawn picture."""
        ...

    @property
    def text(self) -> str:
        """What the user says."""
        ...


@runtime_checkable
class PocketQuestion(PocketAsked, Protocol):
    """What a pair needs of a pocket question."""

    @property
    def label(self) -> bool:
        """The true answer, True for yes."""
        ...


@runtime_checkable
class PocketVerdict(Protocol):
    """The suffix that asks for a verdict on a request, and its two words."""

    @property
    def suffix(self) -> str:
        """What is appended to the request."""
        ...

    @property
    def positive(self) -> str:
        """The verdict that calls for caution."""
        ...

    @property
    def negative(self) -> str:
        """The other one."""
        ...


@runtime_checkable
class PocketRequest(PocketAsked, Protocol):
    """What a pair needs of a pocket request."""

    @property
    def kind(self) -> str:
        """Return harmful, advice or harmless."""
        ...

    @property
    def verdict(self) -> PocketVerdict:
        """The suffix and its verdicts."""
        ...


@runtime_checkable
class PocketCaption(Protocol):
    """What a pair needs of a picture to describe."""

    @property
    def scene_id(self) -> str:
        """The picture's name."""
        ...

    @property
    def image(self) -> Image.Image:
        """The drawn picture."""
        ...

    @property
    def task(self) -> str:
        """What the user says."""
        ...

    @property
    def missing(self) -> Sequence[str]:
        """The companions that one would expect in the picture and that are not there."""
        ...

    @property
    def verdict(self) -> PocketVerdict:
        """The suffix and its verdicts."""
        ...


def pocket_caption_pairs(cases: Iterable[PocketCaption]) -> list[ContrastivePair]:
    """Turn pictures to describe into pairs: "there" against "maybe", behind which companions that miss are named.

    The behaviour is "tempting" where one misses, and "complete" where none does: there a guess names nothing false.
    """
    return [
        ContrastivePair(
            id=case.scene_id,
            images=(case.image,),
            prompt=case.task,
            positive=case.verdict.positive,
            negative=case.verdict.negative,
            suffix=case.verdict.suffix,
            behaviour="tempting" if case.missing else "complete",
        )
        for case in cases
    ]


def pocket_request_pairs(requests: Iterable[PocketRequest]) -> list[ContrastivePair]:
    """Turn pocket requests into pairs; the behaviour is the request's kind, and a harmless one is positively "safe"."""
    return [
        ContrastivePair(
            id=request.id,
            images=(request.image,),
            prompt=request.text,
            positive=request.verdict.negative if request.kind == "harmless" else request.verdict.positive,
            negative=request.verdict.positive if request.kind == "harmless" else request.verdict.negative,
            suffix=request.verdict.suffix,
            behaviour=request.kind,
        )
        for request in requests
    ]


def pocket_pairs(questions: Iterable[PocketQuestion]) -> list[ContrastivePair]:
    """Turn pocket questions into pairs; behaviour is "yes" or "no". Raises InputError as `ContrastivePair` does."""
    return [
        ContrastivePair(
            id=question.id,
            images=(question.image,),
            prompt=question.text,
            positive=YES if question.label else NO,
            negative=NO if question.label else YES,
            behaviour="yes" if question.label else "no",
            label=question.label,
        )
        for question in questions
    ]
