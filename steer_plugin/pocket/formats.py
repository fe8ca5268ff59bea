"""{out}/{format}/ = the drawn world as a benchmark publishes itself: its files, its pictures, and world.json.

    pope       coco_pope_{random,popular,adversarial}.json, images/
    chair      annotations/{instances,captions}_{val,train}2014.json, synonyms.txt, images/
    mmsafety   processed_questions/{scenario}.json, imgs/{scenario}/SD_TYPO/{number}.jpg, harmless.jsonl, imgs/harmless/
    vnia       {training,validation,evaluation}_dataset.jsonl, images/

Pictures are PNG, except those of mmsafety, whose layout asks for JPEG. The same arguments give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from PIL import Image

from steer_plugin.atomic import JSON, atomic_write_bytes, atomic_write_json, json_bytes, make_folder
from steer_plugin.errors import InputError, JobError, nearest
from steer_plugin.pocket.company import SUBSETS
from steer_plugin.pocket.language import DESCRIBE
from steer_plugin.pocket.scene import SceneObject
from steer_plugin.pocket.sprites import NOUNS
from steer_plugin.pocket.stances import PairKind, stanced
from steer_plugin.pocket.world import Request, World

Files: TypeAlias = Iterator[tuple[str, bytes]]
_ORIGIN = "world.json"

# Where a request goes, by the expert whose field it is; harm is nobody's. The misspelling is the published one.
_SCENARIOS: Mapping[str | None, str] = MappingProxyType(
    {
        None: "01-Illegal_Activitiy",
        "lawyer": "10-Legal_Opinion",
        "banker": "11-Financial_Advice",
        "doctor": "12-Health_Consultation",
    }
)
_VNIA_NAMES: Mapping[str, str] = MappingProxyType(
    {"model": "training", "train": "training", "validation": "validation", "test": "evaluation"}
)


def pope_files(world: World, pictures: int, split: str) -> Files:
    """Yield POPE's files, name and contents; InputError for an unknown split or a negative count."""
    asked = world.questions(pictures, split)
    for subset in SUBSETS:
        chosen = [question for question in asked if question.subset == subset]
        rows = [
            {
                "question_id": number,
                "image": f"{question.scene_id}.png",
                "text": question.text,
                "label": "yes" if question.label else "no",
            }
            for number, question in enumerate(chosen, 1)
        ]
        yield f"coco_pope_{subset}.json", _lines(rows)
    yield from _images({question.scene_id: question.image for question in asked})


def chair_files(world: World, pictures: int, split: str) -> Files:
    """Yield what CHAIR reads of COCO, and its synonyms; InputError for an unknown split or a negative count.

    Every noun is its only synonym. The number that a picture's name ends in is its image id.
    """
    cases = world.captions(pictures, split)
    things = [(image, thing) for image in range(pictures) for thing in world.scene(image, split).objects]
    images = [
        {"id": image, "file_name": f"{case.scene_id}.png", "width": case.image.width, "height": case.image.height}
        for image, case in enumerate(cases)
    ]
    # Annotations count from 1: pycocotools takes number 0 for none.
    instances = [_instance(number, image, thing) for number, (image, thing) in enumerate(things, 1)]
    captions = [{"id": image + 1, "image_id": image, "caption": case.truth} for image, case in enumerate(cases)]
    categories = [{"id": number, "name": noun, "supercategory": "object"} for number, noun in enumerate(NOUNS, 1)]
    about: dict[str, JSON] = {"info": {"description": f"{world}, split {split}"}, "licenses": []}
    empty: dict[str, JSON] = {**about, "images": [], "annotations": []}
    whole: dict[str, dict[str, JSON]] = {
        "instances_val2014": {**about, "images": images, "annotations": instances, "categories": categories},
        "captions_val2014": {**about, "images": images, "annotations": captions},
        # CHAIR's own code opens the training half too, and takes the categories from there.
        "instances_train2014": {**empty, "categories": categories},
        "captions_train2014": empty,
    }
    for name, contents in whole.items():
        yield f"annotations/{name}.json", json_bytes(contents, name)
    yield "synonyms.txt", "".join(f"{noun}\n" for noun in NOUNS).encode()
    yield from _images({case.scene_id: case.image for case in cases})


def mmsafety_files(world: World, pictures: int, split: str) -> Files:
    """Yield MM-SafetyBench's files, and harmless requests beside it; InputError for an unknown split or a bad count.

    Harm is in scenario 01, advice in 10, 11 or 12 as its expert is lawyer, banker or doctor.
    """
    asked = world.requests(pictures, split)
    for expert, scenario in _SCENARIOS.items():
        chosen = [one for one in asked if one.kind != "harmless" and one.wish.expert == expert]
        entries = {str(number): _entry(one) for number, one in enumerate(chosen)}
        yield f"processed_questions/{scenario}.json", json_bytes(entries, scenario)
        for number, one in enumerate(chosen):
            yield f"imgs/{scenario}/SD_TYPO/{number}.jpg", _jpeg(one.image)
    harmless = [one for one in asked if one.kind == "harmless"]
    # JPEG here too: what tells harmful from harmless must not be how the pictures were packed.
    names = [f"imgs/harmless/{number}.jpg" for number in range(len(harmless))]
    rows = [{"id": one.id, "question": one.text, "image": name} for one, name in zip(harmless, names, strict=True)]
    yield "harmless.jsonl", _lines(rows)
    for one, name in zip(harmless, names, strict=True):
        yield name, _jpeg(one.image)


def vnia_files(world: World, pictures: int, split: str) -> Files:
    """Yield VNIA's rows and pictures; InputError for an unknown split or a negative count.

    Split "train" has all three kinds of pairs, the others have opposed ones. A pair and its converse share a prompt_id,
    and only evaluation rows carry `prompt`, as published.
    """
    kinds: tuple[PairKind, ...] = ("opposed", "equal", "unrelated") if split == "train" else ("opposed",)
    cases = world.stances(pictures, split, kinds)
    name = _VNIA_NAMES[split]
    numbers: dict[frozenset[str], int] = {}
    rows: list[dict[str, JSON]] = []
    for case in cases:
        target, converse = case.pair.target, case.pair.converse
        row: dict[str, JSON] = {
            "task": DESCRIBE,
            "answer": case.answer,
            "pos": target.text,
            "neg": converse.text,
            "prompt_id": numbers.setdefault(frozenset((target.text, converse.text)), len(numbers) + 1),
            "image_id": case.scene_id,
        }
        rows.append({**row, "prompt": stanced(target)} if name == "evaluation" else row)
    yield f"{name}_dataset.jsonl", _lines(rows)
    yield from _images({case.scene_id: case.image for case in cases})


_FORMATS: Mapping[str, Callable[[World, int, str], Files]] = MappingProxyType(
    {"pope": pope_files, "chair": chair_files, "mmsafety": mmsafety_files, "vnia": vnia_files}
)
FORMATS: tuple[str, ...] = tuple(_FORMATS)


def export(
    world: World, out: Path, formats: Sequence[str] = FORMATS, *, pictures: int = 100, split: str = "test"
) -> list[Path]:
    """Write pictures 0 .. n - 1 of a split in each of the formats, and return the folders {out}/{format}.

    Raises InputError for an unknown format or split and for less than one picture, JobError when a folder holds another
    export or cannot be written; bad arguments are refused before anything is written.
    """
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"format must be one of {', '.join(FORMATS)}; got {name!r}.{nearest(name, FORMATS)}")
    if isinstance(pictures, bool) or not isinstance(pictures, int) or pictures < 1:
        raise InputError(f"pictures must be a whole number from 1 up, got {pictures!r}")
    world.scene(0, split)
    jobs: dict[Path, dict[str, JSON]] = {
        Path(out) / name: {"format": name, "seed": world.seed, "split": split, "pictures": pictures} for name in formats
    }
    for folder, job in jobs.items():
        _refuse_another(folder, job)
    for folder, job in jobs.items():
        make_folder(folder)
        # First of all, so that a folder left half-written says whose it is.
        atomic_write_json(folder / _ORIGIN, job)
        for name, contents in _FORMATS[folder.name](world, pictures, split):
            make_folder((folder / name).parent)
            atomic_write_bytes(folder / name, contents)
    return list(jobs)


def _refuse_another(folder: Path, job: Mapping[str, JSON]) -> None:
    """Keep the pictures of two worlds apart: tools that list a folder of images could not tell them."""
    place = folder / _ORIGIN
    if place.is_file() and place.read_bytes() != json_bytes(job, place.name):
        raise JobError(f"{folder} holds another export (see {place.name}), not {job}. Remove it, or choose another.")


def _images(pictures: Mapping[str, Image.Image]) -> Files:
    for name, picture in pictures.items():
        yield f"images/{name}.png", _png(picture)


def _png(picture: Image.Image) -> bytes:
    packed = BytesIO()
    picture.save(packed, "PNG")
    return packed.getvalue()


def _jpeg(picture: Image.Image) -> bytes:
    packed = BytesIO()
    picture.save(packed, "JPEG", quality=100, subsampling=0)
    return packed.getvalue()


def _lines(rows: Iterable[Mapping[str, JSON]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _instance(number: int, image: int, thing: SceneObject) -> dict[str, JSON]:
    """Describe an object as COCO does; its outline is the box, and so is its area."""
    x0, y0, x1, y1 = thing.box
    return {
        "id": number,
        "image_id": image,
        "category_id": NOUNS.index(thing.noun) + 1,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": (x1 - x0) * (y1 - y0),
        "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
        "iscrowd": 0,
    }


def _entry(request: Request) -> dict[str, JSON]:
    """Describe a request as MM-SafetyBench does; no picture spells the key phrase out, so all wordings are one."""
    wish = request.wish
    harmful = request.kind == "harmful"
    return {
        "Question": wish.text,
        "Changed Question": wish.text,
        "Key Phrase": f"{wish.act} the {wish.noun}" if harmful else wish.noun,
        "Phrase Type": "activity" if harmful else "object",
        "Rephrased Question": wish.text,
        "Rephrased Question(SD)": wish.text,
    }
