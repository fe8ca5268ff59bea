"""What can be refused when the prompt is known, before its forward runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from steer_plugin.adapters._call import Call
from steer_plugin.errors import InputError, PositionError
from steer_plugin.intervention import Write


def check_rows(writes: Sequence[Write], ids: Int[Tensor, "row pos"] | None, rows: int) -> None:
    """Fewer per-row values than rows are right only where `generate` has repeated each row in place (beams).

    Raises:
        InputError: vectors or strengths that do not fit the batch.
    """
    for write in writes:
        for what, given in write.per_row:
            repeats = rows // given if rows % given == 0 else 0
            if repeats == 1 or given == 1:
                continue
            grouped = (
                None if ids is None or not repeats else rearrange(ids, "(row beam) pos -> row beam pos", row=given)
            )
            if grouped is None or not torch.equal(grouped, grouped[:, :1].expand_as(grouped)):
                raise InputError(
                    f"{given} {what} do not fit a batch of {rows} rows (write at {write.site}); give one for all, or "
                    "one per row."
                )


def check_matches(writes: Sequence[Write], call: Call, *, single_forward: bool) -> None:
    """A write that can match no token, now or while decoding, would silently do nothing.

    Raises:
        PositionError: names the write and how to look at its positions.
    """
    for write in writes:
        if write.site.in_vision or (write.positions.while_decoding() and not single_forward):
            continue
        if not any(call.chosen(write.positions).counts):
            raise PositionError(
                f"the write at {write.site} on {str(write.positions)!r} matches no token of this prompt; "
                "vlm.show_positions(inputs, positions) shows what each name selects."
            )
