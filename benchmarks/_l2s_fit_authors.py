"""Fitting L2S the authors' way, restated: scikit-learn's starts, torch's Adam as it comes, a DataLoader.

What this package's presets round off is kept: the rate moves every step and not every epoch, the cosine weight of the
POPE recipe is (epoch - 1) / 100, a batch of one class alone counts half, and the best epoch is the one with the least
validation loss at a cosine weight of 0.05. `DictionaryLearning` is stopped after `limit` seconds (their 5,000
iterations take over an hour at 1,344 x 4,096), and says how far it came.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import DictionaryLearning, TruncatedSVD
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import get_cosine_schedule_with_warmup

from steer_plugin.shifts import Shifts

BATCH = 64


class OutOfTime(Exception):
    """Raised out of scikit-learn when the time is up."""


@dataclass(frozen=True)
class Learned:
    """Atoms, and how they were come by."""

    atoms: Tensor
    iterations: int
    finished: bool
    wall_s: float
    cpu_s: float

    def as_json(self) -> dict[str, Any]:
        """Everything but the atoms."""
        names = ("iterations", "finished", "wall_s", "cpu_s")
        return {name: getattr(self, name) for name in names}


def learned(vectors: Tensor, count: int, limit: float, seed: int) -> Learned:
    """The authors' dictionary learning, stopped after `limit` seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    kept: dict[str, Any] = {}

    def each_fifth(state: Mapping[str, Any]) -> None:
        kept.update(atoms=np.array(state["dictionary"]), iterations=int(state["ii"]) + 1)
        if time.perf_counter() - wall > limit:
            raise OutOfTime

    learner = DictionaryLearning(
        count, positive_code=True, fit_algorithm="cd", transform_algorithm="lasso_cd", max_iter=5000,
        random_state=seed, callback=each_fifth,
    )  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of single rows' codes, thousands of them
            learner.fit(vectors.numpy())
        kept = {"atoms": learner.components_, "iterations": int(learner.n_iter_), "finished": True}
    except OutOfTime:
        kept["finished"] = False
    atoms = torch.from_numpy(np.asarray(kept["atoms"])).float()
    spent = (time.perf_counter() - wall, time.process_time() - cpu)
    return Learned(atoms, kept["iterations"], kept["finished"], *spent)


def components(vectors: Tensor, count: int, seed: int) -> Tensor:
    """The authors' SVD of the centred targets."""
    found = TruncatedSVD(min(count, vectors.shape[1]), random_state=seed).fit(vectors.sub(vectors.mean(0)).numpy())
    return torch.from_numpy(found.components_).float()


def row_losses(predicted: Tensor, targets: Tensor, weight: float) -> Tensor:
    """Squared and absolute error, averaged over dimensions, less the weighted cosine."""
    squared = nn.functional.mse_loss(predicted, targets, reduction="none").mean(1)
    absolute = nn.functional.l1_loss(predicted, targets, reduction="none").mean(1)
    return squared + absolute - weight * nn.functional.cosine_similarity(predicted, targets, dim=1)


def trained(
    recipe: str, train: Shifts, held: Shifts, start: Tensor, hidden: int, epochs: int, seed: int,
    rate: float | None = None,
) -> tuple[nn.Module, int]:  # fmt: skip
    """The authors' training, at their own rate unless told; returns the network and the epoch that was kept."""
    torch.manual_seed(seed)
    pope = recipe == "pope"
    width = train.contexts.shape[1]
    net = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, train.vectors.shape[1], bias=False))
    decoder = net.get_submodule("2").get_parameter("weight")
    with torch.no_grad():
        decoder[:, : len(start)] = start.T
    optimiser = torch.optim.Adam(net.parameters(), lr=rate or (5e-5 if pope else 1e-4))
    yes = torch.tensor([name == "yes" for name in train.behaviours])
    batches = DataLoader(TensorDataset(train.contexts, train.vectors, yes), batch_size=BATCH, shuffle=True)
    check = DataLoader(TensorDataset(held.contexts, held.vectors), batch_size=BATCH)
    steps = len(batches)
    schedule = get_cosine_schedule_with_warmup(optimiser, epochs // 2 * steps, epochs * steps) if pope else None
    best, kept, state = math.inf, epochs, None
    for epoch in range(epochs):
        weight = 0.1 * epoch / epochs if pope else 0.1
        for contexts, targets, said in batches:
            optimiser.zero_grad()
            losses = row_losses(net(contexts), targets, weight)
            parts = [losses[side].mean() if bool(side.any()) else losses.new_zeros(()) for side in (said, ~said)]
            loss = (parts[0] + parts[1]) / 2 if pope else losses.mean()
            loss.backward()
            optimiser.step()
            if schedule is not None:
                schedule.step()
        with torch.no_grad():
            error = sum(float(row_losses(net(contexts), targets, 0.05).sum()) for contexts, targets in check)
        if pope and error < best:
            best, kept, state = error, epoch + 1, copy.deepcopy(net.state_dict())
    if state is not None:
        net.load_state_dict(state)
    return net, kept
