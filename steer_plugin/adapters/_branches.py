"""Prompts as a tree over KV caches: what rows have in common runs once, and what is behind it in one more forward.

    trunk      the columns that rows share, pictures among them: keys and values of each distinct beginning
    branches   the tokens behind it (`_nodes`), packed where the attention kernel takes a mask of its own

Positions count on from the trunk's own (mRoPE: from the largest of the picture's). Forwards stop behind the last read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from steer_plugin.adapters._nodes import Node, Placed, flat, packed, padded
from steer_plugin.adapters._parts import ModelParts
from steer_plugin.adapters._taps import Ends, Taps, reading
from steer_plugin.sites import Site

# Kernels that take any mask; flash attention knows causal ones and padding alone.
_MASKED = ("eager", "sdpa")


@dataclass(frozen=True)
class Trunk:
    """Rows whose keys and values are kept; used up by the branches.

    Attributes:
        cache: their keys and values, up to the layer where the forward stopped.
        mask: (row, pos) attention mask of every column in it.
        next: (..., row, 1) position of the next token, with the axes in front that the family's positions have.
    """

    cache: DynamicCache
    mask: Int[Tensor, "row pos"]
    next: Int[Tensor, "*axes row 1"]


class Branches:
    """Trunks and branches of one model."""

    def __init__(self, parts: ModelParts, ends: Ends) -> None:
        self.parts, self.ends = parts, ends

    def trunk(self, inputs: Mapping[str, Tensor], taps: Taps, last: Site) -> Trunk:
        """Run a left-padded batch up to the site `last`."""
        inputs = {key: value.to(self.parts.device) for key, value in inputs.items()}
        cache = DynamicCache(config=self.parts.root.config.get_text_config())
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        seen: list[Tensor | None] = []

        def entering(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            at = kwargs.get("position_ids")
            seen.append(at if isinstance(at, Tensor) else None)

        handle = self.parts.decoder.register_forward_pre_hook(entering, with_kwargs=True)
        try:
            with reading(self.ends, taps, last):
                self.parts.root(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        finally:
            handle.remove()
        return Trunk(cache, torch.ones_like(ids) if mask is None else mask, _behind(seen[0], ids))

    def placed(self, nodes: Sequence[Node], trunk: Trunk) -> Placed:
        """Lay nodes out for a forward."""
        kernel = getattr(self.parts.root.config.get_text_config(), "_attn_implementation", None)
        # Sliding windows count columns, and here a token's column is not its distance.
        if kernel in _MASKED and not any(trunk.cache.is_sliding):
            return packed(nodes, trunk.mask.shape[0])
        return flat(nodes)

    def grow(self, trunk: Trunk, placed: Placed, taps: Taps, last: Site) -> None:
        """Run what is behind the trunk up to the site `last`; the trunk's cache is used up."""
        device = trunk.mask.device
        ids, ahead = padded(placed.tokens, device), padded(placed.ahead, device)
        index = torch.tensor(placed.rows, device=device)
        if placed.rows != list(range(trunk.mask.shape[0])):
            trunk.cache.batch_select_indices(torch.tensor(placed.rows))
        with reading(self.ends, taps, last):
            self.parts.root(
                input_ids=ids,
                attention_mask=self._mask(trunk.mask[index], placed),
                position_ids=trunk.next[..., index, :] + ahead,
                past_key_values=trunk.cache,
                use_cache=True,
                logits_to_keep=1,
            )

    def _mask(self, before: Int[Tensor, "row pos"], placed: Placed) -> Tensor:
        """What tokens attend to: one mask for all of a row (row, pos), or for each token (row, 1, token, pos)."""
        if placed.sees is None:
            width = max(map(len, placed.tokens))
            real = [[int(i < len(row)) for i in range(width)] for row in placed.tokens]
            return torch.cat([before, torch.tensor(real, device=before.device, dtype=before.dtype)], 1)
        sees = placed.sees.to(before.device)
        every = torch.cat([before[:, None].bool().expand(-1, sees.shape[1], -1), sees], -1)[:, None]
        return _additive(every, self.parts.root.dtype)


def _additive(seen: Tensor, dtype: torch.dtype) -> Float[Tensor, "row 1 token pos"]:
    """0 where a token attends, and as little as the dtype has elsewhere."""
    nothing = torch.zeros((), dtype=dtype, device=seen.device)
    return torch.where(seen, nothing, torch.finfo(dtype).min)


def _behind(at: Tensor | None, ids: Int[Tensor, "row pos"]) -> Int[Tensor, "*axes row 1"]:
    """Position of the token behind each row, from those that the decoder was given (None: it counted columns)."""
    rows, width = ids.shape
    if at is None:
        return torch.full((rows, 1), width, device=ids.device)
    if at.ndim == 2:
        return at.expand(rows, -1).amax(-1, keepdim=True) + 1
    # mRoPE: text goes on behind the largest position of all axes; a fourth axis in front counts the text alone.
    own, axes = at[:-3], at[-3:]
    most = axes.amax((0, -1))[None, :, None].expand(3, -1, -1)
    return torch.cat([own.amax(-1, keepdim=True), most]) + 1
