"""What every saved steering carries: site, positions, alpha, and the model that it was made for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from torch import Tensor

from steer_plugin.artefact import Artefact, read, write
from steer_plugin.atomic import JSON
from steer_plugin.errors import ArtefactError, InputError
from steer_plugin.intervention import Alpha


def saved_alpha(alpha: Alpha) -> JSON:
    """Return alpha as JSON.

    Raises:
        InputError: a function of the step cannot be saved.
    """
    if isinstance(alpha, Tensor):
        return cast(JSON, alpha.tolist())
    if isinstance(alpha, Callable):
        raise InputError("alpha is a function of the step, which a file cannot hold; save with a number.")
    return float(alpha)


def write_artefact(folder: Path | str, kind: str, tensors: Mapping[str, Tensor], meta: Mapping[str, JSON]) -> None:
    """Save tensors and what they mean as safetensors + JSON, in one step."""
    write(Path(folder), Artefact(kind, {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, meta))


def read_artefact(folder: Path | str, kind: str, names: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, JSON]]:
    """Load tensors and meta.

    Raises:
        ArtefactError: missing, corrupt, truncated, pickled, of another kind, or without the tensors that it needs.
    """
    found = read(Path(folder), kind)
    missing = [name for name in names if name not in found.tensors]
    if missing:
        raise ArtefactError(f"the artefact in {folder} lacks {', '.join(missing)}; save it again.")
    return dict(found.tensors), dict(found.meta)


def model_of(meta: Mapping[str, JSON]) -> Mapping[str, JSON] | None:
    """Identity of the model that an artefact was made for, if it says one."""
    model = meta.get("model")
    return cast("Mapping[str, JSON]", model) if isinstance(model, Mapping) else None
