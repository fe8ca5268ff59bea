"""A contrastive pair: the same user turn X continued by two forced openings, z = h(X, T+) - h(X, T-).

The user turn is `prompt`, then `suffix`, which asks for the verdict; `positive` and `negative` open the assistant's
turn. The context of L2S is read from `prompt` alone, because at test time nobody appends the suffix.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

from PIL import Image

from steer_plugin.errors import InputError

Picture: TypeAlias = "Image.Image | Path"


@dataclass(frozen=True)
class ContrastivePair:
    """One picture (or several), one prompt, and the two openings of the answer.

    `images` are PIL images or paths, opened when asked for; `behaviour` names the group (for one mean vector per
    behaviour, or a loss averaged by class); `label` is the true yes/no answer where there is one.
    Raises InputError for an empty id, prompt or opening, for equal openings, and for an image of another type.
    """

    id: str
    images: tuple[Picture, ...]
    prompt: str
    positive: str
    negative: str
    suffix: str = ""
    behaviour: str = ""
    label: bool | None = None

    def __post_init__(self) -> None:
        for name in ("id", "prompt", "positive", "negative"):
            value: object = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise InputError(
                    f"Pair {self.id!r}: {name} is {value!r}, expected a text that is not empty. Fill it in."
                )
        if self.positive.strip() == self.negative.strip():
            raise InputError(
                f"Pair {self.id!r}: positive and negative are both {self.positive!r}, so their difference is zero. "
                "Give two openings that differ."
            )
        images: object = self.images
        if not isinstance(images, tuple):
            raise InputError(
                f"Pair {self.id!r}: images is {images!r}, expected a tuple. Write (image,) for a single one."
            )
        for image in cast("tuple[object, ...]", images):
            if not isinstance(image, (Image.Image, Path)):
                raise InputError(
                    f"Pair {self.id!r}: image {image!r} is neither a PIL image nor a Path. Open or wrap it."
                )

    @property
    def user_text(self) -> str:
        """The whole user turn: the prompt, a space and the suffix where there is one."""
        return f"{self.prompt.rstrip()} {self.suffix.strip()}" if self.suffix.strip() else self.prompt

    def load_images(self) -> tuple[Image.Image, ...]:
        """Open the images as RGB; raises InputError naming a path that is missing or no readable picture."""
        return tuple(load_picture(image, self.id) for image in self.images)


def require_file(path: Path, what: str) -> Path:
    """Return `path`; raises InputError naming it and `what` asked for it when there is no such file."""
    if not path.is_file():
        raise InputError(f"{what}: there is no image {path}. Check the folder of images and the file's name.")
    return path


def load_picture(image: Picture, pair: str) -> Image.Image:
    """Return the picture as RGB; raises InputError naming a path that is missing or no readable picture."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    require_file(image, f"Pair {pair!r}")
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"Pair {pair!r}: {image} cannot be read as a picture ({error}). "
            "Download it again or convert it to PNG or JPEG."
        ) from error
