"""Yes/no answers as numbers: the measures of POPE (arXiv 2305.10355), per subset and over all of them.

    accuracy = (TP + TN) / n     precision = TP / (TP + FP)     recall = TP / (TP + FN)     F1 = 2 TP / (2 TP + FP + FN)
    yes-ratio = (TP + FP) / n    of the predictions: that of the labels says nothing about the model
    accuracy (L2S) = a           by Learn-to-Steer's own parsing (arXiv 2508.12815)
    F1 (L2S) = 2a / (1 + a)      every label is taken as True, so precision is 1 and recall is a

Yes is the positive class, a ratio without a denominator is 0. F1 and F1 (L2S) are not comparable: hence two names.
Over all subsets ("mean") a figure is the mean of the subsets' own, which for ratios such as F1 is not the pooled one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from steer_plugin.errors import InputError
from steer_plugin.evaluation.benchmark import Better
from steer_plugin.evaluation.intervals import Statistic, SumStatistic, Values, f1, mean, ratio
from steer_plugin.evaluation.parsing import clear_answer, l2s_correct, pope_answer
from steer_plugin.evaluation.pope import PopeItem

WHOLE = "mean"


def _l2s_f1(sums: Float[np.ndarray, "resample 2"]) -> Values:
    accuracy = mean.of(sums)
    return 2 * accuracy / (1 + accuracy)


# 2a / (1 + a) of each resample's own accuracy a.
l2s_f1 = SumStatistic(mean.columns, _l2s_f1)


# Measures of yes/no answers: name, statistic, and which way is good.
MEASURES: tuple[tuple[str, Statistic, Better], ...] = (
    ("accuracy", mean, "higher"),
    ("F1", f1, "higher"),
    ("precision", ratio, "higher"),
    ("recall", ratio, "higher"),
    ("yes-ratio", mean, "neither"),
    ("well-formed", mean, "higher"),
    ("accuracy (L2S)", mean, "higher"),
    ("F1 (L2S)", l2s_f1, "higher"),
)


# Of these the figure over all subsets is the mean of the subsets' own; of the others that is what pooling gives.
AVERAGED: Mapping[str, SumStatistic] = MappingProxyType(
    {"F1": f1, "precision": ratio, "recall": ratio, "F1 (L2S)": l2s_f1}
)


def averaged(statistic: SumStatistic) -> SumStatistic:
    """The mean of a statistic over subsets; columns are those of its sums, two for each subset."""

    def of(sums: Float[np.ndarray, "resample sum"]) -> Values:
        parts = [statistic.of(sums[:, start : start + 2]) for start in range(0, sums.shape[1], 2)]
        return np.asarray(np.mean(parts, axis=0))

    return SumStatistic(lambda values: values, of)


def of_part(part: str, measure: str, statistic: Statistic) -> Statistic:
    """The statistic of a measure in a part: over all subsets, that of the rows which `mean_rows` makes."""
    return averaged(AVERAGED[measure]) if part == WHOLE and measure in AVERAGED else statistic


def mean_rows(
    columns: Mapping[str, tuple[NDArray[np.float64], ...]], subsets: Sequence[Bool[np.ndarray, " item"]]
) -> dict[str, Float[np.ndarray, "item sum"]]:
    """Rows of the measures in `AVERAGED` over all subsets: two sums for each subset, 0 in those of the others."""
    found: dict[str, Float[np.ndarray, "item sum"]] = {}
    for measure, statistic in AVERAGED.items():
        sums = statistic.columns(np.stack(columns[measure], axis=1))
        found[f"{WHOLE} {measure}"] = np.concatenate([np.where(one[:, None], sums, 0.0) for one in subsets], axis=1)
    return found


def is_shown(measure: str, whole: bool) -> bool:
    """Whether a table has a column for it: accuracy and F1; of the whole also the yes-ratio and well-formed answers."""
    return measure in ("accuracy", "F1") or (whole and measure in ("yes-ratio", "well-formed"))


def parts_of(items: Sequence[PopeItem], whole: str = WHOLE) -> dict[str, Bool[np.ndarray, " item"]]:
    """Say of each subset, and of all of them under the name `whole`, which items are its; InputError for odd names."""
    for item in items:
        if item.subset in ("", whole):
            raise InputError(f"Question {item.id!r} has the subset {item.subset!r}: expected a name such as 'random'.")
    subsets = dict.fromkeys(item.subset for item in items)
    masks = {name: np.array([item.subset == name for item in items]) for name in subsets}
    return {**masks, whole: np.ones(len(items), dtype=bool)}


def yes_no_columns(said: Sequence[str], labels: NDArray[np.bool_]) -> dict[str, tuple[NDArray[np.float64], ...]]:
    """Return the columns of every one of `MEASURES`, one row per answer."""
    yes = np.array([pope_answer(text) for text in said], dtype=np.float64)
    true = labels.astype(np.float64)
    clear = np.array([clear_answer(text) is not None for text in said], dtype=np.float64)
    close = np.array([l2s_correct(text, bool(one)) for text, one in zip(said, labels, strict=True)], dtype=np.float64)
    return {
        "accuracy": ((yes == true).astype(np.float64),),
        "F1": (yes, true),
        "precision": (yes * true, yes),
        "recall": (yes * true, true),
        "yes-ratio": (yes,),
        "well-formed": (clear,),
        "accuracy (L2S)": (close,),
        "F1 (L2S)": (close,),
    }
