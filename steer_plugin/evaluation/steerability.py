"""How well a steering steers, input by input: what its strength does to the odds of one opening over another.

    m(a)    = log p(positive opening | x, steered) - log p(negative opening | x, steered),  at a times its own strength
    slope   = sum_a (a - mean a) m(a) / sum_a (a - mean a)^2      steerability of x; anti-steerable where it is below 0
    rank    = Spearman's correlation of a and m(a)                1 where every step up in strength steers further
    r2      = squared correlation of a and m(a)                   1 where m is a line

The mean of the slopes is the slope of the mean curve. A curve that does not move has rank and r2 of 0. Source: Tan et
al., arXiv 2407.12404; their answers have one token each, for which m is the difference of the two logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from steer_plugin.adapters import AttachedModel
from steer_plugin.analysis._figure import new_figure
from steer_plugin.contrast import ContrastivePair
from steer_plugin.errors import InputError
from steer_plugin.evaluation.intervals import Interval, Values, bootstrap_interval
from steer_plugin.evaluation.propensity import ALPHAS, Steering, propensities
from steer_plugin.record import analysis_module

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame
else:
    Axes = DataFrame = Figure = object  # imported when needed; run-time type checkers look these names up


@dataclass(frozen=True)
class SteerabilitySummary:
    """Figures over all inputs, with intervals over pictures; `vars(summary)` is a row for `markdown_table`.

    Attributes:
        slope: mean slope, in nats per unit of alpha.
        anti: share of anti-steerable inputs.
        rank: mean of the inputs' rank correlations; `rank_of_mean` is that of the mean curve.
        r2: mean of the inputs' r2.
    """

    slope: Interval
    anti: Interval
    rank: Interval
    rank_of_mean: Interval
    r2: Interval


@dataclass(frozen=True)
class SlopeAgreement:
    """The slopes of the same inputs under two conditions: correlations, and mean slope of the second less the first."""

    pearson: Interval
    spearman: Interval
    difference: Interval


@dataclass(frozen=True, eq=False)
class Steerability:
    """Propensity of each input at each strength, (input, alpha), and what follows from it.

    Attributes:
        groups: the picture of each input, which intervals resample.
        behaviours: the behaviour of each pair.
        seed: of the intervals.
    """

    ids: tuple[str, ...]
    groups: tuple[str, ...]
    behaviours: tuple[str, ...]
    alphas: Float[np.ndarray, " alpha"]
    propensity: Float[np.ndarray, "input alpha"]
    seed: int = 0

    @property
    def slopes(self) -> Float[np.ndarray, " input"]:
        """Slope of the least-squares line of each input."""
        centred = self.alphas - self.alphas.mean()
        return self.propensity @ centred / (centred @ centred)

    @property
    def ranks(self) -> Float[np.ndarray, " input"]:
        """Spearman's correlation of alpha and propensity of each input."""
        return _along(_ranked(self.propensity), _ranked(self.alphas))

    @property
    def r2(self) -> Float[np.ndarray, " input"]:
        """Squared correlation of alpha and propensity of each input."""
        return _along(self.propensity, self.alphas) ** 2

    def select(self, behaviours: Sequence[str]) -> Steerability:
        """Return the inputs of some behaviours; raises InputError where there are none."""
        chosen = [row for row, name in enumerate(self.behaviours) if name in behaviours]
        if not chosen:
            raise InputError(
                f"no input has a behaviour of {list(behaviours)}; there are {sorted(set(self.behaviours))}."
            )
        ids, groups, names = (
            tuple(values[row] for row in chosen) for values in (self.ids, self.groups, self.behaviours)
        )
        return replace(self, ids=ids, groups=groups, behaviours=names, propensity=self.propensity[chosen])

    def curve(self, resamples: int = 2000, level: float = 0.95) -> list[Interval]:
        """Mean propensity at each alpha, intervals over pictures; raises InputError for fewer than two pictures."""
        return [self._interval(column, resamples, level) for column in self.propensity.T]

    def summary(self, resamples: int = 2000, level: float = 0.95) -> SteerabilitySummary:
        """Figures over all inputs; raises InputError for fewer than two pictures."""

        def of_mean(values: Values, weights: Values) -> Values:
            return _along(_ranked(weights @ values), _ranked(self.alphas))

        slopes = self.slopes
        rows = (slopes, (slopes < 0).astype(float), self.ranks, self.r2)
        slope, anti, rank, r2 = (self._interval(values, resamples, level) for values in rows)
        mean = bootstrap_interval(
            self.propensity, self.groups, of_mean, seed=self.seed, resamples=resamples, level=level
        )
        return SteerabilitySummary(slope, anti, rank, mean, r2)

    def agreement(self, other: Steerability, resamples: int = 2000, level: float = 0.95) -> SlopeAgreement:
        """Compare slopes with those of the same inputs under another condition, such as other wordings.

        Raises InputError for other ids, or fewer than two pictures.
        """
        if self.ids != other.ids:
            odd = next((a for a, b in zip(self.ids, other.ids, strict=False) if a != b), len(other.ids))
            raise InputError(
                f"the conditions hold other inputs (first difference: {odd!r}); give the same ids in order."
            )
        table = np.stack([self.slopes, other.slopes], axis=1)

        def pearson(values: Values, weights: Values) -> Values:
            return _weighted(values[:, 0], values[:, 1], weights)

        def spearman(values: Values, weights: Values) -> Values:
            return _weighted(_weighted_ranks(values[:, 0], weights), _weighted_ranks(values[:, 1], weights), weights)

        first, second = (
            bootstrap_interval(table, self.groups, one, seed=self.seed, resamples=resamples, level=level)
            for one in (pearson, spearman)
        )
        return SlopeAgreement(first, second, self._interval(table[:, 1] - table[:, 0], resamples, level))

    def to_frame(self) -> DataFrame:
        """One row for each input and alpha, with the input's slope, rank and r2; FrameworkError without pandas."""
        width, each = len(self.alphas), {"slope": self.slopes, "rank": self.ranks, "r2": self.r2}
        names = {"id": self.ids, "picture": self.groups, "behaviour": self.behaviours}
        return analysis_module("pandas").DataFrame(
            {
                **{name: np.repeat(np.array(values), width) for name, values in names.items()},
                "alpha": np.tile(self.alphas, len(self.ids)),
                "propensity": self.propensity.ravel(),
                **{name: np.repeat(values, width) for name, values in each.items()},
            }
        )

    def plot(self, title: str = "") -> Figure:
        """Draw the mean curve among those of the inputs, and the slopes; FrameworkError without matplotlib."""
        figure = new_figure(8.0, 3.5)
        curves, slopes = figure.subplots(1, 2)
        _draw_curves(curves, self)
        _draw_slopes(slopes, self.slopes)
        if title:
            figure.suptitle(title)
        return figure

    def _interval(self, values: Float[np.ndarray, " input"], resamples: int, level: float) -> Interval:
        return bootstrap_interval(values, self.groups, seed=self.seed, resamples=resamples, level=level)


def steerability(
    vlm: AttachedModel,
    steering: Steering,
    pairs: Sequence[ContrastivePair],
    alphas: Sequence[float] = ALPHAS,
    *,
    suffix: bool = False,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
    out: Path | str | None = None,
) -> Steerability:
    """Measure every pair at every multiple of the steering's own strength; resumable in the folder `out`.

    `steering` is one for all, or made from the ids of each batch. Openings are read behind the prompt alone, as at test
    time, or behind prompt and `suffix`.

    Raises:
        InputError: no processor, fewer than two alphas, pairs without ids of their own, a steering that cannot be
            scaled or that changes from step to step.
        JobError: `out` holds another job, or one of another steering.
    """
    found = propensities(vlm, steering, pairs, alphas, suffix=suffix, batch_size=batch_size, progress=progress, out=out)
    return Steerability(
        tuple(pair.id for pair in pairs),
        tuple(_picture(pair) for pair in pairs),
        tuple(pair.behaviour for pair in pairs),
        np.array([float(alpha) for alpha in alphas]),
        found,
        seed,
    )


def _picture(pair: ContrastivePair) -> str:
    """What tells the pictures of two pairs apart: paths, or pixels; a pair without any stands for itself."""
    digest = hashlib.sha256()
    for image in pair.images:
        digest.update(str(image).encode() if isinstance(image, Path) else image.convert("RGB").tobytes())
    return digest.hexdigest()[:16] if pair.images else pair.id


# -- correlations; 0 where one side is constant ----------------------------------------------------------------------


def _ranked(values: Float[np.ndarray, "*row alpha"]) -> Values:
    """Ranks along the last axis, equal values sharing their mean rank."""
    one, other = values[..., :, None], values[..., None, :]
    return (other < one).sum(-1) + ((other == one).sum(-1) + 1) / 2


def _along(rows: Float[np.ndarray, "row alpha"], line: Float[np.ndarray, " alpha"]) -> Values:
    """Correlation of each row with a line."""
    return _weighted(rows, line[None], np.ones_like(rows))


def _weighted(first: Values, second: Values, weights: Float[np.ndarray, "resample row"]) -> Values:
    """Pearson's correlation over the last axis, each column counted as often as its weight says."""
    total = weights.sum(-1, keepdims=True)
    one, two = (values - (weights * values).sum(-1, keepdims=True) / total for values in (first, second))
    spread = np.sqrt((weights * one**2).sum(-1) * (weights * two**2).sum(-1))
    # What is left of a constant after its mean is rounding, not spread.
    least = 1e-12 * total[..., 0] * np.abs(first).max(-1) * np.abs(second).max(-1)
    product = (weights * one * two).sum(-1)
    return np.divide(product, spread, out=np.zeros_like(product), where=spread > least)


def _weighted_ranks(values: Float[np.ndarray, " row"], weights: Float[np.ndarray, "resample row"]) -> Values:
    """Ranks of a column among as many copies of its rows as the weights say, (resample, row)."""
    _, places = np.unique(values, return_inverse=True)
    mass = np.zeros((len(weights), int(places.max()) + 1))
    np.add.at(mass.T, places, weights.T)
    return (mass.cumsum(axis=1) - mass / 2)[:, places] + 0.5


# -- pictures --------------------------------------------------------------------------------------------------------


def _draw_curves(axes: Axes, found: Steerability) -> None:
    """Mean with its interval, dark; the middle 80 % of the inputs, light, with their median."""
    alphas, curve = found.alphas, found.curve()
    low, middle, high = np.quantile(found.propensity, [0.1, 0.5, 0.9], axis=0)
    axes.fill_between(alphas, low, high, color="0.88", linewidth=0, label="10-90 % of inputs")
    axes.plot(alphas, middle, color="0.45", linestyle="--", linewidth=1, label="median input")
    axes.fill_between(alphas, [c.low for c in curve], [c.high for c in curve], color="0.6", linewidth=0)
    axes.plot(alphas, [c.value for c in curve], color="black", marker="o", markersize=4, label="mean (95 %)")
    axes.axhline(0, color="0.3", linewidth=0.6)
    axes.set_xlabel("strength (times the steering's own)")
    axes.set_ylabel("log odds of the positive opening")
    _finish(axes)


def _draw_slopes(axes: Axes, slopes: Float[np.ndarray, " input"]) -> None:
    """Histogram with an edge at 0; what lies below it is hatched."""
    lowest, highest = min(0.0, float(slopes.min())), max(0.0, float(slopes.max()))
    width = (highest - lowest) / 24 or 1.0
    edges = np.arange(np.floor(lowest / width), np.ceil(highest / width) + 1) * width
    anti = slopes < 0
    share = f"anti-steerable: {100 * anti.mean():.0f} %"
    axes.hist(slopes[~anti], bins=edges, color="0.8", edgecolor="0.4", linewidth=0.5, label="steerable")
    axes.hist(slopes[anti], bins=edges, color="0.35", edgecolor="white", hatch="///", linewidth=0.5, label=share)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axvline(float(slopes.mean()), color="black", linestyle=":", linewidth=1.2, label="mean")
    axes.set_xlabel("slope (nats per unit of strength)")
    axes.set_ylabel("inputs")
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    # Above the axes: curves and bars leave no corner free for sure.
    axes.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0,
                columnspacing=1.2, handlelength=1.6)  # fmt: skip
