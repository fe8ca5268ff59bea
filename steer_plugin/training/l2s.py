"""Fitting the L2S network on shifts (h_i, z_i), with the authors' two presets, a short one, and the paper's loss.

    pope, safety:  loss = mean|g - z|^2 + mean|g - z| - w * cos(g, z),   w = 0.1 * epoch / epochs (pope), 0.1 (safety)
    fast:          the same, w = 0.1
    mse:           loss = mean|g - z|^2

Source: arXiv 2508.12815 section 3.2 (mse) and the authors' code (pope, safety): Adam, batch 64, 100 epochs; pope:
decoder from the SVD of the centred targets, lr 5e-5 with 50 epochs of warm-up then cosine, the losses of the yes and
the no class averaged, best validation epoch kept; safety: decoder from dictionary atoms, lr 1e-4, last epoch kept.
The authors declare weight decay and never use it: there is none here. fast: the SVD, lr 1e-3 with 5 epochs of warm-up
then cosine, 25 epochs, best validation epoch kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from steer_plugin.errors import InputError
from steer_plugin.methods.network import SteeringNetwork
from steer_plugin.shifts import Shifts
from steer_plugin.training.config import FitConfig, FitReport, fit_config
from steer_plugin.training.gradient import cosine_weight, set_gradient, squares
from steer_plugin.training.starts import directions


def fit_network(
    shifts: Shifts, config: FitConfig | str = "pope", *, validation: Shifts | None = None, seed: int = 0
) -> tuple[SteeringNetwork, FitReport]:
    """Fit g on shifts; deterministic for a seed on one machine.

    Raises:
        InputError: unknown preset, too few samples, contexts or vectors that are not finite, validation shifts of
            another width.
    """
    chosen = fit_config(config)
    if validation is None:
        shifts, validation = shifts.split(1 - chosen.validation_fraction, seed)
    _check(shifts, validation)
    shifts, validation = (
        replace(one, contexts=one.contexts.float(), vectors=one.vectors.float()) for one in (shifts, validation)
    )
    # The fit has its own generator; the caller's random state is left as it was.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network, started = _started(shifts, chosen, seed)
        history, epoch = _optimise(network, shifts, validation, chosen)
    network.requires_grad_(False).eval().zero_grad()
    train, held = _quality(network, shifts), _quality(network, validation)
    mean = shifts.vectors.mean(0).expand_as(validation.vectors)
    report = FitReport(
        chosen, seed, len(shifts), tuple(a for a, _ in history), tuple(b for _, b in history),
        train[0], held[0], train[1], held[1], _explained(mean, validation.vectors), epoch,
        started, torch.get_num_threads(),
    )  # fmt: skip
    return network, report


def _check(shifts: Shifts, validation: Shifts) -> None:
    for part, name in ((one, name) for one in (shifts, validation) for name in ("contexts", "vectors")):
        tensor, wanted = getattr(part, name), getattr(shifts, name).shape[1]
        where = f"the {name} of the {'shifts' if part is shifts else 'validation shifts'}"
        if len(tensor) == 0 or tensor.shape[1] != wanted:
            raise InputError(f"{where} have the shape {tuple(tensor.shape)}, expected (1 or more, {wanted}).")
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{where} hold NaN or infinite values; extract them again in float32.")


def _started(shifts: Shifts, config: FitConfig, seed: int) -> tuple[SteeringNetwork, int]:
    """Build the network; its decoder's first columns, of which it tells the number, are directions of the targets."""
    network = SteeringNetwork(shifts.contexts.shape[1], config.hidden, shifts.vectors.shape[1])
    found = directions(shifts.vectors, config, seed)
    # Fewer samples than hidden units leave the other columns at their random start.
    with torch.no_grad():
        network.decoder.weight[:, : len(found)] = found.T
    return network, len(found)


def _optimise(
    network: SteeringNetwork, shifts: Shifts, validation: Shifts, config: FitConfig
) -> tuple[list[tuple[float, float]], int]:
    # Fused: one pass over the weights a step, not a dozen; the same arithmetic.
    optimiser = torch.optim.Adam(network.parameters(), lr=config.learning_rate, fused=True)
    classes = _classes(shifts.behaviours)
    history: list[tuple[float, float]] = []
    best, kept = math.inf, config.epochs
    state: dict[str, Tensor] = {}
    for epoch in range(1, config.epochs + 1):
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * _schedule(epoch, config)
        weight, total = cosine_weight(config, epoch), 0.0
        for batch in torch.randperm(len(shifts)).split(config.batch_size):
            shares = _shares(classes[batch]) if config.balance else torch.full((len(batch),), 1 / len(batch))
            loss = set_gradient(network, shifts.contexts[batch], shifts.vectors[batch], shares, config.l1, weight)
            optimiser.step()
            total += loss * len(batch)
        with torch.no_grad():
            predicted = network(validation.contexts)
            held = float(_losses(predicted, validation.vectors, config, epoch).mean())
            # The cosine weight may grow by the epoch, so epochs are compared on what does not: the error itself.
            error = float(squares(predicted, validation.vectors).mean())
        history.append((total / len(shifts), held))
        if config.keep == "best" and error < best:
            best, kept = error, epoch
            state = {name: value.clone() for name, value in network.state_dict().items()}
    if state:
        network.load_state_dict(state)
    return history, kept


def _schedule(epoch: int, config: FitConfig) -> float:
    warmup = config.warmup_epochs
    if warmup is None:
        return 1.0
    if epoch <= warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(1, config.epochs - warmup)))


def _losses(
    predicted: Float[Tensor, "row d_model"], target: Float[Tensor, "row d_model"], config: FitConfig, epoch: int
) -> Float[Tensor, " row"]:
    """Loss of each sample; squares and absolute values are averaged over dimensions."""
    loss = squares(predicted, target)
    if config.l1:
        loss = loss + config.l1 * (predicted - target).abs().mean(-1)
    weight = cosine_weight(config, epoch)
    return loss - weight * cosine_similarity(predicted, target, dim=-1) if weight else loss


def _shares(classes: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    """Weight of each sample in the mean over the classes of a batch of their mean loss."""
    counts = torch.bincount(classes)
    return 1 / (counts[classes] * (counts > 0).sum())


def _classes(behaviours: Sequence[str]) -> Int[Tensor, " row"]:
    names = sorted(set(behaviours))
    return torch.tensor([names.index(name) for name in behaviours])


def _quality(network: SteeringNetwork, shifts: Shifts) -> tuple[float, float]:
    predicted = network(shifts.contexts)
    cosine = float(cosine_similarity(predicted, shifts.vectors, dim=-1).mean())
    return cosine, _explained(predicted, shifts.vectors)


def _explained(predicted: Float[Tensor, "row d_model"], target: Float[Tensor, "row d_model"]) -> float:
    return 1 - float((predicted - target).square().sum() / target.square().sum())
