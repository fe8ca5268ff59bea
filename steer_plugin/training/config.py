"""Hyper-parameters of L2S fits, the authors' presets, and the report of a fit; light to import."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, cast, get_args

from steer_plugin.atomic import JSON
from steer_plugin.errors import InputError, nearest

Start = Literal["svd", "dictionary", "random"]
Keep = Literal["best", "last"]


@dataclass(frozen=True)
class FitConfig:
    """Hyper-parameters of a fit.

    Attributes:
        hidden: hidden units h.
        start: where the decoder starts: "svd" or "dictionary" directions of the targets, or "random".
        dictionary_penalty: what a unit of code costs in the dictionary's objective; scikit-learn's alpha.
        dictionary_turns: at most so many turns of codes and atoms; it ends earlier once a turn gains little.
        l1, cosine: weights of the L1 and the cosine term; `cosine_grows` scales the latter by epoch / epochs.
        warmup_epochs: linear warm-up, then a cosine to zero; None keeps the rate constant.
        balance: average the losses of the behaviours in a batch instead of those of its samples.
        keep: which epoch's weights to keep.
        validation_fraction: held out of the fit when no validation set is given.

    Raises:
        InputError: a value out of its range.
    """

    hidden: int = 100
    start: Start = "svd"
    dictionary_penalty: float = 1.0
    dictionary_turns: int = 50
    l1: float = 0.0
    cosine: float = 0.0
    cosine_grows: bool = False
    learning_rate: float = 1e-3
    warmup_epochs: int | None = None
    epochs: int = 100
    batch_size: int = 64
    balance: bool = False
    keep: Keep = "best"
    validation_fraction: float = 1 / 12

    def __post_init__(self) -> None:
        """Check every value before anything is fitted."""
        for name, known in (("start", get_args(Start)), ("keep", get_args(Keep))):
            if (given := str(getattr(self, name))) not in known:
                raise InputError(f"{name}={given!r} is unknown.{nearest(given, known)} Known: {', '.join(known)}.")
        least = {"hidden": 1, "epochs": 1, "batch_size": 1, "dictionary_turns": 0, "warmup_epochs": 0}
        least |= {"l1": 0, "cosine": 0, "learning_rate": 0, "dictionary_penalty": 0}
        for name, floor in least.items():
            value = getattr(self, name)
            if value is not None and not floor <= value < math.inf:
                raise InputError(f"{name}={value!r}: expected a finite number of at least {floor}.")
        if not 0 < self.validation_fraction < 1:
            raise InputError(
                f"validation_fraction={self.validation_fraction!r}: expected a share between 0 and 1, such as 1 / 12."
            )


PRESETS: Mapping[str, FitConfig] = {
    "pope": FitConfig(
        l1=1.0, cosine=0.1, cosine_grows=True, learning_rate=5e-5, warmup_epochs=50, balance=True, keep="best"
    ),
    "safety": FitConfig(start="dictionary", l1=1.0, cosine=0.1, learning_rate=1e-4, keep="last"),
    "fast": FitConfig(l1=1.0, cosine=0.1, learning_rate=1e-3, warmup_epochs=5, epochs=25),
    "mse": FitConfig(),
}


@dataclass(frozen=True)
class FitReport:
    """How a fit went.

    Attributes:
        train_loss, validation_loss: loss after each epoch.
        train_cosine, validation_cosine: mean cosine between prediction and target, kept weights.
        train_explained, validation_explained: share of the targets' energy that the predictions explain.
        mean_explained: the share that the mean of the training targets alone explains on validation.
        epoch: the epoch whose weights were kept.
        directions: decoder columns that started on directions of the targets; the others started at random.
        threads: of torch; another number may round otherwise.
    """

    config: FitConfig
    seed: int
    samples: int
    train_loss: tuple[float, ...]
    validation_loss: tuple[float, ...]
    train_cosine: float
    validation_cosine: float
    train_explained: float
    validation_explained: float
    mean_explained: float
    epoch: int
    directions: int
    threads: int

    def as_json(self) -> dict[str, JSON]:
        """Everything, as JSON; a share of no energy at all, which no number tells, is null."""
        found = cast("dict[str, JSON]", asdict(self))
        return {key: None if isinstance(one, float) and not math.isfinite(one) else one for key, one in found.items()}

    def __str__(self) -> str:
        """One line that tells whether the fit is worth anything."""
        return (
            f"L2S fit on {self.samples} samples, epoch {self.epoch} of {self.config.epochs}: loss "
            f"{self.train_loss[self.epoch - 1]:.4f} / validation {self.validation_loss[self.epoch - 1]:.4f}, cosine "
            f"{self.train_cosine:.3f} / {self.validation_cosine:.3f}, explained {self.validation_explained:.1%} of "
            f"P2S on validation (the mean alone: {self.mean_explained:.1%})"
        )


def fit_config(config: FitConfig | str) -> FitConfig:
    """Return a configuration or the preset of that name.

    Raises:
        InputError: unknown preset; the nearest is proposed.
    """
    if isinstance(config, FitConfig):
        return config
    if config not in PRESETS:
        raise InputError(f"unknown preset {config!r}.{nearest(config, PRESETS)} Known: {', '.join(PRESETS)}.")
    return PRESETS[config]


def preset(name: str, **changes: float | int | str | bool | None) -> FitConfig:
    """Return a preset with some fields changed, say learning_rate=1e-3.

    Raises:
        InputError: unknown preset or field, or a value out of its range.
    """
    known = [field.name for field in fields(FitConfig)]
    for one in changes:
        if one not in known:
            raise InputError(f"FitConfig has no field {one!r}.{nearest(one, known)} Known: {', '.join(known)}.")
    return replace(fit_config(name), **changes)  # pyright: ignore[reportArgumentType]
