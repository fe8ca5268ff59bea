"""What L2S is fitted on in the benchmark: drawn shifts of the papers' size, published networks, the pocket VLM's own.

pope, safety   contexts with a falling spectrum (latent k has the scale k^-1/2), a common mean and white noise;
               targets: +- one direction (pope) or a common one and one of two (safety), 80 tanh features of the
               latents, and noise of 120 directions and of all that no context foretells
published_*    the same contexts, varying along what a network of the L2S authors looks at, and that network's own
               predictions with the same noise
pocket         P2S shifts of the pocket VLM at layer 1, on questions about drawn pictures; held out by picture
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import steer_plugin as sp
from steer_plugin.contrast import pocket_pairs
from steer_plugin.demo.data import fitting_items
from steer_plugin.methods.network import SteeringNetwork
from steer_plugin.shifts import Shifts

RANK, FEATURES, NOISES = 256, 80, 120
CONTEXT, TARGET = 20.0, 8.0  # about the lengths of LLaVA-1.5's at the middle layers
PUBLISHED = {
    "published_pope": "llava_14_average_all_pope_train_-1.pt",
    "published_safety": "llava_mmsb_steering_net_v3_multi_nobias_K100.pt",
}


@dataclass(frozen=True)
class Problem:
    """Shifts to fit on, shifts held out, and which of the authors' two recipes they are for."""

    name: str
    recipe: str
    train: Shifts
    held: Shifts


@dataclass(frozen=True)
class _Latents:
    """Contexts and what they were made of."""

    latents: Tensor
    contexts: Tensor
    signs: Tensor


def falling(count: int) -> Tensor:
    """Scales k^-1/2 of unit length."""
    scales = torch.arange(1, count + 1).float() ** -0.5
    return scales / scales.norm()


def rows(count: int, width: int, draw: torch.Generator) -> Tensor:
    """Random rows of about unit length."""
    return torch.randn(count, width, generator=draw) * width**-0.5


def contexts(samples: int, width: int, draw: torch.Generator, seen: Tensor | None = None) -> _Latents:
    """Draw contexts; `seen`: directions along which the first latents vary."""
    latents = torch.randn(samples, RANK, generator=draw)
    along = rows(RANK, width, draw)
    if seen is not None:
        along[: len(seen)] = seen[:RANK]
    varied = (latents * falling(RANK)) @ along
    found = CONTEXT * (0.7 * rows(1, width, draw) + 0.7 * varied + 0.15 * rows(samples, width, draw))
    side = latents[:, [0, 2, 5]].sum(1) / 2 + 0.3 * torch.randn(samples, generator=draw)
    return _Latents(latents, found, torch.where(side > 0, 1.0, -1.0))


def unforetold(samples: int, width: int, draw: torch.Generator) -> Tensor:
    """Noise of which contexts know nothing, about 0.4 long."""
    noise = torch.randn(samples, NOISES, generator=draw) * falling(NOISES)
    return 0.27 * noise @ rows(NOISES, width, draw) + 0.3 * rows(samples, width, draw)


def shifts_of(vectors: Tensor, made: _Latents) -> Shifts:
    """Shifts of two behaviours."""
    names = tuple("yes" if one > 0 else "no" for one in made.signs.tolist())
    ids = tuple(f"drawn-{i}" for i in range(len(vectors)))
    return Shifts(vectors, made.contexts, ids, names, {"kind": "drawn"})


def split(name: str, recipe: str, every: Shifts, train: int) -> Problem:
    """The first rows to fit on, the rest held out."""
    return Problem(name, recipe, every.select(range(train)), every.select(range(train, len(every))))


def drawn(recipe: str, train: int, held: int, width: int, seed: int) -> Problem:
    """A problem made of random numbers alone."""
    draw = torch.Generator().manual_seed(seed)
    made = contexts(train + held, width, draw)
    own = rows(FEATURES, width, draw)
    mixed = (made.latents * falling(RANK)) @ torch.randn(RANK, FEATURES, generator=draw)
    foretold = (torch.tanh(2 * mixed) * torch.arange(1, FEATURES + 1) ** -0.5) @ own / 2
    if recipe == "pope":
        shared = made.signs[:, None] * own[0]
    else:
        shared = 1.5 * own[0] + 0.7 * torch.where(made.signs[:, None] > 0, own[1], own[2])
    vectors = TARGET * (shared + foretold + unforetold(train + held, width, draw))
    return split(recipe, recipe, shifts_of(vectors, made), train)


def published(name: str, folder: Path, train: int, held: int, seed: int) -> Problem:
    """A problem whose law is a network that the authors published."""
    state = torch.load(folder / PUBLISHED[name], map_location="cpu", weights_only=True)
    teacher = SteeringNetwork.of(state.get("steering_model", state))
    width, draw = teacher.encoder.in_features, torch.Generator().manual_seed(seed)
    seen = torch.linalg.svd(teacher.encoder.weight, full_matrices=False).Vh
    made = contexts(train + held, width, draw, seen)
    foretold = teacher(made.contexts)
    vectors = foretold + foretold.norm(dim=1).mean() * unforetold(train + held, width, draw)
    return split(name, name.removeprefix("published_"), shifts_of(vectors, made), train)


def pocket(train: int, held: int, seed: int) -> Problem:
    """A problem of the pocket VLM: one yes and one no question per picture, other pictures held out."""
    vlm, world = sp.attach(*sp.pocket.load()), sp.pocket.World(seed)
    pairs = {
        "train": [item.pair for item in fitting_items(world, train // 2)],
        "held": pocket_pairs(world.questions(held // 2, "validation", ("random",))),
    }
    with tempfile.TemporaryDirectory() as folder:
        found = {
            part: vlm.extract(some, write="resid_post.1", out=Path(folder) / part, batch_size=64, progress=False)
            for part, some in pairs.items()
        }
    return Problem("pocket", "pope", found["train"], found["held"])
