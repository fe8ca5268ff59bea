"""What the benchmarks share: a question on a picture, splits by picture, digests of files, scores of judges, NaN rows.

    order of the pictures = sorted by sha256("{seed}:{picture}")     [ fitting | validation | test ]

So the split depends on nothing but the seed and the names of the pictures: not on the order of files, nor on the
version of a library, and a picture's place in the order does not change when others are added.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from PIL import Image

from steer_plugin.artefact import sha256
from steer_plugin.atomic import JSON
from steer_plugin.contrast.pair import Picture, load_picture
from steer_plugin.errors import InputError
from steer_plugin.evaluation.asking import Asked
from steer_plugin.evaluation.benchmark import Verdicts
from steer_plugin.evaluation.judges import Judge

FITTING, VALIDATION = 0.4, 0.25
Scale: TypeAlias = tuple[float, float]


@dataclass(frozen=True)
class Question:
    """One text on one picture; every item is asked for itself, as its steering may be its own.

    Attributes:
        id: the item's.
        text: what the user says.
        pictures: PIL images or paths.
        group: the picture, for clustered intervals.
    """

    id: str
    text: str
    pictures: tuple[Picture, ...]
    group: str

    @property
    def key(self) -> str:
        """Identity of what is asked."""
        return f"{self.id}|{self.text}"

    def load_images(self) -> Sequence[Image.Image]:
        """Open the pictures; raises InputError for one that is missing or cannot be read."""
        return [load_picture(picture, self.id) for picture in self.pictures]


@dataclass(frozen=True)
class Split:
    """Which pictures are fitted on, chosen on and tested on; no picture is in two of them."""

    fitting: frozenset[str]
    validation: frozenset[str]
    test: frozenset[str]

    def __or__(self, other: Split) -> Split:
        return Split(self.fitting | other.fitting, self.validation | other.validation, self.test | other.test)

    def counts(self) -> dict[str, JSON]:
        """Return the number of pictures in each part."""
        return {"fitting": len(self.fitting), "validation": len(self.validation), "test": len(self.test)}


def split_pictures(
    pictures: Iterable[str], fitting: float | int, validation: float | int, seed: int, prefix: str = ""
) -> Split:
    """Split pictures: the share `fitting` is not tested on, and of it the share `validation` is not fitted on either.

    `fitting` 0 tests on all; `prefix` opens every name and counts for nothing, so that one picture under two prefixes
    lands in the same part. Raises InputError for a share outside [0, 1), and a part that would be left empty.
    """
    for name, share in (("fitting", fitting), ("validation", validation)):
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise InputError(f"{name} is {share!r}: expected a share from 0 (none) up to below 1, such as 0.4.")
    order = [prefix + name for name in shuffled((picture.removeprefix(prefix) for picture in pictures), seed)]
    kept = round(fitting * len(order))
    held = round(validation * kept)
    parts = order[held:kept], order[:held], order[kept:]
    for name, part, wanted in zip(("fitting", "validation", "test"), parts, (kept, validation * kept, 1), strict=True):
        if (wanted or (fitting and name == "fitting")) and not part:
            raise InputError(
                f"{len(order)} pictures with fitting={fitting} and validation={validation} leave none for {name}: "
                "give more pictures, other shares, or fitting=0 to test on all and fit nothing."
            )
    return Split(*map(frozenset, parts))


def shuffled(names: Iterable[str], seed: int) -> list[str]:
    """Return each name once, in an order that the seed and the names alone decide."""
    return sorted(set(names), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())


def require_folder(folder: Path, what: str) -> Path:
    """Return `folder`; raises InputError that ends with `what` when there is none."""
    if not Path(folder).is_dir():
        raise InputError(f"There is no folder {folder}. {what}")
    return Path(folder)


def picture_folder(data: Path, images: Path | None, published: str) -> Path:
    """Return the folder of pictures, {data}/images where none is given; raises InputError when it is not there."""
    return require_folder(data / "images" if images is None else images, f"Give the pictures' folder. {published}")


def digests(files: Iterable[Path]) -> dict[str, JSON]:
    """Return {name: SHA-256} of files; names without folders, as a moved benchmark is the same one."""
    found: dict[str, JSON] = {}
    for path in files:
        # COCO's annotations are hundreds of megabytes: read piece by piece.
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def digest_of(rows: Sequence[JSON]) -> str:
    """SHA-256 of something that JSON can hold."""
    return sha256(json.dumps(rows, sort_keys=True).encode())


def digest_of_pictures(pictures: Iterable[Picture]) -> str:
    """SHA-256 of the pictures' names and sizes in bytes (of the pixels, where they are in memory)."""
    known = {
        f"{picture.name} {picture.stat().st_size}" if isinstance(picture, Path) else sha256(picture.tobytes())
        for picture in pictures
    }
    return digest_of(sorted(known))


def answered(name: str, items: Sequence[Asked], texts: Mapping[str, str]) -> list[str]:
    """Return the answer to each item; raises InputError naming the first one without."""
    for item in items:
        if item.key not in texts:
            raise InputError(f"{name}: {item.id!r} ({item.text!r}) has no answer. Answer every item before scoring.")
    return [texts[item.key] for item in items]


def unique(name: str, ids: Sequence[str]) -> None:
    """Raise InputError for no items, or for an id that stands for two."""
    if not ids:
        raise InputError(f"{name} has no items: expected at least one.")
    seen: set[str] = set()
    for one in ids:
        if one in seen:
            raise InputError(f"{name}: the id {one!r} comes twice. Give each item an id of its own.")
        seen.add(one)


def scale_of(judge: Judge, usual: Scale, given: tuple[float | int, float | int] | None = None) -> Scale:
    """Return the least and the greatest score: those given, else what the judge's settings call "scale", else `usual`.

    Raises InputError for an empty scale.
    """
    known: object = judge.settings().get("scale", usual) if given is None else given
    if isinstance(known, Sequence) and len(known) == 2 and not isinstance(known, str):
        low, high = known[0], known[1]
        if isinstance(low, (int, float)) and isinstance(high, (int, float)) and low < high:
            return float(low), float(high)
    raise InputError(f"scale is {known!r}: expected the judge's least and greatest score, such as (0, 10).")


def judged_scores(
    name: str, judge: str, items: Sequence[Asked], verdicts: Verdicts, scale: Scale, mend: str
) -> Float[np.ndarray, " item"]:
    """Return a judge's scores, NaN where it said no number.

    Raises InputError unless there is a verdict on each item, and for a score outside the scale: it ends with `mend`.
    """
    found = np.asarray([one.score for one in verdicts.get(judge, ())], dtype=np.float64)
    if len(found) != len(items):
        raise InputError(f"{name} got {len(found)} verdicts of {judge!r} on {len(items)} items: expected one on each.")
    low, high = scale
    odd = np.flatnonzero((found < low) | (found > high))
    if odd.size:
        raise InputError(
            f"{name}: {judge!r} gave {items[odd[0]].id!r} the score {found[odd[0]]:g}, outside its scale "
            f"{low:g}..{high:g}. {mend}"
        )
    return found


def only(asked: Bool[np.ndarray, " item"], *columns: ArrayLike) -> Float[np.ndarray, "item column"]:
    """Columns side by side, with NaN in the rows of items that are not asked about."""
    rows = np.stack([np.asarray(one, dtype=np.float64) for one in columns], axis=1)
    rows[~asked] = np.nan
    return rows
