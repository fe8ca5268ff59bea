"""Loss of an L2S batch and its gradient by hand: autograd takes twice as long for these few terms.

loss = sum_i share_i (mean (g - z)^2 + l1 mean |g - z| - w cos(g, z)),     g = W2 tanh(W1 h + b)
d loss / d g = share (2 (g - z) / d + l1 sign(g - z) / d - w (z / (|g| |z|) - cos(g, z) g / |g|^2))
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vecdot, vector_norm

from steer_plugin.methods.network import SteeringNetwork
from steer_plugin.training.config import FitConfig

_SHORTEST = 1e-8  # cosine_similarity's own: a zero target has the cosine zero


@torch.no_grad()
def set_gradient(
    network: SteeringNetwork,
    contexts: Float[Tensor, "row d_in"],
    targets: Float[Tensor, "row d_out"],
    shares: Float[Tensor, " row"],
    l1: float,
    weight: float,
) -> float:
    """Put the gradient of the batch's loss into the parameters' `grad`; return the loss. `weight`: of the cosine."""
    encoder, decoder = network.encoder, network.decoder
    # This way round the product is a third faster than contexts @ W1.T; the transpose is of a small matrix.
    hidden = torch.mm(encoder.weight, contexts.T).T.contiguous().add_(encoder.bias).tanh_()
    losses, slope = _slope(torch.mm(hidden, decoder.weight.T), targets, shares, l1, weight)
    back = torch.mm(slope, decoder.weight).mul_(1 - hidden.square())
    decoder.weight.grad = torch.mm(slope.T, hidden)
    encoder.weight.grad = torch.mm(back.T, contexts)
    encoder.bias.grad = back.sum(0)
    return float(losses @ shares)


def _slope(
    predicted: Float[Tensor, "row d_out"],
    targets: Float[Tensor, "row d_out"],
    shares: Float[Tensor, " row"],
    l1: float,
    weight: float,
) -> tuple[Float[Tensor, " row"], Float[Tensor, "row d_out"]]:
    """Loss of each row, and the gradient of their weighted sum, written over `predicted`."""
    width = targets.shape[-1]
    difference = predicted - targets
    losses = vector_norm(difference, dim=-1).square() / width
    of_predicted, of_targets = torch.full_like(losses, 2 / width), torch.full_like(losses, -2 / width)
    if weight:
        long, wide = (vector_norm(one, dim=-1).clamp_min(_SHORTEST) for one in (predicted, targets))
        cosine = vecdot(predicted, targets) / (long * wide)
        losses -= weight * cosine
        of_predicted += weight * cosine / long.square()
        of_targets -= weight / (long * wide)
    slope = predicted.mul_((of_predicted * shares)[:, None])
    slope.addcmul_(targets, (of_targets * shares)[:, None])
    if l1:
        sign = difference.sign()
        losses += vecdot(difference, sign) * (l1 / width)
        slope.addcmul_(sign, (shares * (l1 / width))[:, None])
    return losses, slope


def squares(predicted: Float[Tensor, "row d_out"], targets: Float[Tensor, "row d_out"]) -> Float[Tensor, " row"]:
    """Mean squared error of each row."""
    return vector_norm(predicted - targets, dim=-1).square() / targets.shape[-1]


def cosine_weight(config: FitConfig, epoch: int) -> float:
    """Weight of the cosine in an epoch, the first of which is 1."""
    return config.cosine * (epoch / config.epochs if config.cosine_grows else 1.0)
