"""GGUF control vectors, the portable format of llama.cpp and repeng: arch "controlvector", tensors direction.<layer>.

    direction.l  =  alpha_l * v_l,  added to the output of decoder layer l (resid_post)

The format knows no positions and no layer 0: a vector read from it steers everywhere, as llama.cpp applies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from steer_plugin.errors import ArtefactError, FrameworkError, InputError, JobError
from steer_plugin.intervention import Alpha, check_alpha
from steer_plugin.methods.mean import MeanSteering
from steer_plugin.positions import Positions

_ARCH = "controlvector"
_NAME = "direction."


def write_gguf(path: Path | str, steerings: Sequence[MeanSteering], model_hint: str = "llama") -> None:
    """Write one vector per layer as a GGUF control vector; alpha is multiplied in, positions are lost.

    Raises:
        InputError: nothing to write, two vectors for a layer, a site other than resid_post(1) or behind, or
            vectors and strengths that differ by row or step.
        JobError: the place cannot be written, or the disk is full; an old file still stands then.
        FrameworkError: the gguf package is missing.
    """
    directions: dict[int, np.ndarray[Any, Any]] = {}
    for steering in steerings:
        layer = steering.site.layer
        if steering.site.kind != "resid_post" or layer is None or layer < 1 or layer in directions:
            raise InputError(
                f"a GGUF control vector holds one vector for each of resid_post(1), resid_post(2), ...; got "
                f"{steering.site}{' twice' if layer in directions else ''}."
            )
        directions[layer] = _scaled(steering).cpu().numpy()
    if not directions:
        raise InputError("a GGUF control vector needs at least one steering, got none.")
    target = Path(path)
    partial = target.with_name(f"{target.name}.partial")
    try:
        writer = _package().GGUFWriter(partial, _ARCH)
        writer.add_string(f"{_ARCH}.model_hint", model_hint)
        writer.add_uint32(f"{_ARCH}.layer_count", len(directions))
        for layer in sorted(directions):
            writer.add_tensor(f"{_NAME}{layer}", directions[layer])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(target)
    except OSError as error:
        raise JobError(f"cannot write the GGUF file {target}: {error}. Make the folder, or free some space.") from error
    finally:
        partial.unlink(missing_ok=True)


def read_gguf(path: Path | str, positions: Positions | str = "everywhere", alpha: Alpha = 1.0) -> list[MeanSteering]:
    """Read a GGUF control vector: one steering per layer; `sum(...)` steers them together.

    Raises:
        ArtefactError: missing or corrupt file, one that is no control vector, or directions that are no vectors.
        FrameworkError: the gguf package is missing.
    """
    package = _package()
    try:
        reader = package.GGUFReader(Path(path))
        field = reader.get_field("general.architecture")
        architecture = None if field is None else field.contents()
        found = {str(tensor.name): tensor for tensor in reader.tensors if str(tensor.name).startswith(_NAME)}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ArtefactError(f"cannot read the GGUF file {path}: {error}. Write it anew.") from error
    if architecture != _ARCH or not found:
        raise ArtefactError(f"{path} is a GGUF file of {architecture!r}, expected a control vector ({_ARCH!r}).")
    vectors = {_layer(name, path): _values(tensor, path) for name, tensor in found.items()}
    if len(widths := {vector.shape[0] for vector in vectors.values()}) > 1:
        raise ArtefactError(f"{path} has directions of widths {sorted(widths)}, expected one width: one model's.")
    return [MeanSteering(vector, f"resid_post.{layer}", positions, alpha) for layer, vector in sorted(vectors.items())]


def _layer(name: str, path: Path | str) -> int:
    text = name.removeprefix(_NAME)
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ArtefactError(f"{path} has a tensor {name!r}, expected {_NAME}1, {_NAME}2, ... (layer 0 has none).")
    return int(text)


def _values(tensor: Any, path: Path | str) -> Float[torch.Tensor, " d_model"]:
    kind = tensor.tensor_type.name
    if kind not in ("F32", "F16") or tensor.data.ndim != 1:
        raise ArtefactError(
            f"{path}: {tensor.name} is {kind} of shape {tuple(tensor.shape.tolist())}, expected a vector of F32 or F16 "
            "as llama.cpp and repeng write it."
        )
    vector = torch.from_numpy(np.array(tensor.data, dtype=np.float32))
    if bad := int((~torch.isfinite(vector)).sum()):
        raise ArtefactError(f"{path}: {tensor.name} holds {bad} NaN or infinite values, expected none.")
    return vector


def _scaled(steering: MeanSteering) -> torch.Tensor:
    alpha = steering.alpha
    if steering.vector.ndim != 1 or callable(alpha) or (isinstance(alpha, torch.Tensor) and alpha.ndim):
        raise InputError("vectors and strengths that differ by row or step do not fit into a GGUF control vector.")
    check_alpha(alpha)
    return (float(alpha) * steering.vector).float()


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise FrameworkError("GGUF files need the gguf package: pip install 'steer-plugin[gguf]'.") from error
    return gguf
