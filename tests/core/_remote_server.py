"""Run by test_nnsight_remote.py: a server with models of its own, on which steer_plugin and jaxtyping do not exist."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

ABSENT = ("steer_plugin", "jaxtyping")


class Absent(MetaPathFinder):
    """Comes before the finders of installed, editable and path modules, and lets none of them look."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r} on this server", name=name)


sys.meta_path.insert(0, Absent())

import torch  # noqa: E402 - behind the finder
from _tiny import hook_count, tiny_inputs, tiny_llava, tiny_processor  # noqa: E402
from nnsight import NNsight, TransformersModel  # noqa: E402
from nnsight.schema.request import RequestModel  # noqa: E402
from nnsight.tracing import tracer as tracing  # noqa: E402


def persistent(model: Any) -> dict[str, Any]:
    """What a request names instead of carrying it; a bare NNsight has the base class's part of that map."""
    if hasattr(model, "_remoteable_persistent_objects"):
        return model._remoteable_persistent_objects()
    return {"Interleaver": model.interleaver, **{f"Module:{one.path}": one._module for one in model.modules()}}


def run(model: Any, request: bytes) -> torch.Tensor | str:
    """Execute one request and return what it saved, or the error."""
    try:
        tracer = RequestModel.deserialize(request, persistent(model))
        tracing.inc()  # as a trace's own exit does around its backend
        try:
            with torch.no_grad():
                tracer.execute(tracer.info.code)
        finally:
            tracing.dec()
        return tracer.info.frame.f_locals["kept"]
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(folder: Path) -> None:
    """Execute every request of the folder; writes there.pt."""
    for name in ABSENT:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        raise SystemExit(f"{name} can be imported here: this would prove nothing")
    processor = tiny_processor()
    models = {
        "plain": NNsight(tiny_llava()),
        "whole": TransformersModel(tiny_llava(), task="image-text-to-text", processor=processor),
    }
    for model in models.values():
        model._module(**tiny_inputs(1))
    hooks = {name: hook_count(model._module) for name, model in models.items()}
    there: dict[str, Any] = {}
    for path in sorted(folder.glob("*.request")):
        first = path.stem.split()[0]
        there[path.stem] = run(models[first], path.read_bytes())
        there[f"{path.stem}: hooks left"] = hook_count(models[first]._module) - hooks[first]
    gc.collect()
    there["hooks left"] = sum(hook_count(models[name]._module) - count for name, count in hooks.items())
    there["modules"] = [name for name in sys.modules if name.split(".")[0] in ABSENT]
    torch.save(there, folder / "there.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
