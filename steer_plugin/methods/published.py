"""The networks that the L2S authors published (MIT), known by SHA-256: what they were trained on and where they steer.

Source: the authors' repository (learn-to-steer) and arXiv 2508.12815, appendix: layers and alpha.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from steer_plugin.errors import ArtefactError
from steer_plugin.methods.network import NAMES


@dataclass(frozen=True)
class Published:
    """One published file: what it was trained on, for which model, and where, when and how strongly it steers."""

    trained_on: str
    model: str
    family: str
    d_model: int
    n_layers: int
    write: str
    read: str
    context: str
    alpha: float


_LLAVA = ("llava-1.5-7b-hf", "llava", 4096, 32)
_QWEN = ("Qwen2-VL-7B-Instruct", "qwen2_vl", 3584, 28)
# One record per file; the digests are of the files in the authors' repository.
PUBLISHED: Mapping[str, Published] = {
    "4915bfca4628b1b7dfc291aa1d52d16902fe85fea81ca9e1e4dcb8a2ff4d371d": Published(
        "POPE", *_LLAVA, "resid_post.14", "resid_post.14", "last_prompt", 1.0
    ),
    "db6ee2b4c9fe7a9415bd47a02bda5baeedcb73c8c1f99d5112df3f309489a373": Published(
        "MM-SafetyBench", *_LLAVA, "resid_post.15", "resid_post.30", "user_end", 2.2
    ),
    "e9bdf0bd1abb1ffd3c160368c627c26c336db5d1f747a7b9f4b770e5e630e1ed": Published(
        "MM-SafetyBench", *_QWEN, "resid_post.14", "resid_post.14", "user_end", 2.2
    ),
}

# Whatever torch.load lets through of damaged bytes (found by flipping bytes of small files): none of these is a fault
# of the caller's, and each means that the file holds no state dict.
_DAMAGED = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
    OverflowError, struct.error,
)  # fmt: skip


def published_network(path: Path) -> tuple[dict[str, Tensor], Published | None]:
    """Return the network's three tensors and, for a known file, its record.

    Both layouts of the authors are read: the three tensors at the top, or nested under `steering_model`.

    Raises:
        ArtefactError: missing, corrupt, needs more than plain tensors, or holds other tensors.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error}.") from error
    try:
        loaded: object = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        raise ArtefactError(
            f"{path} is not a plain state dict (corrupt, truncated, or it wants to run code); expected "
            f"{', '.join(NAMES)}. Download it again, or save the tensors alone. torch says: {error}"
        ) from error
    state = cast("Mapping[str, object]", loaded) if isinstance(loaded, Mapping) else {}
    inner = state.get("steering_model", state)
    tensors = cast("Mapping[str, object]", inner) if isinstance(inner, Mapping) else {}
    found = {name: tensors.get(name) for name in NAMES}
    if not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ArtefactError(f"{path} lacks {', '.join(NAMES)}; it is no L2S network.")
    return cast("dict[str, Tensor]", found), PUBLISHED.get(hashlib.sha256(data).hexdigest())
