"""The same inputs in other words: does a steering that was fitted on one wording hold under another?

    x  ->  change(x),   picture, id and everything else as they were

A change is any callable text -> text; `CHANGES` names some that fit any question. Source of the question: steering
vectors under other prompts than those they were made from (arXiv 2407.12404, section 5).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Generic, TypeAlias, TypeVar

from PIL import Image

from steer_plugin.artefact import sha256
from steer_plugin.contrast import ContrastivePair
from steer_plugin.errors import InputError, nearest
from steer_plugin.evaluation.asking import Asked
from steer_plugin.evaluation.benchmark import Benchmark

Change: TypeAlias = Callable[[str], str]
A = TypeVar("A", bound=Asked)
T = TypeVar("T")


def typos(text: str) -> str:
    """Exchange two inner letters of every word of five letters or more, as a hasty writer does."""
    return re.sub(r"[A-Za-z]{5,}", lambda found: _slip(found.group()), text)


def _slip(word: str) -> str:
    middle = len(word) // 2
    return f"{word[: middle - 1]}{word[middle]}{word[middle - 1]}{word[middle + 1 :]}"


CHANGES: Mapping[str, Change] = MappingProxyType(
    {
        "polite": lambda text: f"I would be grateful for your help with this. {text}",
        "remark": lambda text: f"{text} Thank you, take your time.",
        "instruction": lambda text: f"Below is a task. Do what it says.\n\nTask: {text}",
        "quoted": lambda text: f'Somebody who sees this image says: "{text}" What do you reply?',
        "lower case": str.lower,
        "upper case": str.upper,
        "typos": typos,
    }
)


@dataclass(frozen=True)
class Reworded(Generic[A]):
    """An item asked in other words: same id and pictures, so that methods know it; a key of its own for its answer.

    Attributes:
        item: what it was made from.
        name: what the change is called.
        text: what is said now.
    """

    item: A
    name: str
    text: str

    @property
    def id(self) -> str:
        """The item's id."""
        return self.item.id

    @property
    def key(self) -> str:
        """The item's key, the change and the new text: answers to other wordings never collide."""
        return f"{self.item.key}|{self.name}|{self.text}"

    def load_images(self) -> Sequence[Image.Image]:
        """Open the item's pictures."""
        return self.item.load_images()


@dataclass(frozen=True)
class Restated:
    """An item in other words under its own id and key, so that its benchmark scores the answer as its own."""

    item: Asked
    text: str

    @property
    def id(self) -> str:
        """The item's id."""
        return self.item.id

    @property
    def key(self) -> str:
        """The item's key."""
        return self.item.key

    def load_images(self) -> Sequence[Image.Image]:
        """Open the item's pictures."""
        return self.item.load_images()


def changes(names: Sequence[str] | Mapping[str, Change] = tuple(CHANGES)) -> dict[str, Change]:
    """Return changes by name; a mapping brings its own callables.

    Raises:
        InputError: an unknown name, or none; says which are known.
    """
    if isinstance(names, Mapping):
        found = dict(names)
    else:
        if isinstance(names, str):
            raise InputError(f"changes are a list of names or a mapping name -> callable; write [{names!r}].")
        for name in names:
            if name not in CHANGES:
                raise InputError(
                    f"unknown change of wording {name!r}.{nearest(name, CHANGES)} Known: {', '.join(CHANGES)}. One of "
                    "your own goes into a mapping, as in {'shout': str.upper}."
                )
        found = {name: CHANGES[name] for name in names}
    if not found:
        raise InputError(f"got no change of wording; name at least one of {', '.join(CHANGES)}.")
    return found


def wordings(
    items: Sequence[A], names: Sequence[str] | Mapping[str, Change] = tuple(CHANGES)
) -> dict[str, list[Reworded[A]]]:
    """Return every item under every change, {name: items}; `names` lists some of `CHANGES`, or brings its own.

    Raises:
        InputError: an unknown name, or a change that returns no text.
    """
    return {
        name: [Reworded(item, name, _changed(item.text, item.id, name, change)) for item in items]
        for name, change in changes(names).items()
    }


def reworded_pairs(pairs: Sequence[ContrastivePair], change: str | Change) -> list[ContrastivePair]:
    """Return the pairs with their prompts changed, by a name of `CHANGES` or a callable; openings and suffixes stay.

    Raises:
        InputError: an unknown name, or a change that returns no text.
    """
    name, call = next(iter(changes([change] if isinstance(change, str) else {"your change": change}).items()))
    return [replace(pair, prompt=_changed(pair.prompt, pair.id, name, call)) for pair in pairs]


def reworded_benchmark(benchmark: Benchmark, change: str | Change) -> Benchmark:
    """Return a benchmark whose items are asked in other words, by a name of `CHANGES` or a callable.

    Metrics, training and pairs stay: what was fitted on the usual wording is tested on the new one. Answers of another
    wording are another job. The prompt baseline's own texts, where a benchmark has them for each item, stay too.

    Raises:
        InputError: an unknown name, or a change that returns no text.
    """
    name, call = next(iter(changes([change] if isinstance(change, str) else {"your change": change}).items()))
    made = copy(benchmark)
    made.items = [Restated(item, _changed(item.text, item.id, name, call)) for item in benchmark.items]
    digest = sha256("\n".join(item.text for item in made.items).encode())
    made.source = {**benchmark.source, "wording": name, "texts_sha256": digest}
    return made


def by_item(reworded: Sequence[Reworded[A]], answers: Mapping[str, T]) -> dict[str, T]:
    """Return answers by the keys of the items that were reworded, to be scored as theirs.

    Raises:
        InputError: an item without an answer.
    """
    for one in reworded:
        if one.key not in answers:
            raise InputError(f"there is no answer to {one.id!r} reworded as {one.name!r}; ask the same items first.")
    return {one.item.key: answers[one.key] for one in reworded}


def _changed(text: str, item: str, name: str, change: Change) -> str:
    made: object = change(text)
    if not isinstance(made, str) or not made.strip():
        raise InputError(f"the change {name!r} made {made!r} of the text of {item!r}: expected words to ask with.")
    return made
