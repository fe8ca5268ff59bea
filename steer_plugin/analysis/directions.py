"""Directions: how long they are, how alike, what of the inputs' own vectors they explain, and what projects on them.

    cosine(v, w) = v.w / |v||w|          explained(i) = 1 - |z_i - v_i|^2 / |z_i|^2          projection(h) = h.v / |v|

z_i is the P2S vector of input i, v_i what a method would add for it: one mean for all, or L2S's prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steer_plugin.analysis._figure import Look, heat, new_figure, tidy
from steer_plugin.analysis._frames import frame, over, spread
from steer_plugin.errors import InputError
from steer_plugin.methods import L2S, MeanSteering
from steer_plugin.shifts import Shifts

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
else:
    DataFrame = Figure = object  # imported when needed; run-time type checkers look these names up

# What a method adds for each sample: a vector for all, a network of the context, or a function of the shifts.
Predictor: TypeAlias = MeanSteering | L2S | Callable[[Shifts], Tensor]


def _stacked(directions: Mapping[str, Float[Tensor, " d_model"]]) -> Float[Tensor, "direction d_model"]:
    """Stack named directions.

    Raises:
        InputError: none, other widths, or one of length zero.
    """
    if not directions:
        raise InputError("give at least one direction, as in {'layer 14': vector}.")
    first = next(iter(directions.values()))
    for name, vector in directions.items():
        if vector.ndim != 1 or vector.shape != first.shape:
            raise InputError(
                f"direction {name!r} has shape {tuple(vector.shape)}, expected ({first.shape[-1]},) as the first."
            )
        if not bool(vector.any()):
            raise InputError(f"direction {name!r} is all zero, so it points nowhere.")
    return torch.stack([vector.detach().double().cpu() for vector in directions.values()])


@dataclass(frozen=True)
class Cosines:
    """Cosines between named directions, and their norms.

    Attributes:
        names: of the directions.
        cosine: (direction, direction).
        norm: (direction,).
    """

    names: tuple[str, ...]
    cosine: Float[Tensor, "direction direction"]
    norm: Float[Tensor, " direction"]

    def to_frame(self) -> DataFrame:
        """Write a line per pair: first, second, cosine, and both norms."""
        pairs = [(i, j) for i in range(len(self.names)) for j in range(i + 1, len(self.names))]
        return frame(
            {
                "first": [self.names[i] for i, _ in pairs],
                "second": [self.names[j] for _, j in pairs],
                "cosine": [float(self.cosine[i, j]) for i, j in pairs],
                "first_norm": [float(self.norm[i]) for i, _ in pairs],
                "second_norm": [float(self.norm[j]) for _, j in pairs],
            }
        )

    def plot(self) -> Figure:
        """Draw the cosines as a heat map.

        Raises:
            FrameworkError: matplotlib is missing.
        """
        size = len(self.names)
        figure = new_figure(2.4 + 0.5 * size, 1.6 + 0.42 * size)
        axes = figure.subplots()
        image = heat(axes, self.cosine.numpy(), limits=(-1.0, 1.0))
        axes.set_xticks(range(size), self.names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_yticks(range(size), self.names, fontsize=8)
        figure.colorbar(image, ax=axes, label="cosine")
        return figure


def cosines(directions: Mapping[str, Float[Tensor, " d_model"]]) -> Cosines:
    """Compare directions: of layers, behaviours, inputs or methods.

    Raises:
        InputError: none, other widths, or one of length zero.
    """
    vectors = _stacked(directions)
    norm = vectors.norm(dim=-1)
    unit = vectors / norm[:, None]
    return Cosines(tuple(directions), (unit @ unit.T).clamp(-1, 1), norm)


@dataclass(frozen=True)
class ShiftMap:
    """P2S vectors on their principal components.

    Attributes:
        points: (sample, component).
        share: (component,) of the variance.
        behaviours: of each sample.
        origin: (component,) where the zero vector lies.
    """

    points: Float[Tensor, "sample component"]
    share: Float[Tensor, " component"]
    behaviours: tuple[str, ...]
    origin: Float[Tensor, " component"]

    def to_frame(self) -> DataFrame:
        """Write a line per sample: behaviour, and its place on each component."""
        columns = {f"pc{k + 1}": self.points[:, k].numpy() for k in range(self.points.shape[1])}
        return frame({"behaviour": list(self.behaviours), **columns})

    def plot(self) -> Figure:
        """Draw the first two components, a marker per behaviour; the cross is the zero vector.

        Raises:
            FrameworkError: matplotlib is missing.
        """
        figure = new_figure(5.2, 4.2)
        axes = figure.subplots()
        for number, name in enumerate(sorted(set(self.behaviours))):
            chosen = torch.tensor([one == name for one in self.behaviours])
            look = Look.of(number)
            x, y = self.points[chosen][:, :2].T.numpy()
            label = f"{name or 'all'} ({int(chosen.sum())})"
            axes.scatter(x, y, s=16, label=label, marker=look.marker, color=look.color, alpha=0.7, linewidths=0)
        axes.plot(*self.origin[:2].tolist(), "+", color="black", markersize=10)
        axes.set_xlabel(f"first component ({100 * float(self.share[0]):.0f} % of the variance)")
        axes.set_ylabel(f"second component ({100 * float(self.share[1]):.0f} %)")
        tidy(axes)
        axes.legend(frameon=False, fontsize=8)
        return figure


def shift_map(shifts: Shifts, components: int = 2) -> ShiftMap:
    """Find the principal components of P2S vectors (centred).

    Raises:
        InputError: fewer than 3 samples, or components that there are not.
    """
    count, width = shifts.vectors.shape
    if count < 3 or not 2 <= components <= min(count - 1, width):
        raise InputError(
            f"{components} components of {count} vectors of width {width} cannot be found; give at least 3 samples, "
            "and from 2 to one component fewer than samples."
        )
    vectors = shifts.vectors.double()
    middle = vectors.mean(0)
    _, sizes, axes = torch.linalg.svd(vectors - middle, full_matrices=False)
    share = sizes.square() / sizes.square().sum()
    axes = axes[:components]
    # A component's sign is arbitrary: let the zero vector lie on the negative side.
    axes = axes * torch.where(-middle @ axes.T > 0, -1.0, 1.0)[:, None]
    return ShiftMap((vectors - middle) @ axes.T, share[:components], shifts.behaviours, -middle @ axes.T)


@dataclass(frozen=True)
class Explained:
    """How much of each input's own vector the methods give, input by input.

    Attributes:
        names: of the methods.
        share: (method, sample) 1 - |z - v|^2 / |z|^2: 1 all of it, 0 as good as nothing, below 0 worse.
        cosine: (method, sample) between z and v.
        behaviours, ids: of each sample.
        seed: of the bootstrap.
    """

    names: tuple[str, ...]
    share: Float[Tensor, "method sample"]
    cosine: Float[Tensor, "method sample"]
    behaviours: tuple[str, ...]
    ids: tuple[str, ...]
    seed: int

    def to_frame(self) -> DataFrame:
        """Write a line per method and sample: id, behaviour, share, cosine."""
        count = len(self.ids)
        return frame(
            {
                "method": [name for name in self.names for _ in range(count)],
                "id": list(self.ids) * len(self.names),
                "behaviour": list(self.behaviours) * len(self.names),
                "share": self.share.reshape(-1).numpy(),
                "cosine": self.cosine.reshape(-1).numpy(),
            }
        )

    def summary(self) -> DataFrame:
        """Write a line per method: mean share and cosine with 95 % intervals; inputs better off than with the first."""
        share, low, high = spread(self.share.numpy(), self.seed)
        cosine, cosine_low, cosine_high = spread(self.cosine.numpy(), self.seed)
        return frame(
            {
                "method": list(self.names), "share": share, "share_low": low, "share_high": high, "cosine": cosine,
                "cosine_low": cosine_low, "cosine_high": cosine_high,
                "better_than_first": (self.share > self.share[:1]).double().mean(-1).numpy(),
            }
        )  # fmt: skip

    def plot(self) -> Figure:
        """Draw each method's cosine with the inputs' own vectors: a dot per input, the mean with its interval.

        Raises:
            FrameworkError: matplotlib is missing.
        """
        figure = new_figure(3.4 + 1.1 * len(self.names), 3.6)
        axes = figure.subplots()
        jitter = np.random.default_rng(self.seed)
        names = sorted(set(self.behaviours))
        cosine, low, high = spread(self.cosine.numpy(), self.seed)
        for number, name in enumerate(names):
            chosen = [k for k, one in enumerate(self.behaviours) if one == name]
            look = Look.of(number)
            for method in range(len(self.names)):
                x = method - 0.12 + jitter.uniform(-0.14, 0.14, len(chosen))
                label = (name or "inputs") if method == 0 else None
                axes.scatter(
                    x, self.cosine[method, chosen].numpy(), s=9, color=look.color, marker=look.marker, alpha=0.45,
                    linewidths=0, label=label,
                )  # fmt: skip
        error = None if np.isnan(low).any() else np.stack([cosine - low, high - cosine]).clip(0)
        axes.errorbar(
            np.arange(len(self.names)) + 0.25, cosine, error, fmt="o", color="black", capsize=3, label="mean, 95 %"
        )
        axes.set_xticks(range(len(self.names)), self.names)
        axes.set_ylabel("cosine with the input's own P2S vector")
        axes.set_title(over(len(self.ids), "input"), fontsize=9)
        tidy(axes, zero=True)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return figure


def explained(shifts: Shifts, methods: Mapping[str, Predictor], *, seed: int = 0) -> Explained:
    """Ask of held-out shifts what a mean explains of each and what L2S adds; put the simplest method first.

    Raises:
        InputError: no methods, vectors of another width, or a shift of length zero.
    """
    if not methods:
        raise InputError("explained needs at least one method, as in {'mean': mean, 'L2S': l2s}.")
    own = shifts.vectors.double()
    lengths = own.norm(dim=-1)
    if not bool((lengths > 0).all()):
        raise InputError(
            f"{int((lengths == 0).sum())} of the shifts are zero; leave neutral samples out (`shifts.select`)."
        )
    shares: list[Tensor] = []
    alike: list[Tensor] = []
    for name, method in methods.items():
        given = _predicted(method, shifts).detach().double().cpu()
        if given.shape[-1] != own.shape[-1]:
            raise InputError(
                f"method {name!r} gives vectors of width {given.shape[-1]}, the shifts have {own.shape[-1]}."
            )
        given = given.expand_as(own)
        shares.append(1 - (own - given).square().sum(-1) / lengths.square())
        alike.append(torch.cosine_similarity(own, given, dim=-1))
    return Explained(tuple(methods), torch.stack(shares), torch.stack(alike), shifts.behaviours, shifts.ids, seed)


def _predicted(method: Predictor, shifts: Shifts) -> Tensor:
    if isinstance(method, MeanSteering):
        return method.vector
    if isinstance(method, L2S):
        with torch.no_grad():
            return method.predict(shifts.contexts)
    return method(shifts)


def by_behaviour(shifts: Shifts, behaviours: Sequence[str] | None = None) -> dict[str, Float[Tensor, " d_model"]]:
    """Mean direction of each behaviour, ready for `cosines` and `direction_lens`."""
    return {name: shifts.mean(name) for name in (shifts.counts() if behaviours is None else behaviours)}
