"""What was recorded of a steered run: named values by layer, row and token, with what the tokens are.

    gate (layer, row, token, dim)    gate_mean, gate_norm (layer, row, token)    gate_dim_mean (layer, row, class, dim)
    gate_moments (layer, row, class, moment), tokens (layer, row, class): sums over tokens, always there

Tokens are columns of the batch, prompt first; `valid` says which of them were steered in which layer and row. Summaries
come from the moments, so they are exact whatever else was kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from jaxtyping import Float, Int, Num, Shaped
from torch import Tensor

from steer_plugin import artefact
from steer_plugin.artefact import Artefact
from steer_plugin.atomic import JSON
from steer_plugin.errors import ArtefactError, FrameworkError, InputError, nearest

if TYPE_CHECKING:
    from pandas import DataFrame
    from xarray import Dataset
else:
    DataFrame = Dataset = object  # imported when needed; run-time type checkers look these names up

CLASSES = ("image", "text", "last_prompt", "completion", "generated")
PADDING = "padding"
# Of each token: mean and mean square over its dimensions, share of values above 0.5, sparsity (all summed over tokens),
# smallest and largest value.
MOMENTS = ("mean", "square", "open", "sparsity", "min", "max")
SUMMED = 4
# How the variable of a reduction is called, behind the name.
SUFFIXES = {"none": "", "mean": "_mean", "norm": "_norm", "dim_mean": "_dim_mean"}
AXES = ("layer", "row", "class", "dim")
Variable: TypeAlias = tuple[tuple[str, ...], Shaped[np.ndarray, "..."]]


def analysis_module(name: str) -> ModuleType:
    """Import xarray, or pandas, which it brings.

    Raises:
        FrameworkError: the extra is missing.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise FrameworkError(f"records need {name}: pip install 'steer-plugin[analysis]'.") from error


class _Cells(NamedTuple):
    """Numbers by (layer, row, class) or (layer, row, class, dim): sums over tokens, smallest and largest values."""

    tokens: Num[np.ndarray, "..."]
    sums: dict[str, Float[np.ndarray, "..."]]
    ends: dict[str, Float[np.ndarray, "..."]]

    def over(self, by: Sequence[str]) -> _Cells:
        """Add up the axes that are not in `by`, and bring the others into its order."""
        kept = [AXES.index(name) for name in by]
        gone = tuple(axis for axis in range(self.tokens.ndim) if axis not in kept)
        shape = [self.tokens.shape[axis] for axis in kept] or [1]

        def placed(value: Num[np.ndarray, "..."]) -> Num[np.ndarray, "..."]:
            return value.transpose(*kept, *gone).reshape(shape)

        ways = {"min": np.min, "max": np.max}
        return _Cells(
            placed(self.tokens.sum(gone, keepdims=True)),
            {name: placed(value.sum(gone, keepdims=True)) for name, value in self.sums.items()},
            {name: placed(ways[name](value, axis=gone, keepdims=True)) for name, value in self.ends.items()},
        )


class Record:
    """The labelled values of one recorded run; `data` is an xarray.Dataset, made by `vlm.record`.

    Coordinates: `layer` and its `site`, `row`, `token` (column of the batch), `step` of each token (0 in the prompt),
    `token_class` (row, token), `valid` (layer, row, token), `class`. A value that is not valid is NaN. The tokens
    that end an answer early, and the padding behind them, are not valid.

    Raises:
        FrameworkError: xarray is missing (in `of` and `load`).
    """

    kind = "record"

    def __init__(self, data: Dataset) -> None:
        self.data = data

    @classmethod
    def of(cls, variables: Mapping[str, Variable], coords: Mapping[str, Variable], attrs: Mapping[str, JSON]) -> Record:
        """Label arrays: name -> (dimensions, array)."""
        return cls(analysis_module("xarray").Dataset(dict(variables), dict(coords), dict(attrs)))

    def __repr__(self) -> str:
        """Name what was kept, and its sizes."""
        sizes = ", ".join(f"{size} {name}s" for name, size in self.data.sizes.items() if name in (*AXES[:2], "token"))
        return f"Record({', '.join(self.names)}; kept {', '.join(self.reduce)}; {sizes})"

    @property
    def names(self) -> tuple[str, ...]:
        """What the deltas had noted and was kept, such as "gate"."""
        return tuple(self.data.attrs["names"])

    @property
    def reduce(self) -> tuple[str, ...]:
        """The reductions that were kept."""
        return tuple(self.data.attrs["reduce"])

    @property
    def ids(self) -> Int[Tensor, "row column"]:
        """Token ids, prompt included, as `vlm.generate` returns them; -1 where the prompt was given without ids."""
        return torch.from_numpy(self.data["ids"].values)

    @property
    def generated(self) -> Int[Tensor, "row new"]:
        """The generated ids alone; the last of them was never fed back, hence never steered."""
        return self.ids[:, int(self.data.attrs["prompt_width"]) :]

    # -- numbers -------------------------------------------------------------------------------------------------

    def summary(self, by: Sequence[str] | str = ("layer",), name: str | None = None) -> DataFrame:
        """Summarise over steered tokens: a line per name and value of `by` ("layer", "row", "class", "dim").

        Columns: `tokens` (a token counts once in each layer), `mean`, `std` (of the values, not of their mean), `min`,
        `max`, `open` (share of values above 0.5: of a gate, what is open), `sparsity` (Hoyer's, over the dimensions of
        each token: 0 all alike, 1 a single one differs from 0). By "dim" there is no sparsity, and nothing but the mean
        unless whole values were kept.

        Raises:
            InputError: unknown `by` or name, or "dim" where neither "none" nor "dim_mean" was kept.
        """
        asked = (by,) if isinstance(by, str) else tuple(by)
        for one in asked:
            if one not in AXES or asked.count(one) > 1:
                raise InputError(f"summary by {one!r} is not known.{nearest(one, AXES)} Known, once each: {AXES}.")
        pandas = analysis_module("pandas")
        frames = [self._summary(one, asked) for one in (self.names if name is None else (self._known(name),))]
        return pandas.concat(frames, ignore_index=True)

    def top_dimensions(self, name: str = "gate", k: int = 10) -> DataFrame:
        """Find the k dimensions of largest mean (by magnitude) in each layer, over all tokens: layer, rank, dim, mean.

        Raises:
            InputError: unknown name, k below 1, or neither "none" nor "dim_mean" was kept.
        """
        if k < 1:
            raise InputError(f"top_dimensions needs k of at least 1, got {k}.")
        frame = self._summary(self._known(name), ("layer", "dim"))
        order = np.lexsort((-frame["mean"].abs().to_numpy(), frame["layer"].to_numpy()))
        frame = frame.iloc[order].groupby("layer").head(k).reset_index(drop=True)
        frame["rank"] = frame.groupby("layer").cumcount()
        return frame[["layer", "rank", "dim", "mean"]]

    def to_frame(self, *variables: str) -> DataFrame:
        """Write variables of `data` as a long table, valid entries only; by default those with one value per token.

        Where none has, the means by dimension are given, else the whole values.

        Raises:
            InputError: unknown variables, or several of different dimensions.
        """
        kept = [name + end for name in self.names for end in SUFFIXES.values() if name + end in self.data]
        for one in variables:
            if one not in kept:
                raise InputError(f"the record has no variable {one!r}.{nearest(one, kept)} It has {', '.join(kept)}.")
        ways = [self.data[one].dims for one in kept]
        first = next(
            (way for way in ways if way[-1] == "token"), next((way for way in ways if "class" in way), ways[0])
        )
        chosen = variables or tuple(one for one in kept if self.data[one].dims == first)
        dims = cast("tuple[str, ...]", self.data[chosen[0]].dims)
        if any(self.data[one].dims != dims for one in chosen):
            shown = ", ".join(f"{one} {self.data[one].dims}" for one in chosen)
            raise InputError(f"one table cannot hold variables of different dimensions: {shown}; ask for them apart.")
        there = self.data["valid"].values if "token" in dims else self.data["tokens"].values > 0
        layer, row, third = np.nonzero(there)
        columns: dict[str, Shaped[np.ndarray, " line"]] = {"layer": self.data["layer"].values[layer], "row": row}
        if "token" in dims:
            token = self.data["token"].values[third]
            columns |= {"token": token, "step": self.data["step"].values[third], "id": self.ids.numpy()[row, token]}
            columns["class"] = self.data["token_class"].values[row, third]
        else:
            columns["class"] = self.data["class"].values[third]
        values = {one: self.data[one].values[layer, row, third] for one in chosen}
        if len(dims) == 4:
            width = self.data.sizes[dims[-1]]
            columns = {key: np.repeat(value, width) for key, value in columns.items()}
            columns["dim"] = np.tile(np.arange(width), len(layer))
        return analysis_module("pandas").DataFrame(
            {**columns, **{one: value.reshape(-1) for one, value in values.items()}}
        )

    def _known(self, name: str) -> str:
        if name not in self.names:
            raise InputError(
                f"{name!r} was not recorded.{nearest(name, self.names)} Recorded: {', '.join(self.names)}."
            )
        return name

    def _summary(self, name: str, by: tuple[str, ...]) -> DataFrame:
        cells = (self._by_dimension(name) if "dim" in by else self._moments(name)).over(by)
        there = np.nonzero(cells.tokens)
        tokens = cells.tokens[there]
        columns: dict[str, Shaped[np.ndarray, "..."]] = {"name": np.full(len(tokens), name, object)}
        for axis, one in enumerate(by):
            labels = self.data[one].values if one in ("layer", "class") else np.arange(cells.tokens.shape[axis])
            columns[one] = labels[there[axis]]
        sums = {key: value[there] / tokens for key, value in cells.sums.items()}
        columns |= {"tokens": tokens, "mean": sums["mean"]}
        if "square" in sums:
            columns["std"] = np.sqrt(np.maximum(sums["square"] - np.square(sums["mean"]), 0))
        columns |= {key: value[there] for key, value in cells.ends.items()}
        columns |= {key: value for key, value in sums.items() if key in ("open", "sparsity")}
        return analysis_module("pandas").DataFrame(columns)

    def _moments(self, name: str) -> _Cells:
        moments = self.data[f"{name}_moments"].values
        parts = {one: moments[..., number] for number, one in enumerate(MOMENTS)}
        sums = {one: parts[one] for one in MOMENTS[:SUMMED]}
        return _Cells(self.data["tokens"].values, sums, {one: parts[one] for one in MOMENTS[SUMMED:]})

    def _by_dimension(self, name: str) -> _Cells:
        tokens = self.data["tokens"].values
        if name in self.data:
            values, valid = self.data[name].values, self.data["valid"].values
            shape = (*tokens.shape, values.shape[-1])
            sums = {one: np.zeros(shape) for one in MOMENTS[: SUMMED - 1]}
            ends = {"min": np.full(shape, np.inf), "max": np.full(shape, -np.inf)}
            for number in np.nonzero(tokens.sum((0, 1)))[0]:
                chosen = (valid & (self.data["token_class"].values == CLASSES[number]))[..., None]
                for layer in range(shape[0]):  # one layer at a time: a copy of everything would be large
                    x, there = values[layer].astype(np.float64), chosen[layer]
                    for key, value in {"mean": x, "square": np.square(x), "open": x > 0.5}.items():
                        sums[key][layer, :, number] = np.where(there, value, 0).sum(1)
                    ends["min"][layer, :, number] = np.where(there, x, np.inf).min(1)
                    ends["max"][layer, :, number] = np.where(there, x, -np.inf).max(1)
            return _Cells(np.broadcast_to(tokens[..., None], shape), sums, ends)
        if f"{name}_dim_mean" not in self.data:
            raise InputError(
                f"the dimensions of {name!r} were not kept, only {', '.join(self.reduce)}; record with "
                "reduce=('dim_mean',), or with 'none' to keep every value."
            )
        means = self.data[f"{name}_dim_mean"].values.astype(np.float64)
        weights = np.broadcast_to(tokens[..., None], means.shape)
        return _Cells(weights, {"mean": np.where(weights > 0, means, 0) * weights}, {})

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> None:
        """Write the record as safetensors + JSON.

        Raises:
            JobError: the folder cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        described: dict[str, JSON] = {}
        for name, variable in self.data.variables.items():
            values, words = variable.values, None
            if values.dtype.kind in "UO":
                found, values = np.unique(values.astype(str), return_inverse=True)
                words = cast("list[JSON]", found.tolist())
            tensors[str(name)] = torch.from_numpy(np.array(values.reshape(variable.shape)))
            described[str(name)] = {
                "dims": [str(dim) for dim in variable.dims], "words": words, "coordinate": name in self.data.coords,
            }  # fmt: skip
        meta: dict[str, JSON] = {"variables": described, "attrs": cast("dict[str, JSON]", dict(self.data.attrs))}
        artefact.write(Path(folder), Artefact(self.kind, tensors, meta))

    @classmethod
    def load(cls, folder: Path | str) -> Record:
        """Read what `save` wrote.

        Raises:
            ArtefactError: missing, corrupt, of another kind, or tensors that do not fit their description.
        """
        found = artefact.read(Path(folder), cls.kind)
        parts: tuple[dict[str, Variable], dict[str, Variable]] = {}, {}
        try:
            described = cast("Mapping[str, Mapping[str, JSON]]", found.meta["variables"])
            for name, about in described.items():
                values = found.tensors[name].numpy()
                if about["words"] is not None:
                    values = np.array(about["words"], str)[values]
                dims = cast("Sequence[str]", about["dims"])
                parts[bool(about["coordinate"])][name] = (tuple(dims), values)
            return cls.of(*parts, cast("Mapping[str, JSON]", found.meta["attrs"]))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ArtefactError(
                f"the record in {folder} does not fit its description ({error}); record anew."
            ) from error
