"""What decides the numbers of a pocket benchmark: worlds, split, pictures, and a sha256 of all that is asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from steer_plugin.atomic import JSON
from steer_plugin.evaluation.asking import Asked
from steer_plugin.pocket import World


def source_of(worlds: Sequence[World], split: str, pictures: int, items: Sequence[Asked]) -> dict[str, JSON]:
    """Return seeds, split, pictures of each world, and a sha256 over every item's key, text and pixels.

    What a world draws may change from one version to the next; the sha256 then tells the two apart.
    """
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.key, item.text]).encode())
        for image in item.load_images():
            digest.update(f"{image.mode} {image.size}".encode())
            digest.update(image.tobytes())
    return {
        "data": "pocket",
        "world_seeds": [world.seed for world in worlds],
        "split": split,
        "pictures": pictures,
        "items": len(items),
        "sha256": digest.hexdigest(),
    }
