"""Shifts on disk: read as float32, in the order of the pairs, each row with its own behaviour."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steer_plugin.errors import ArtefactError
from steer_plugin.shifts import Shifts
from steer_plugin.store import ShardWriter


def test_load(tmp_path: Path) -> None:
    vectors, contexts = torch.randn(7, 5).bfloat16(), torch.randn(7, 5)
    with ShardWriter(
        tmp_path, {"kind": "p2s", "write": "resid_post.1"}, 2, order=[f"r{k}" for k in range(7)]
    ) as writer:
        for k in (3, 0, 6, 5, 1, 4, 2):
            tensors = {"vector": vectors[[k]], "context": contexts[[k]]}
            writer.append([f"r{k}"], tensors, [{"behaviour": "yes" if k % 2 else "no"}])
    shifts = Shifts.load(str(tmp_path))
    assert shifts.ids == tuple(f"r{k}" for k in range(7))
    assert shifts.behaviours == ("no", "yes") * 3 + ("no",)
    assert shifts.vectors.dtype == torch.float32 and torch.equal(shifts.vectors, vectors.float())
    assert torch.equal(shifts.contexts, contexts) and shifts.job["write"] == "resid_post.1"


def test_what_is_not_shifts_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, {"kind": "activations"}) as writer:
        writer.append(["a"], {"vector": torch.zeros(1, 2)})
    with pytest.raises(ArtefactError, match="'activations', expected P2S shifts"):
        Shifts.load(tmp_path)
