"""Activations of one forward: Site -> (row, pos, d_model), the selected tokens of each row, left-aligned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steer_plugin.errors import SiteError
from steer_plugin.sites import Site


@dataclass(repr=False)
class Activations(Mapping[Site, Tensor]):
    """What `vlm.cache` returns: one (row, pos, d_model) tensor per site, with a mask for ragged rows.

    Attributes:
        mask: (row, pos) True where a row really has that many selected tokens.
        columns: (row, pos) column of each selected token in the forward; -1 where the mask is False.
        depths: decoder and vision layers of the model, so that resid_post(-1) finds the last one.
    """

    mask: Bool[Tensor, "row pos"]
    columns: Int[Tensor, "row pos"]
    depths: tuple[int, int]
    values: dict[Site, Float[Tensor, "row pos d_model"]] = field(default_factory=dict)  # pyright: ignore[reportIncompatibleMethodOverride]

    def __repr__(self) -> str:
        """Name sites and shapes, not numbers."""
        return f"Activations({', '.join(f'{site}: {tuple(self.values[site].shape)}' for site in self)})"

    def __getitem__(self, site: Site | str) -> Float[Tensor, "row pos d_model"]:
        """Return the activations at a site, or at its text such as "resid_post.14"."""
        key = Site.parse(site).resolve(*self.depths)
        if key not in self.values:
            raise SiteError(f"{key} was not cached; cached: {', '.join(map(str, self.values))}.")
        return self.values[key]

    def __iter__(self) -> Iterator[Site]:
        """Iterate over the cached sites in order of execution."""
        return iter(sorted(self.values, key=lambda site: site.order))

    def __len__(self) -> int:
        """Number of cached sites."""
        return len(self.values)


def gather(
    hidden: Float[Tensor, "row pos d_model"], mask: Bool[Tensor, "row pos"]
) -> tuple[Float[Tensor, "row picked d_model"], Bool[Tensor, "row picked"], Int[Tensor, "row picked"]]:
    """Left-align the masked tokens of each row; empty places are zero."""
    width = int(mask.sum(-1).max())
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    order = torch.where(mask, columns, mask.shape[1]).sort(-1).values[:, :width]
    kept = order < mask.shape[1]
    index = order.clamp(max=mask.shape[1] - 1).to(hidden.device)
    picked = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
    return picked * kept[..., None].to(hidden), kept, torch.where(kept, order, -1)
