"""What a text decoder is called with, cut into columns or repeated for further rows.

(row, pos, ...)  inputs_embeds, input_ids, visual_pos_masks;   (..., row, pos)  position_ids, mRoPE's axes in front
(picture token, d_model)  each of deepstack_visual_embeds, in the order of the True entries of visual_pos_masks
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

Kwargs = dict[str, object]

_BY_POSITION = ("inputs_embeds", "input_ids", "visual_pos_masks")
_DEEP = "deepstack_visual_embeds"
_KNOWN = {*_BY_POSITION, "position_ids", "attention_mask", _DEEP}


def tokens_of(kwargs: Kwargs) -> Tensor | None:
    """Return what has the decoder's rows and columns: embeddings, or ids where it embeds them itself."""
    found = kwargs.get("inputs_embeds")
    found = kwargs.get("input_ids") if found is None else found
    return found if isinstance(found, Tensor) else None


def can_part(kwargs: Kwargs, cache: object) -> bool:
    """Whether columns may run apart, into this cache: nothing here belongs to all of them together.

    A mask that was made beforehand (Gemma 3, PaliGemma), a tensor that is not known to lie by columns (Mllama's picture
    states), and a cache that forgets (sliding windows) or has fixed places all forbid it.
    """
    mask = kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        return False
    if any(isinstance(value, Tensor) and name not in _KNOWN for name, value in kwargs.items()):
        return False
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def columns(kwargs: Kwargs, start: int | None, stop: int | None) -> Kwargs:
    """Cut everything that has one entry per column of this forward; the attention mask covers the cache as well."""
    cut = dict(kwargs)
    for name in (*_BY_POSITION, "position_ids"):
        value = kwargs.get(name)
        if isinstance(value, Tensor):
            cut[name] = value[:, start:stop] if name in _BY_POSITION else value[..., start:stop]
    marks, deep = kwargs.get("visual_pos_masks"), kwargs.get(_DEEP)
    if isinstance(marks, Tensor) and isinstance(deep, (list, tuple)):
        inside = torch.zeros_like(marks, dtype=torch.bool)
        inside[:, start:stop] = True
        kept = inside[marks.bool()]
        cut[_DEEP] = [features[kept] for features in cast("list[Tensor]", deep)]
    return cut


def twice(kwargs: Kwargs, rows: int) -> Kwargs:
    """Repeat the batch behind itself; what has one row for all stays."""
    return {name: _doubled(name, value, rows) for name, value in kwargs.items()}


def _doubled(name: str, value: object, rows: int) -> object:
    if isinstance(value, Cache):
        return value
    if isinstance(value, dict):
        return {key: _doubled(name, one, rows) for key, one in cast("dict[str, object]", value).items()}
    if isinstance(value, (list, tuple)):
        inner = [_doubled(name, one, rows) for one in cast("list[object]", value)]
        return tuple(inner) if isinstance(value, tuple) else inner
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    if name == _DEEP:
        return torch.cat([value, value])
    dim = value.ndim - 2 if name == "position_ids" else 0
    return torch.cat([value, value], dim) if value.shape[dim] == rows else value
