"""Two interventions together against each alone.

    interaction = m[a + b] - m[a] - m[b] + m[none]              0: their effects add up
    interference(layer) = |D_ab - D_a - D_b| / (|D_a| + |D_b|)  D = change of the stream, at some tokens

Several metrics at once show whether one steering spoils what the other is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steer_plugin.adapters import AttachedModel
from steer_plugin.analysis._figure import COLOURS, MARKERS, new_figure, tidy
from steer_plugin.analysis._frames import frame, over, spread
from steer_plugin.analysis.metrics import Metric, measured
from steer_plugin.errors import InputError
from steer_plugin.intervention import Steerable
from steer_plugin.positions import Positions
from steer_plugin.sites import Site, resid_post

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
else:
    DataFrame = Figure = object  # imported when needed; run-time type checkers look these names up


@dataclass(frozen=True)
class Composition:
    """What two steerings do alone and together.

    Attributes:
        names: of the two.
        metrics: what was measured.
        values: (metric, case, row); cases: none, first, second, both.
        sites: layers' outputs at which the streams were compared.
        interference: (site, row) |D_ab - D_a - D_b| / (|D_a| + |D_b|); NaN where neither changes anything.
        cosine: (site, row) between D_a and D_b.
        seed: of the bootstrap.
    """

    names: tuple[str, str]
    metrics: tuple[str, ...]
    values: Float[Tensor, "metric 4 row"]
    sites: tuple[Site, ...]
    interference: Float[Tensor, "site row"]
    cosine: Float[Tensor, "site row"]
    seed: int

    @property
    def cases(self) -> tuple[str, str, str, str]:
        """How the four runs are called."""
        return ("none", *self.names, f"{self.names[0]} + {self.names[1]}")

    @property
    def interaction(self) -> Float[Tensor, "metric row"]:
        """What both do beyond the sum of what each does."""
        none, first, second, both = self.values.unbind(1)
        return both - first - second + none

    def to_frame(self) -> DataFrame:
        """Write a line per metric: the effect of each alone and of both, and the interaction, with 95 % intervals."""
        none = self.values[:, :1]
        effects = torch.cat([self.values[:, 1:] - none, self.interaction[:, None]], 1).double().numpy()
        mean, low, high = spread(effects, self.seed)
        columns: dict[str, object] = {"metric": list(self.metrics), "none": self.values[:, 0].mean(-1).numpy()}
        for number, name in enumerate((*self.cases[1:], "interaction")):
            columns |= {name: mean[:, number], f"{name} low": low[:, number], f"{name} high": high[:, number]}
        return frame(columns)  # pyright: ignore[reportArgumentType]

    def streams(self) -> DataFrame:
        """Write a line per layer: mean interference with its 95 % interval over prompts, and the changes' cosine."""
        mean, low, high = spread(self.interference.double().numpy(), self.seed)
        return frame(
            {
                "layer": [site.layer for site in self.sites], "interference": mean, "low": low, "high": high,
                "cosine": self.cosine.nanmean(-1).numpy(),
            }
        )  # fmt: skip

    def plot(self) -> Figure:
        """Draw effects on each metric with 95 % intervals; a hollow mark shows where the sum of the two would be.

        Raises:
            FrameworkError: matplotlib is missing.
        """
        count = len(self.metrics)
        figure = new_figure(2.6 * count + 0.6, 3.4)
        panels = figure.subplots(1, count, squeeze=False)[0]
        effects = (self.values[:, 1:] - self.values[:, :1]).double().numpy()
        mean, low, high = spread(effects, self.seed)
        for number, axes in enumerate(panels):
            for case in range(3):
                ends = np.array([[mean[number, case] - low[number, case]], [high[number, case] - mean[number, case]]])
                axes.errorbar(
                    [case], mean[number, case], None if np.isnan(ends).any() else ends.clip(0), fmt=MARKERS[case],
                    color=COLOURS[case], capsize=3, markersize=7,
                )  # fmt: skip
            axes.plot([2], mean[number, :2].sum(), "o", mfc="none", mec="black", markersize=11, label="sum of the two")
            axes.set_xticks(range(3), self.cases[1:], rotation=20, ha="right", rotation_mode="anchor")
            axes.set_xlim(-0.5, 2.5)
            axes.set_title(self.metrics[number], fontsize=9)
            tidy(axes, zero=True)
        panels[0].set_ylabel("effect: steered minus unsteered")
        figure.suptitle(over(self.values.shape[-1], "prompt"), fontsize=9)
        panels[-1].legend(frameon=False, fontsize=8)
        return figure


def compose(
    vlm: AttachedModel,
    inputs: Mapping[str, Tensor],
    steerings: Mapping[str, Steerable],
    metrics: Mapping[str, Metric],
    positions: Positions | str = "last_prompt",
    *,
    seed: int = 0,
) -> Composition:
    """Run prompts with neither, each, and both of two steerings; streams are compared at `positions` behind each layer.

    Raises:
        InputError: not two steerings, no metrics, a metric that does not give one number per row.
        PositionError: a row without such a token.
    """
    if len(steerings) != 2 or not metrics:
        raise InputError(
            f"compose takes two steerings and at least one metric, got {len(steerings)} and {len(metrics)}."
        )
    first, second = steerings.values()
    sites = [resid_post(layer) for layer in range(vlm.n_layers)]
    runs = [vlm.observe(inputs, sites, steering) for steering in (None, first, second, [first, second])]
    values = torch.stack([torch.stack([measured(m, run).cpu() for run in runs]) for m in metrics.values()])
    mask = Positions.parse(positions).mask(runs[0].layout)
    if not bool(mask.any(1).all()):
        raise InputError(f"row {int((~mask.any(1)).nonzero()[0])} has no token at {str(positions)!r}.")
    apart: list[Tensor] = []
    alike: list[Tensor] = []
    for site in sites:
        none, one, two, both = (_chosen(run.at[site], mask) for run in runs)
        first_, second_ = one - none, two - none
        apart.append(((both - one - two + none).norm(dim=-1) / (first_.norm(dim=-1) + second_.norm(dim=-1))).cpu())
        alike.append(torch.cosine_similarity(first_, second_, dim=-1).cpu())
    names = tuple(steerings)
    return Composition(
        (names[0], names[1]), tuple(metrics), values.float(), tuple(sites), torch.stack(apart),
        torch.stack(alike), seed,
    )  # fmt: skip


def _chosen(hidden: Float[Tensor, "row pos d_model"], mask: Tensor) -> Float[Tensor, "row features"]:
    """All chosen tokens of each row as one long vector, zeros elsewhere."""
    return torch.where(mask[..., None].to(hidden.device), hidden.float(), 0.0).flatten(1)
