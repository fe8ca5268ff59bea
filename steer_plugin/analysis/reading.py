"""Activations of many prompts, one vector per prompt, site and part: what probes are fitted on.

    value(prompt, site, part) = mean over the part's tokens of h at the site
    image delta               = value with the picture - value of the same prompt without it

The delta follows TaskTracker (Abdelnabi et al. 2024, arXiv 2406.00799), which takes a task with and without data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from steer_plugin.adapters import AttachedModel
from steer_plugin.analysis.tokens import Parts, masks_of
from steer_plugin.errors import InputError
from steer_plugin.intervention import Steerable
from steer_plugin.sites import Site

Place: TypeAlias = tuple[Site, str]
PartMeans: TypeAlias = dict[Place, Float[Tensor, "prompt d_model"]]
Batches: TypeAlias = Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]


def read_parts(
    vlm: AttachedModel,
    inputs: Batches,
    sites: Sequence[Site | str],
    parts: Parts = ("last_prompt",),
    steering: Steerable | None = None,
    *,
    progress: bool = True,
) -> PartMeans:
    """Return the mean activation of each part, (prompt, d_model) on the host, by (site, part); `inputs` are batches.

    For more prompts than fit into memory see `vlm.collect`, which works into files.

    Raises:
        InputError: no batch, no site, or a prompt without a token of some part.
    """
    batches = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    places = [vlm.parts.resolve(Site.parse(site)) for site in sites]
    if not batches or not places:
        raise InputError(f"got {len(batches)} batches and {len(places)} sites; give at least one of each.")
    found: dict[Place, list[Tensor]] = {}
    for number, batch in enumerate(
        tqdm(batches, desc="reading", disable=not progress or len(batches) < 3, leave=False)
    ):
        masks = masks_of(vlm.layout(batch), parts)
        seen = vlm.observe(batch, places, steering)
        for name, mask in masks.items():
            counts = mask.sum(1)
            if not bool(counts.all()):
                raise InputError(
                    f"row {int((counts == 0).nonzero()[0])} of batch {number} has no token of part {name!r}."
                )
            for site in places:
                hidden = seen.at[site]
                kept = torch.where(mask[..., None].to(hidden.device), hidden.float(), 0.0).sum(1)
                found.setdefault((site, name), []).append((kept / counts[:, None].to(kept)).cpu())
    return {place: torch.cat(rows) for place, rows in found.items()}


def image_deltas(
    vlm: AttachedModel,
    prompts: Sequence[str],
    images: Sequence[Image.Image],
    sites: Sequence[Site | str],
    parts: Parts = ("last_prompt",),
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> PartMeans:
    """Return what the picture changes: activations of each prompt with its picture minus those without any.

    Raises:
        InputError: other numbers of prompts and pictures, or parts that prompts without a picture lack.
    """
    if len(prompts) != len(images) or not prompts:
        raise InputError(f"got {len(prompts)} prompts and {len(images)} pictures; give one picture for each prompt.")
    starts = range(0, len(prompts), batch_size)
    seen = [vlm.inputs(list(prompts[at : at + batch_size]), list(images[at : at + batch_size])) for at in starts]
    blind = [vlm.inputs(list(prompts[at : at + batch_size])) for at in starts]
    with_ = read_parts(vlm, seen, sites, parts, progress=progress)
    without = read_parts(vlm, blind, sites, parts, progress=progress)
    return {place: values - without[place] for place, values in with_.items()}
