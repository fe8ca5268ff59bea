"""SteerVLM's two networks, one instance for all layers.

    s = h(x, u, p+, p-)      x' = down(x); two attention layers, x' looking at {x', u', p+', p-'}; up-projection
    g = sigmoid(MLP(s', p+', p-'))          one factor per hidden dimension
    x + lambda * g * s       is written by the intervention, not here

A token attends to itself, its own u, and the pair: a structure, not a mask. Per token there are 2 + P keys, of which
the P of the pair are shared, so memory is O(T * P). Source: arXiv 2510.26769; a reconstruction, as the authors' module
is not public (choices: `config.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from steer_plugin.methods.steervlm.config import SteerVLMConfig

X, U, PLUS, MINUS = range(4)  # rows of the type embedding


class PairMemory(NamedTuple):
    """All that the networks need of p+ and p- at one layer; computed once per call, not once per token.

    One row serves a whole batch that has one pair.

    Attributes:
        keys, values: one entry for each attention layer.
        real: which pair tokens are no padding.
        pooled: p+' and p-' side by side, for the gate.
    """

    keys: tuple[Float[Tensor, "row pair head dim"], ...]
    values: tuple[Float[Tensor, "row pair head dim"], ...]
    real: Bool[Tensor, "row pair"]
    pooled: Float[Tensor, "row two_width"]


class Attention(nn.Module):
    """Multi-head attention of each token to itself, its u and the pair."""

    def __init__(self, config: SteerVLMConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.norm = nn.LayerNorm(width) if config.norm == "pre" else nn.Identity()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=config.bias) for _ in range(4))

    def _heads(self, tokens: Float[Tensor, "row pos width"]) -> Float[Tensor, "row pos head dim"]:
        return rearrange(tokens, "row pos (head dim) -> row pos head dim", head=self.heads)

    def remember(
        self, pair: Float[Tensor, "row pair width"], types: Float[Tensor, "pair width"]
    ) -> tuple[Float[Tensor, "row pair head dim"], Float[Tensor, "row pair head dim"]]:
        """Keys and values of the pair's tokens."""
        tokens = self.norm(pair) + types
        return self._heads(self.key(tokens)), self._heads(self.value(tokens))

    def forward(
        self,
        own: tuple[Float[Tensor, "row pos width"], ...],
        types: Float[Tensor, "kind width"],
        keys: Float[Tensor, "#row pair head dim"],
        values: Float[Tensor, "#row pair head dim"],
        real: Bool[Tensor, "#row pair"],
    ) -> Float[Tensor, "row pos width"]:
        """Return what the first of `own` (x, then u) gathers from `own` and the pair."""
        tokens = [self.norm(one) + kind for one, kind in zip(own, types, strict=False)]
        query = self._heads(self.query(tokens[0])) * (keys.shape[-1] ** -0.5)
        mine = [(self._heads(self.key(one)), self._heads(self.value(one))) for one in tokens]
        to_pair = einsum(query, keys, "row pos head dim, row pair head dim -> row pos head pair")
        to_pair = to_pair.masked_fill(~real[:, None, None], -torch.inf)
        to_own = torch.stack([(query * key).sum(-1) for key, _ in mine], -1)
        weights = torch.cat([to_own, to_pair], -1).float().softmax(-1).to(query.dtype)
        out = einsum(weights[..., len(mine) :], values, "row pos head pair, row pair head dim -> row pos head dim")
        for number, (_, value) in enumerate(mine):
            out = out + weights[..., number, None] * value
        return self.out(rearrange(out, "row pos head dim -> row pos (head dim)"))


class Steerer(nn.Module):
    """h: what would be added, before the gate."""

    def __init__(self, config: SteerVLMConfig) -> None:
        super().__init__()
        self.config = config
        self.down = nn.Linear(config.d_model, config.width, bias=config.bias)
        self.up = nn.Linear(config.width, config.d_model, bias=config.bias)
        self.attention = nn.ModuleList([Attention(config) for _ in range(2)])
        kinds = torch.zeros(4, config.width)
        self.types = nn.Parameter(nn.init.normal_(kinds, std=0.5)) if config.types else None
        # Small, so that training starts near the unsteered model; not zero, so that everything below learns at once.
        nn.init.normal_(self.up.weight, std=0.02)
        if config.bias:
            nn.init.zeros_(self.up.bias)
        if config.start == "copy":
            self._start_copying()

    @torch.no_grad()
    def _start_copying(self) -> None:
        """Begin with s = 0.25 * P(x + half of what each layer gathers), P a projection on a random subspace."""
        nn.init.orthogonal_(self.down.weight)
        self.up.weight.copy_(0.25 * self.down.weight.T)
        for layer in self.layers():
            for linear, scale in ((layer.value, 1.0), (layer.out, 0.5)):
                nn.init.eye_(linear.weight).mul_(scale)
                if self.config.bias:
                    nn.init.zeros_(linear.bias)

    def layers(self) -> list[Attention]:
        """The two attention layers."""
        return [layer for layer in self.attention if isinstance(layer, Attention)]

    def kinds(self) -> Float[Tensor, "kind width"]:
        """Type embeddings of x, u, p+ and p-."""
        weight = self.down.weight
        return self.types if self.types is not None else weight.new_zeros(4, weight.shape[0])

    def hidden(
        self, x: Float[Tensor, "row pos d_model"], u: Float[Tensor, "row pos d_model"] | None, memory: PairMemory
    ) -> Float[Tensor, "row pos width"]:
        """Return s before its up-projection."""
        h = self.down(x)
        context = () if u is None or not self.config.unsteered else (self.down(u),)
        for layer, keys, values in zip(self.layers(), memory.keys, memory.values, strict=True):
            gathered = layer((h, *context), self.kinds(), keys, values, memory.real)
            h = h + gathered if self.config.residual else gathered
        return h


class SteeringGate(nn.Module):
    """g: how much of each dimension of s passes."""

    def __init__(self, config: SteerVLMConfig) -> None:
        super().__init__()
        width = config.width
        own = config.gate_down == "own"
        self.down = nn.Linear(config.d_model, width, bias=config.bias) if own else None
        self.norm = nn.LayerNorm(width) if config.norm == "pre" else nn.Identity()
        out = config.d_model if config.gate_width == "model" else width
        self.mlp = nn.Sequential(
            nn.Linear(3 * width, width, bias=config.bias),
            nn.GELU(),
            nn.Linear(width, width, bias=config.bias),
            *([nn.GELU(), nn.Linear(width, out, bias=config.bias)] if config.gate_width == "model" else []),
        )

    def forward(
        self, s: Float[Tensor, "row pos width"], pooled: Float[Tensor, "#row two_width"]
    ) -> Float[Tensor, "row pos out"]:
        """Return factors between 0 and 1."""
        pair = pooled[:, None].expand(s.shape[0], s.shape[1], -1)
        return torch.sigmoid(self.mlp(torch.cat([self.norm(s), pair], -1)).float()).to(s.dtype)


class SteerVLMModule(nn.Module):
    """Steerer and gate; works in its parameters' own precision, whatever the model's."""

    def __init__(self, config: SteerVLMConfig) -> None:
        super().__init__()
        self.config = config
        self.steerer = Steerer(config)
        self.gate = SteeringGate(config) if config.gate else None

    def remember(
        self,
        plus: Float[Tensor, "row plus d_model"],
        plus_real: Bool[Tensor, "row plus"],
        minus: Float[Tensor, "row minus d_model"],
        minus_real: Bool[Tensor, "row minus"],
    ) -> PairMemory:
        """Look at p+ and p- at one layer; padded tokens count for nothing."""
        dtype, kinds = self.steerer.down.weight.dtype, self.steerer.kinds()
        (plus, plus_real), (minus, minus_real) = (
            _pooled(side.to(dtype), real, self.config.pair) for side, real in ((plus, plus_real), (minus, minus_real))
        )
        sides = torch.cat([plus, minus], 1)
        types = torch.cat([kinds[PLUS].expand(plus.shape[1], -1), kinds[MINUS].expand(minus.shape[1], -1)])
        small = self.steerer.down(sides)
        remembered = [layer.remember(small, types) for layer in self.steerer.layers()]
        if self.gate is None:
            pooled = small.new_zeros(small.shape[0], 0)
        else:
            seen = small if self.gate.down is None else self.gate.down(sides)
            halves = (seen[:, : plus.shape[1]], plus_real), (seen[:, plus.shape[1] :], minus_real)
            pooled = torch.cat([self.gate.norm(_mean(side, real)) for side, real in halves], -1)
        keys, values = zip(*remembered, strict=True)
        return PairMemory(keys, values, torch.cat([plus_real, minus_real], 1), pooled)

    def forward(
        self, x: Float[Tensor, "row pos d_model"], u: Float[Tensor, "row pos d_model"] | None, memory: PairMemory
    ) -> tuple[
        Float[Tensor, "row pos d_model"], Float[Tensor, "row pos gated"] | None, Float[Tensor, "row pos d_model"]
    ]:
        """Return (s, g, g * s); a gate in the bottleneck has its width and acts before the up-projection."""
        dtype = self.steerer.down.weight.dtype
        h = self.steerer.hidden(x.to(dtype), None if u is None else u.to(dtype), memory)
        s = self.steerer.up(h)
        if self.gate is None:
            return s, None, s
        down = self.steerer.down if self.gate.down is None else self.gate.down
        g = self.gate(down(s), memory.pooled)
        return (s, g, g * s) if self.config.gate_width == "model" else (s, g, self.steerer.up(g * h))


def _mean(side: Float[Tensor, "row pos dim"], real: Bool[Tensor, "row pos"]) -> Float[Tensor, "row dim"]:
    weights = real.to(side.dtype)
    return (side * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)


def _pooled(
    side: Float[Tensor, "row pos d_model"], real: Bool[Tensor, "row pos"], form: str
) -> tuple[Float[Tensor, "row kept d_model"], Bool[Tensor, "row kept"]]:
    """What attention sees of one prompt: all tokens, their mean, or the last."""
    if form == "tokens":
        return side, real
    if form == "mean":
        return _mean(side, real)[:, None], real[:, :1] | True
    last = torch.where(real, torch.arange(real.shape[1], device=real.device), -1).amax(-1)
    return side[torch.arange(side.shape[0], device=side.device), last][:, None], real[:, :1] | True
