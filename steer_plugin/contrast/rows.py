"""A training row of SteerVLM: a picture, a task, a target and a converse prompt, the answer in the target's spirit."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from steer_plugin.contrast.pair import Picture, load_picture
from steer_plugin.errors import InputError


@dataclass(frozen=True)
class SteeringRow:
    """One picture, what is asked about it, the prompt pair (p+, p-), and the answer that p+ asks for.

    `image` is a PIL image or a path, opened when asked for. Raises InputError for an empty id, task, prompt or answer.
    """

    id: str
    image: Picture
    task: str
    p_plus: str
    p_minus: str
    answer: str

    def __post_init__(self) -> None:
        for name in ("id", "task", "p_plus", "p_minus", "answer"):
            value: object = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise InputError(
                    f"Row {self.id!r}: {name} is {value!r}, expected a text that is not empty. Fill it in."
                )

    def load_image(self) -> Image.Image:
        """Open the image as RGB; raises InputError naming a path that is missing or no readable picture."""
        return load_picture(self.image, self.id)
