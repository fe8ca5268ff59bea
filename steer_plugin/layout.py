"""What each token of a batch is: boolean masks of shape (row, pos), padding False in all of them.

prompt = everything up to and with last_prompt;  completion = what follows it in the same forward;
generated = what is fed back while decoding (columns behind the prompt forward).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from steer_plugin.errors import InputError, PositionError


@dataclass(frozen=True)
class TokenLayout:
    """Token classes of one batch of prompts (one prompt forward).

    Attributes:
        real: (row, pos) tokens that are not padding.
        image: (row, pos) image tokens, or None when the forward gave no token ids.
        last: (row,) column of the last prompt token: the one that decides the first answer token.
        header: (row,) number of tokens of the assistant header that ends at `last`; -1 where none was found.
    """

    real: Bool[Tensor, "row pos"]
    image: Bool[Tensor, "row pos"] | None
    last: Int[Tensor, " row"]
    header: Int[Tensor, " row"]

    @classmethod
    def of(
        cls,
        input_ids: Int[Tensor, "row pos"] | None,
        real: Bool[Tensor, "row pos"],
        image_token_id: int | None = None,
        headers: Sequence[Sequence[int]] | None = (),
        completion_tokens: int | Sequence[int] | None = None,
    ) -> TokenLayout:
        """Classify the tokens of a prompt forward.

        Args:
            input_ids: token ids, image tokens already expanded; None when embeddings were given.
            real: True where the attention mask is.
            image_token_id: id that marks a picture patch.
            headers: token id sequences that open the assistant turn; the last one found ends the prompt. None: this
                chat has no such header, the user's turn ends with the prompt.
            completion_tokens: how many trailing tokens of each row are a forced completion (overrides `headers`).

        Raises:
            InputError: an empty row, or more completion tokens than the row has tokens.
        """
        lengths = real.sum(-1)
        if bool((lengths == 0).any()):
            row = int((lengths == 0).nonzero()[0])
            raise InputError(f"row {row} of the batch has no token: its attention_mask is all zero.")
        columns = torch.arange(real.shape[1], device=real.device)
        final = torch.where(real, columns, -1).amax(-1)
        image = None if input_ids is None or image_token_id is None else (input_ids == image_token_id) & real
        header = torch.full_like(final, 0 if headers is None else -1)
        last = final.clone()
        if completion_tokens is not None:
            forced = torch.as_tensor(completion_tokens, device=real.device)
            if forced.ndim and forced.shape[0] != final.shape[0]:
                raise InputError(
                    f"completion_tokens has {forced.shape[0]} numbers for {final.shape[0]} rows; give one, "
                    "or one per row."
                )
            forced = forced.expand(final.shape[0])
            if bool(((forced < 0) | (forced >= lengths)).any()):
                raise InputError(
                    f"completion_tokens {forced.tolist()} must lie between 0 and the tokens of each row less one "
                    f"({(lengths - 1).tolist()})."
                )
            last = final - forced
        if input_ids is not None and headers:
            ids, fin = input_ids.tolist(), final.tolist()
            for row, tokens in enumerate(ids):
                limit = int(last[row]) if completion_tokens is not None else fin[row]
                end, length = _find_header(tokens, limit, headers, anchored=completion_tokens is not None)
                if length:
                    last[row], header[row] = end, length
        return cls(real, image, last, header)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the prompt forward."""
        return (self.real.shape[0], self.real.shape[1])

    def column_is(self, column: Int[Tensor, " row"]) -> Bool[Tensor, "row pos"]:
        """Mask that is True at one given column of each row."""
        return torch.arange(self.real.shape[1], device=self.real.device)[None] == column[:, None]

    def named(self, name: str) -> Bool[Tensor, "row pos"]:
        """Mask of one named class over the prompt forward (see `positions`).

        Raises:
            PositionError: `image`/`text` without token ids, or `user_end` without a known assistant header.
        """
        columns = torch.arange(self.real.shape[1], device=self.real.device)[None]
        if name == "everywhere":
            return self.real
        if name == "generated":
            return torch.zeros_like(self.real)
        if name == "last_prompt":
            return self.column_is(self.last)
        if name == "prompt":
            return self.real & (columns <= self.last[:, None])
        if name == "completion":
            return self.real & (columns > self.last[:, None])
        if name == "user_end":
            if bool((self.header < 0).any()):
                row = int((self.header < 0).nonzero()[0])
                raise PositionError(
                    f"user_end needs the assistant header of the chat template, and row {row} has none before its "
                    "answer; build the inputs with vlm.inputs(...) or attach the model with its processor."
                )
            return self.column_is(self.last - self.header)
        if self.image is None:
            raise PositionError(
                f"positions {name!r} need input_ids in the forward (and the processor's image token); "
                "this one was given embeddings only."
            )
        return self.image if name == "image" else self.real & ~self.image

    def rows(self, index: Int[Tensor, " picked"]) -> TokenLayout:
        """Return the layout of the picked rows (beams, repeats)."""
        image = None if self.image is None else self.image[index]
        return replace(self, real=self.real[index], image=image, last=self.last[index], header=self.header[index])


def keys_seen(mask: object, width: int) -> object:
    """Return the 2-D mask behind what `generate` makes for a static cache: the keys that the last column attends to.

    (row, 1, query, key), True or 0 where attended; for models with sliding windows one of each kind, by name.
    """
    if isinstance(mask, Mapping):
        mask = cast("Mapping[str, object]", mask).get("full_attention", mask)
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return mask
    last = mask[:, 0, -1, :width]
    return last if last.dtype == torch.bool else last == 0


def _find_header(
    tokens: Sequence[int], final: int, headers: Sequence[Sequence[int]], *, anchored: bool
) -> tuple[int, int]:
    """Return (last column, length) of the last assistant header that ends at or before `final`; length 0 if none."""
    longest_first = sorted(headers, key=len, reverse=True)
    for end in range(final, -1, -1):
        for header in longest_first:
            start = end - len(header) + 1
            if start > 0 and list(tokens[start : end + 1]) == list(header):
                return end, len(header)
        if anchored:
            break
    return final, 0
