"""A prompt with its pictures, by name: what `vlm.collect` runs."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from steer_plugin.contrast.pair import Picture, load_picture
from steer_plugin.errors import InputError


@dataclass(frozen=True)
class Prompt:
    """One prompt and the pictures that it is about, PIL images or paths (opened when asked for).

    Raises InputError for an empty id or prompt.
    """

    id: str
    images: tuple[Picture, ...]
    prompt: str

    def __post_init__(self) -> None:
        """Refuse what cannot be asked."""
        for name in ("id", "prompt"):
            value: object = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise InputError(
                    f"Prompt {self.id!r}: {name} is {value!r}, expected a text that is not empty. Fill it in."
                )

    def load_images(self) -> tuple[Image.Image, ...]:
        """Open the pictures as RGB; raises InputError naming one that is missing or cannot be read."""
        return tuple(load_picture(image, self.id) for image in self.images)
