"""Linear probes: what can be read off the stream, where, and whether steering moves it.

    accuracy = cross-validated share of right answers        selectivity = accuracy - accuracy on the control task

The control task gives each type of input a label by lot (Hewitt and Liang 2019, arXiv 1909.03368): what a probe learns
of it is memory, not what the stream represents. Logistic regression on standardised values, by scikit-learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from steer_plugin.analysis._figure import Look, new_figure, tidy
from steer_plugin.analysis._frames import frame, over, spread
from steer_plugin.analysis.reading import PartMeans, Place
from steer_plugin.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
else:
    DataFrame = Figure = object  # imported when needed; run-time type checkers look these names up

_DRAWS = 3  # of the control task
Labels = Sequence[int] | Sequence[bool] | Sequence[str]


@dataclass(frozen=True, repr=False)
class Probes:
    """A probe for each place, its accuracy by fold, and that of the same probe on the control task.

    Attributes:
        places: (site, part) of each probe.
        classes: the labels, in order; of two, the second is the positive one.
        accuracy, control: (place, fold).
        majority: share of the commonest label, what guessing reaches.
        fitted: a probe on all samples for each place.
        seed: of folds and control labels.
    """

    places: tuple[Place, ...]
    classes: tuple[str, ...]
    accuracy: Float[np.ndarray, "place fold"]
    control: Float[np.ndarray, "place fold"]
    majority: float
    fitted: tuple[Pipeline, ...]
    seed: int

    def __repr__(self) -> str:
        """Name the best place."""
        best = int(self.accuracy.mean(1).argmax())
        site, part = self.places[best]
        return (
            f"Probes({len(self.places)} places; best {self.accuracy[best].mean():.2f} at {site} on {part!r}, "
            f"selectivity {(self.accuracy - self.control)[best].mean():.2f}, guessing {self.majority:.2f})"
        )

    def to_frame(self) -> DataFrame:
        """Write a line per place: accuracy and control (mean and standard deviation over folds), selectivity."""
        return frame(
            {
                "site": [str(site) for site, _ in self.places],
                "layer": [site.layer for site, _ in self.places],
                "part": [part for _, part in self.places],
                "accuracy": self.accuracy.mean(1),
                "std": self.accuracy.std(1),
                "control": self.control.mean(1),
                "control_std": self.control.std(1),
                "selectivity": (self.accuracy - self.control).mean(1),
            }
        )

    def plot(self) -> Figure:
        """Draw accuracy by layer, a line per kind and part (bars: smallest and largest fold), controls grey.

        Raises:
            FrameworkError: matplotlib is missing.
        """
        figure = new_figure(7.4, 3.6)
        axes = figure.subplots()
        lines = list(dict.fromkeys((site.kind, part) for site, part in self.places))
        for number, (kind, part) in enumerate(lines):
            rows = [k for k, (site, one) in enumerate(self.places) if (site.kind, one) == (kind, part)]
            layers = np.array([self.places[row][0].layer or 0 for row in rows]) + 0.05 * number
            look = Look.of(number)
            for values, colour, label in (
                (self.accuracy[rows], look.color, f"{kind}, {part}"),
                (self.control[rows], "0.65", "control task" if not number else None),
            ):
                middle = values.mean(1)
                ends = np.stack([middle - values.min(1), values.max(1) - middle])
                axes.errorbar(
                    layers, middle, ends, label=label, color=colour, marker=look.marker, markersize=4, capsize=2
                )
        axes.axhline(self.majority, color="0.4", linewidth=0.8, linestyle=":", label="commonest label")
        axes.set_xticks(sorted({site.layer or 0 for site, _ in self.places}))
        axes.set_xlabel("layer")
        axes.set_ylabel("accuracy on held-out folds")
        axes.set_title(f"mean of {self.accuracy.shape[1]} folds, bars from the smallest to the largest", fontsize=9)
        tidy(axes)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return figure

    def direction(self, place: Place) -> Float[Tensor, " d_model"]:
        """Direction along which a probe of two classes reads, in units of the stream: towards the second class.

        Raises:
            InputError: an unknown place, or more than two classes.
        """
        scaler, model = self._steps(place)
        return torch.from_numpy(np.asarray(model.coef_[0]) / np.asarray(scaler.scale_)).float()

    def _steps(self, place: Place) -> tuple[StandardScaler, LogisticRegression]:
        if len(self.classes) != 2:
            raise InputError(f"this needs probes of two classes; these have {len(self.classes)}.")
        if place not in self.places:
            known = ", ".join(f"({site}, {part!r})" for site, part in self.places)
            raise InputError(f"no probe at {place}; there are {known}.")
        steps = self.fitted[self.places.index(place)]
        return cast("StandardScaler", steps[0]), cast("LogisticRegression", steps[1])

    def moved(self, before: PartMeans, after: PartMeans) -> ProbeShift:
        """Ask what the probes say of the same prompts before and after steering (both from `read_parts`).

        Use prompts that the probes were not fitted on.

        Raises:
            InputError: more than two classes, or a place that was not read.
        """
        said: list[np.ndarray] = []
        for place in self.places:
            scaler, model = self._steps(place)
            if place not in before or place not in after:
                raise InputError(
                    f"({place[0]}, {place[1]!r}) was not read before and after; give read_parts these sites and parts."
                )
            said.append(
                np.stack([model.decision_function(scaler.transform(one[place].numpy())) for one in (before, after)])
            )
        values = np.stack(said)
        return ProbeShift(self.places, self.classes, values[:, 0], values[:, 1], self.seed)


@dataclass(frozen=True)
class ProbeShift:
    """What probes of two classes say before and after steering, as log odds of the second class.

    Attributes:
        places: (site, part) of each probe.
        classes: the two labels.
        before, after: (place, prompt).
        seed: of the bootstrap.
    """

    places: tuple[Place, ...]
    classes: tuple[str, ...]
    before: Float[np.ndarray, "place prompt"]
    after: Float[np.ndarray, "place prompt"]
    seed: int

    def to_frame(self) -> DataFrame:
        """Write a line per place: mean log odds, their change with its 95 % interval, share of prompts that flip."""
        mean, low, high = spread(self.after - self.before, self.seed)
        return frame(
            {
                "site": [str(site) for site, _ in self.places],
                "layer": [site.layer for site, _ in self.places],
                "part": [part for _, part in self.places],
                "before": self.before.mean(1),
                "after": self.after.mean(1),
                "change": mean,
                "low": low,
                "high": high,
                "flipped": ((self.before > 0) != (self.after > 0)).mean(1),
            }
        )

    def plot(self) -> Figure:
        """Draw the change of the log odds by layer, a line per kind and part with 95 % intervals over prompts.

        Raises:
            FrameworkError: matplotlib is missing.
        """
        figure = new_figure(6.0, 3.4)
        axes = figure.subplots()
        mean, low, high = spread(self.after - self.before, self.seed)
        for number, (kind, part) in enumerate(dict.fromkeys((site.kind, part) for site, part in self.places)):
            rows = [k for k, (site, one) in enumerate(self.places) if (site.kind, one) == (kind, part)]
            layers = np.array([self.places[row][0].layer or 0 for row in rows]) + 0.05 * number
            ends = np.stack([mean[rows] - low[rows], high[rows] - mean[rows]])
            look = Look.of(number)
            axes.errorbar(
                layers, mean[rows], None if np.isnan(ends).any() else ends.clip(0), label=f"{kind}, {part}",
                color=look.color, marker=look.marker, markersize=5, capsize=2,
            )  # fmt: skip
        axes.set_xticks(sorted({site.layer or 0 for site, _ in self.places}))
        axes.set_xlabel("layer")
        axes.set_ylabel(f"change of the log odds of {self.classes[1]!r}")
        axes.set_title(over(self.before.shape[1], "prompt"), fontsize=9)
        tidy(axes, zero=True)
        axes.legend(frameon=False, fontsize=8)
        return figure


def probe(
    values: PartMeans,
    labels: Labels,
    *,
    types: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    folds: int = 5,
    strength: float = 1.0,
    seed: int = 0,
) -> Probes:
    """Fit a probe at every place.

    Args:
        values: from `read_parts` or `image_deltas`.
        labels: one per prompt.
        types: what the control task gives labels to, such as the noun that is asked for; each prompt by default.
        groups: prompts that must not be parted between folds, such as those about one picture.
        folds: of the cross-validation.
        strength: scikit-learn's C; smaller is more regular.
        seed: of folds and control labels.

    Raises:
        InputError: no values, other numbers of labels, a single class, or a class with fewer samples than folds.
    """
    names = np.array([str(label) for label in labels])
    classes, counts = np.unique(names, return_counts=True)
    for what, given in (("labels", names), ("types", types), ("groups", groups)):
        for place, found in values.items():
            if given is not None and len(given) != len(found):
                raise InputError(f"got {len(given)} {what} for {len(found)} prompts at {place[0]}; give one for each.")
    if not values or len(classes) < 2 or folds < 2 or counts.min() < folds:
        raise InputError(
            f"a probe with {folds} folds needs values, and two classes of at least {max(folds, 2)} samples; got "
            f"{len(values)} places and {dict(zip(classes.tolist(), counts.tolist(), strict=True))}."
        )
    if groups is not None and len(set(groups)) < folds:
        raise InputError(f"{len(set(groups))} groups cannot be parted into {folds} folds; give fewer folds.")
    values = {place: found.detach().float().cpu() for place, found in values.items()}
    kinds = [str(i) for i in range(len(names))] if types is None else [str(one) for one in types]
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    if groups is not None:
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    parted = list(splitter.split(names, names, None if groups is None else np.array(groups)))
    accuracy = np.stack([_scores(found, names, parted, strength) for found in values.values()])
    lots = _lots(names, kinds, seed)
    control = np.stack(
        [np.mean([_scores(found, lot, parted, strength) for lot in lots], 0) for found in values.values()]
    )
    fitted = tuple(_model(strength).fit(found.numpy(), names) for found in values.values())
    majority = float(counts.max() / counts.sum())
    return Probes(tuple(values), tuple(classes.tolist()), accuracy, control, majority, fitted, seed)


def _lots(names: np.ndarray, kinds: Sequence[str], seed: int) -> list[np.ndarray]:
    """Labels by lot for each type, as often as the task has them; several draws, since one may be easy by chance."""
    draw = np.random.default_rng(seed)
    known = list(dict.fromkeys(kinds))
    spread_out = np.sort(names)[np.linspace(0, len(names) - 1, len(known)).round().astype(int)]
    out: list[np.ndarray] = []
    for _ in range(_DRAWS):
        labels = dict(zip(known, draw.permutation(spread_out).tolist(), strict=True))
        out.append(np.array([labels[kind] for kind in kinds]))
    return out


def _model(strength: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))


def _scores(
    values: Float[Tensor, "prompt d_model"],
    labels: np.ndarray,
    parted: Sequence[tuple[np.ndarray, np.ndarray]],
    strength: float,
) -> Float[np.ndarray, " fold"]:
    """Accuracy on each held-out fold; where a fold trains on one label only, guessing that one."""
    x, out = values.numpy(), list[float]()
    for train, test in parted:
        if len(np.unique(labels[train])) < 2:
            out.append(float((labels[test] == labels[train][0]).mean()))
            continue
        model = _model(strength).fit(x[train], labels[train])
        out.append(float((model.predict(x[test]) == labels[test]).mean()))
    return np.array(out)
