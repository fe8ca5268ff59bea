"""Objects in captions, by CHAIR's published rules (Rohrbach et al., arXiv 1809.02156): caption -> mentions.

    words -> singulars -> words that stand together read as one -> synonym -> canonical object

Unlike the authors' script, singulars come from `inflect` (there: pattern.en); names are trimmed and compared in lower
case (there "motor bike", "cheesecake" and "iPhone" match nothing); names of three words are read as one, and a slash
parts words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from types import MappingProxyType

from steer_plugin.errors import FrameworkError, InputError, nearest

_PUBLISHED = "The CHAIR authors publish theirs as data/synonyms.txt in github.com/LisaAnne/Hallucination."

# Words that stand together for another word, or for no object: a baby bird is a bird and no person.
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
_TOGETHER: Mapping[tuple[str, ...], str] = MappingProxyType(
    {
        **{(age, animal): animal for age, animal in product(("baby", "adult"), _ANIMALS)},
        **{("passenger", vehicle): vehicle for vehicle in ("jet", "train")},
        ("bow", "tie"): "tie",
        ("toilet", "seat"): "toilet",
        ("home", "plate"): "",
        ("train", "track"): "",
    }
)
# Words that name nothing in a caption that has the other: the seat of a toilet is no chair.
_SILENT_BESIDE: Mapping[str, str] = MappingProxyType({"seat": "toilet"})

# A word, hyphens included ("cat-shaped" is no cat), or one mark: marks keep "a hot, dog" from being a hot dog.
_TOKEN = re.compile(r"\w+(?:-\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Mention:
    """One mention: the canonical object, the synonym it was read as, and caption[start:end], its place."""

    name: str
    word: str
    start: int
    end: int


@dataclass(frozen=True)
class Synonyms:
    """What captions may call the objects; `names` maps every name, in lower case, to its canonical one."""

    names: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> Synonyms:
        """Read a file with one object per line: its names, comma-separated, the canonical one first.

        Raises InputError for a missing, unreadable or empty file, an empty name, and a name that two objects share.
        """
        names: dict[str, str] = {}
        for number, line in enumerate(_text(Path(path)).splitlines(), 1):
            listed = [" ".join(name.lower().split()) for name in line.split(",")] if line.strip() else []
            for name in listed:
                if not name or names.setdefault(name, listed[0]) != listed[0]:
                    fault = f"{name!r} is a name of {names[name]!r} too" if name else "a name is empty"
                    raise InputError(f"{path}, line {number}: {fault}. Give each name to one object.")
        if not names:
            raise InputError(f"{path} has no synonyms: expected one object per line. {_PUBLISHED}")
        return cls(names)

    def canonical(self, name: str, where: str = "objects") -> str:
        """Return the object that a name stands for; raises InputError, opening with `where`, for an unknown one."""
        found = self.names.get(" ".join(name.lower().split()))
        if found is None:
            raise InputError(f"{where}: {name!r} is not among the synonyms.{nearest(name, self.names)} Add it there.")
        return found

    def singular(self, word: str) -> str:
        """Return the singular of a word in lower case; words of the list stay as they are ("skis", "people")."""
        return word if word in self._vocabulary or not word[0].isalpha() else _singular(word)

    @cached_property
    def together(self) -> Mapping[str, Mapping[tuple[str, ...], str]]:
        """By their first word, the words that are read as one, longest first; names of the list go before rules."""
        own = {words: name for name in self.names if len(words := tuple(_TOKEN.findall(name))) > 1}
        found: dict[str, dict[tuple[str, ...], str]] = {}
        for words, meaning in sorted({**_TOGETHER, **own}.items(), key=lambda entry: -len(entry[0])):
            found.setdefault(words[0], {})[words] = meaning
        return found

    @cached_property
    def _vocabulary(self) -> frozenset[str]:
        return frozenset(word for name in self.names for word in _TOKEN.findall(name))


def objects_in(caption: str, synonyms: Synonyms) -> list[Mention]:
    """List the mentions of objects in text order, repeats included.

    Raises InputError when the caption is no text, FrameworkError when `inflect` is not installed.
    """
    if not isinstance(caption, str):
        raise InputError(f"A caption is {caption!r}, expected a text. Give '' where the model said nothing.")
    # Asked first, so that what is missing shows at the first caption and not at its first plural.
    _singulars()
    tokens = list(_TOKEN.finditer(caption))
    words = [synonyms.singular(token.group().lower()) for token in tokens]
    spans = list(_spans(words, synonyms))
    said = {word for word, _, _ in spans}
    return [
        Mention(synonyms.names[word], word, tokens[first].start(), tokens[last].end())
        for word, first, last in spans
        if word in synonyms.names and _SILENT_BESIDE.get(word) not in said
    ]


def _spans(words: Sequence[str], synonyms: Synonyms) -> Iterator[tuple[str, int, int]]:
    """Yield what stands in the text, words that belong together as one, with its first and last word's number."""
    at = 0
    while at < len(words):
        candidates = synonyms.together.get(words[at], {})
        whole = next((key for key in candidates if tuple(words[at : at + len(key)]) == key), None)
        length = len(whole) if whole else 1
        yield (candidates[whole] if whole else words[at]), at, at + length - 1
        at += length


def _text(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"There is no file of synonyms {path}. {_PUBLISHED}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from error


@cache
def _singular(word: str) -> str:
    found = _singulars()(word)
    return found if isinstance(found, str) and found else word


@cache
def _singulars() -> Callable[[str], str | bool]:
    try:
        import inflect
    except ImportError as error:
        raise FrameworkError("CHAIR needs inflect for its singulars: pip install 'steer-plugin[eval]'.") from error
    return inflect.engine().singular_noun
