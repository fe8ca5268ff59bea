"""The tokens of a batch as a figure names them: words, classes, and the pictures that image tokens lie on.

class of a token = image | user_end | last_prompt | completion | text, the first of these that holds
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PretrainedConfig, ProcessorMixin

from steer_plugin.adapters import AttachedModel
from steer_plugin.analysis.pictures import plot_positions
from steer_plugin.errors import InputError
from steer_plugin.layout import TokenLayout
from steer_plugin.pictures import Pictures
from steer_plugin.positions import Positions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = object  # imported when needed; run-time type checkers look these names up

# Which tokens a table has a line for: expressions, or by name expressions and masks of the user's own.
Parts: TypeAlias = Sequence[Positions | str] | Mapping[str, "Positions | str | Bool[Tensor, 'row pos']"]
PARTS: Mapping[str, str] = MappingProxyType(
    {"image": "image", "other prompt": "prompt & ~image & ~last_prompt", "last_prompt": "last_prompt"}
)


def masks_of(layout: TokenLayout, parts: Parts) -> dict[str, Bool[Tensor, "row pos"]]:
    """Return a mask for each part; padding is in none of them.

    Raises:
        InputError: no parts, a mask of another shape, or a row without a token of some part.
        PositionError: unknown names.
    """
    named = parts if isinstance(parts, Mapping) else {str(part): part for part in parts}
    if not named:
        raise InputError(f"name at least one part of the prompt, such as {', '.join(map(repr, PARTS))}.")
    found: dict[str, Bool[Tensor, "row pos"]] = {}
    for name, part in named.items():
        mask = part if isinstance(part, Tensor) else Positions.parse(part).mask(layout)
        if tuple(mask.shape) != layout.shape:
            raise InputError(f"the mask of {name!r} has shape {tuple(mask.shape)}, the batch has {layout.shape}.")
        found[name] = mask & layout.real
        empty = ~found[name].any(1)
        if bool(empty.any()):
            raise InputError(
                f"the part {name!r} has no token in row {int(empty.nonzero()[0])}; name a part that every prompt has, "
                "or leave such prompts out."
            )
    return found


@dataclass(frozen=True, repr=False)
class Tokens:
    """Words and classes of a batch, and what is needed to draw on its pictures.

    Attributes:
        layout: token classes as masks.
        words: (row, pos) the tokens as text.
        classes: (row, pos) class of each token, "padding" included.
    """

    layout: TokenLayout
    words: list[list[str]]
    classes: list[list[str]]
    config: PretrainedConfig
    inputs: Mapping[str, Tensor]
    processor: ProcessorMixin | None

    @classmethod
    def of(cls, vlm: AttachedModel, inputs: Mapping[str, Tensor]) -> Tokens:
        """Read the tokens of a batch.

        Raises:
            InputError: no input_ids.
        """
        layout = vlm.layout(inputs)
        ids = inputs["input_ids"].tolist()
        tokenizer = getattr(vlm.processor, "tokenizer", None)
        words = [
            [str(i) for i in row] if tokenizer is None else cast("list[str]", tokenizer.convert_ids_to_tokens(row))
            for row in ids
        ]
        config = cast("PretrainedConfig", vlm.root.config)
        return cls(layout, words, _classes(layout), config, dict(inputs), vlm.processor)

    def columns(self, row: int) -> list[int]:
        """Columns of a row's tokens, padding left out.

        Raises:
            InputError: no such row.
        """
        if not 0 <= row < len(self.words):
            raise InputError(f"the batch has rows 0 to {len(self.words) - 1}, got {row}.")
        return [column for column, name in enumerate(self.classes[row]) if name != "padding"]

    def label(self, axes: Axes, row: int) -> None:
        """Write the tokens below the columns of a heat map; runs of image tokens share one label."""
        columns = self.columns(row)
        at: list[float] = []
        texts: list[str] = []
        place = 0
        for image, run in groupby(columns, key=lambda column: self.classes[row][column] == "image"):
            here = list(run)
            if image:
                at.append(place + (len(here) - 1) / 2)
                texts.append(f"image ({len(here)})")
            else:
                at += range(place, place + len(here))
                texts += [self.words[row][column].replace("▁", " ").strip() or "·" for column in here]
            if place:
                axes.axvline(place - 0.5, color="white", linewidth=1)
            place += len(here)
        axes.set_xticks(at, texts, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)

    def draw_on(self, pictures: Pictures, values: Float[Tensor, "row pos"], label: str, row: int = 0) -> Figure:
        """Draw one value per token on the pictures of a row; tokens of text are left out.

        Raises:
            InputError: a row without pictures, or what `plot_positions` refuses.
        """
        self.columns(row)
        image = self.layout.image
        if image is None or not bool(image[row].any()):
            raise InputError(f"row {row} has no image tokens to draw on.")
        chosen = torch.as_tensor(values)[row].cpu()[image[row].cpu()]
        return plot_positions(
            self.config, self.inputs, pictures, values=chosen, label=label, row=row, processor=self.processor
        )


def _classes(layout: TokenLayout) -> list[list[str]]:
    """Class of each token, the most telling one."""
    out = [["padding"] * layout.shape[1] for _ in range(layout.shape[0])]
    named = ["everywhere", "completion", "last_prompt"]
    if not bool((layout.header < 0).any()):
        named.append("user_end")
    if layout.image is not None:
        named.append("image")
    for name in named:
        for row, column in layout.named(name).nonzero().tolist():
            # Where a chat has no header, the user's turn ends with the prompt: last_prompt says more.
            if name != "user_end" or out[row][column] != "last_prompt":
                out[row][column] = "text" if name == "everywhere" else name
    return out
