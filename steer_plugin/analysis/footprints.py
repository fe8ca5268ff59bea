"""Where a steering acts: how far it moves the stream, layer by layer and class by class, and along which direction.

moved(layer, part) = mean |h_steered - h| / mean |h|       along = cos(h_steered - h, v)       h.v / |v| by token
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steer_plugin.adapters import AttachedModel
from steer_plugin.analysis._figure import Look, heat, layer_ticks, new_figure, tidy
from steer_plugin.analysis._frames import frame, over, spread
from steer_plugin.analysis.tokens import PARTS, Parts, Tokens, masks_of
from steer_plugin.errors import InputError
from steer_plugin.intervention import Steerable
from steer_plugin.pictures import Pictures
from steer_plugin.sites import Site, resid_post

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
else:
    DataFrame = Figure = object  # imported when needed; run-time type checkers look these names up


@dataclass(frozen=True)
class Footprint:
    """How far a steering moves the stream.

    Attributes:
        sites, parts: where it was looked at.
        stream: (site, part, row) mean norm of the unsteered stream over the part's tokens.
        moved: (site, part, row) mean norm of the change.
        along: (site, part, row) mean cosine of the change with a direction; NaN without one, or without change.
        seed: of the bootstrap.
    """

    sites: tuple[Site, ...]
    parts: tuple[str, ...]
    stream: Float[Tensor, "site part row"]
    moved: Float[Tensor, "site part row"]
    along: Float[Tensor, "site part row"]
    seed: int = 0

    @property
    def relative(self) -> Float[Tensor, "site part row"]:
        """Norm of the change in units of the stream's."""
        return self.moved / self.stream

    def to_frame(self) -> DataFrame:
        """Write a line per site and part: norms, the relative change with its 95 % interval over rows, the cosine."""
        mean, low, high = spread(self.relative.double().numpy(), self.seed)
        cells = [(i, j) for i in range(len(self.sites)) for j in range(len(self.parts))]
        along = self.along.nanmean(-1)
        return frame(
            {
                "site": [str(self.sites[i]) for i, _ in cells],
                "layer": [self.sites[i].layer for i, _ in cells],
                "part": [self.parts[j] for _, j in cells],
                "stream_norm": self.stream.mean(-1).reshape(-1).numpy(),
                "change_norm": self.moved.mean(-1).reshape(-1).numpy(),
                "relative": mean.reshape(-1),
                "low": low.reshape(-1),
                "high": high.reshape(-1),
                "cosine": along.reshape(-1).numpy(),
            }
        )

    def plot(self) -> Figure:
        """Draw the relative change by layer, a line per part with 95 % intervals over rows.

        Raises:
            FrameworkError: matplotlib is missing.
        """
        figure = new_figure(7.0, 3.4)
        axes = figure.subplots()
        layers = np.array([site.layer or 0 for site in self.sites])
        mean, low, high = spread(self.relative.double().numpy(), self.seed)
        for number, part in enumerate(self.parts):
            ends = np.stack([mean[:, number] - low[:, number], high[:, number] - mean[:, number]])
            look = Look.of(number)
            axes.errorbar(
                layers + 0.05 * number, mean[:, number], None if np.isnan(ends).any() else ends.clip(0), label=part,
                color=look.color, marker=look.marker, markersize=5, capsize=2, linewidth=1.2,
            )  # fmt: skip
        axes.set_xticks(sorted(set(layers.tolist())))
        axes.set_xlabel("layer")
        axes.set_ylabel("|change| / |stream|")
        axes.set_title(over(self.moved.shape[-1], "prompt"), fontsize=9)
        tidy(axes, zero=True)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return figure


def footprint(
    vlm: AttachedModel,
    inputs: Mapping[str, Tensor],
    steering: Steerable,
    sites: Sequence[Site | str] | None = None,
    parts: Parts = PARTS,
    *,
    direction: Float[Tensor, " d_model"] | None = None,
    seed: int = 0,
) -> Footprint:
    """Compare the steered with the unsteered stream; `sites`: resid_post of every layer by default.

    Raises:
        InputError: parts without tokens, a direction of another width.
        SiteError, PositionError: unknown places.
    """
    places = _places(vlm, sites, direction)
    masks = masks_of(vlm.layout(inputs), parts)
    plain, steered = vlm.observe(inputs, places), vlm.observe(inputs, places, steering)
    cells: list[Tensor] = []
    for site in places:
        before, change = plain.at[site].float(), steered.at[site].float() - plain.at[site].float()
        length = change.norm(dim=-1)
        if direction is None:
            along = torch.full_like(length, torch.nan)
        else:
            along = torch.cosine_similarity(change, direction.to(change), dim=-1)
            along = torch.where(length > 0, along, torch.nan)
        by_token = torch.stack([before.norm(dim=-1), length, along])
        cells.append(torch.stack([_over(by_token, mask) for mask in masks.values()], 1).cpu())
    stream, moved, along = torch.stack(cells, 1)
    return Footprint(tuple(places), tuple(masks), stream, moved, along, seed)


def _places(vlm: AttachedModel, sites: Sequence[Site | str] | None, direction: Tensor | None) -> list[Site]:
    asked = [resid_post(layer) for layer in range(vlm.n_layers)] if sites is None else sites
    found = sorted({vlm.parts.resolve(Site.parse(site)) for site in asked}, key=lambda site: site.order)
    if not found or any(site.in_vision for site in found):
        raise InputError("name sites of the decoder, as in [sp.resid_post(14)]; parts are of the prompt's tokens.")
    if direction is not None and tuple(direction.shape) != (vlm.d_model,):
        raise InputError(f"the direction has shape {tuple(direction.shape)}, expected ({vlm.d_model},).")
    return found


def _over(values: Float[Tensor, "what row pos"], mask: Tensor) -> Float[Tensor, "what row"]:
    """Mean over a part's tokens of each row; NaN in a row without any."""
    chosen = torch.where(mask.to(values.device), values, torch.nan)
    return chosen.nanmean(-1)


@dataclass(frozen=True, repr=False)
class Projection:
    """Projections of the stream on a direction, token by token.

    Attributes:
        sites: where the stream was read.
        values: (site, row, pos) h.v / |v|.
        tokens: what the tokens are.
    """

    sites: tuple[Site, ...]
    values: Float[Tensor, "site row pos"]
    tokens: Tokens

    def to_frame(self) -> DataFrame:
        """Write a line per site, row and token: word, class, projection."""
        rows = range(len(self.tokens.words))
        cells = [(s, r, c) for s in range(len(self.sites)) for r in rows for c in self.tokens.columns(r)]
        return frame(
            {
                "site": [str(self.sites[s]) for s, _, _ in cells],
                "layer": [self.sites[s].layer for s, _, _ in cells],
                "row": [r for _, r, _ in cells],
                "token": [c for _, _, c in cells],
                "word": [self.tokens.words[r][c] for _, r, c in cells],
                "class": [self.tokens.classes[r][c] for _, r, c in cells],
                "projection": [float(self.values[s, r, c]) for s, r, c in cells],
            }
        )

    def plot(self, row: int = 0) -> Figure:
        """Draw layers upwards and the tokens of one row to the right.

        Raises:
            InputError: no such row.
            FrameworkError: matplotlib is missing.
        """
        columns = self.tokens.columns(row)
        figure = new_figure(min(16.0, 2.5 + 0.3 * len(columns)), 1.9 + 0.3 * min(40, len(self.sites)))
        axes = figure.subplots()
        image = heat(axes, self.values[:, row, columns].double().numpy(), written="")
        layer_ticks(axes, [site.layer or 0 for site in self.sites])
        self.tokens.label(axes, row)
        figure.colorbar(image, ax=axes, label="projection on the direction")
        return figure

    def plot_image(self, pictures: Pictures, site: Site | str, row: int = 0) -> Figure:
        """Draw the projections of a row's image tokens on its pictures.

        Raises:
            InputError: a site that was not read, a row without pictures.
        """
        where = Site.parse(site)
        if where not in self.sites:
            raise InputError(f"the projection was not read at {where}, but at {', '.join(map(str, self.sites))}.")
        values = self.values[self.sites.index(where)]
        return self.tokens.draw_on(pictures, values, f"projection on the direction, {where}", row)


def project(
    vlm: AttachedModel,
    inputs: Mapping[str, Tensor],
    direction: Float[Tensor, " d_model"],
    sites: Sequence[Site | str] | None = None,
    steering: Steerable | None = None,
) -> Projection:
    """Project the stream on a direction at every token, steered or not; `sites`: all layers' outputs by default.

    Raises:
        InputError: a direction of another width or of length zero.
        SiteError: unknown sites.
    """
    places = _places(vlm, sites, direction)
    if not bool(direction.any()):
        raise InputError("the direction is all zero, so nothing projects on it.")
    seen = vlm.observe(inputs, places, steering)
    unit = direction.float() / direction.float().norm()
    values = torch.stack([(seen.at[site].float() @ unit.to(seen.at[site].device)).cpu() for site in places])
    return Projection(tuple(places), values, Tokens.of(vlm, inputs))
