"""Forced completions as batches: padded behind a shared cache, or joined to their prompts and sampled on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn


def right_padded(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "row pos"], Bool[Tensor, "row pos"]]:
    """Token ids of ragged rows and which of them are real; padding repeats a row's last token."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows], device=device)
    real = torch.tensor([[i < len(row) for i in range(width)] for row in rows], device=device)
    return ids, real


def left_padded(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "row pos"], Bool[Tensor, "row pos"]]:
    """As `right_padded`, with the padding in front."""
    ids, real = right_padded([row[::-1] for row in rows], device)
    return ids.flip(1), real.flip(1)


def forced_inputs(
    inputs: Mapping[str, Tensor], completions: Sequence[Sequence[int]], token_type: int = 0
) -> tuple[dict[str, Tensor], Int[Tensor, " row"]]:
    """Left-padded prompts with their completions appended, and how many tokens were forced.

    One completion per prompt, or a whole number of them: all first ones, then all second ones. `token_type` is what
    token_type_ids say of an answer.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    lengths = [len(completion) for completion in completions]
    sources = [number % ids.shape[0] for number in range(len(completions))]
    width = max(int(mask[source].sum()) + length for source, length in zip(sources, lengths, strict=True))
    pad_id = int(ids[~mask][0]) if bool((~mask).any()) else 0

    def joined(value: Tensor, behind: Callable[[Tensor, int], Tensor], fill: int) -> Tensor:
        rows: list[Tensor] = []
        for number, source in enumerate(sources):
            row = torch.cat([value[source][mask[source]], behind(value[source], number)])
            front = row.new_full((width - len(row), *row.shape[1:]), fill)
            rows.append(torch.cat([front, row]))
        return torch.stack(rows)

    out: dict[str, Tensor] = {}
    for key, value in inputs.items():
        if key == "position_ids":
            continue
        if key == "input_ids":
            out[key] = joined(value, lambda row, number: torch.tensor(completions[number], device=row.device), pad_id)
        elif value.shape[:2] != ids.shape:
            out[key] = torch.cat([value] * (len(completions) // ids.shape[0]))
        elif value.ndim == 2:
            kind = {"attention_mask": 1, "token_type_ids": token_type}.get(key, 0)
            out[key] = joined(value, lambda row, number, kind=kind: row.new_full((lengths[number],), kind), 0)
        else:  # Mllama's cross-attention mask: what the last prompt token sees, its answer sees
            out[key] = joined(value, lambda row, number: row[-1:].expand(lengths[number], *row.shape[1:]), 0)
    return out, torch.tensor(lengths, device=ids.device)


def continued(
    inputs: Mapping[str, Tensor], ids: Int[Tensor, "row all"], alive: Bool[Tensor, "row new"], token_type: int = 0
) -> dict[str, Tensor]:
    """Inputs of a forward over a batch and what was sampled behind it; `alive` are the tokens that count."""
    rows, width = inputs["input_ids"].shape
    new = ids.shape[1] - width
    out: dict[str, Tensor] = {}
    for key, value in inputs.items():
        if value.shape[:2] != (rows, width):
            out[key] = value
        elif value.ndim == 2:
            out[key] = torch.cat([value, value.new_full((rows, new), token_type if key == "token_type_ids" else 0)], 1)
        else:
            out[key] = torch.cat([value, value[:, -1:].expand(-1, new, *value.shape[2:])], 1)
    mask = inputs["attention_mask"]
    return {**out, "input_ids": ids, "attention_mask": torch.cat([mask, alive.to(mask.dtype)], 1)}


def until_eos(new: Int[Tensor, "row pos"], root: nn.Module) -> Bool[Tensor, "row pos"]:
    """True up to and with the first end-of-sequence token of each row."""
    eos = cast(Any, root).generation_config.eos_token_id
    if eos is None:
        return torch.ones_like(new, dtype=torch.bool)
    ended = torch.isin(new, torch.as_tensor(eos, device=new.device)).int()
    return (ended.cumsum(-1) - ended) == 0
