"""Controls beside any steering: the opposite one, and one as strong that points anywhere.

    swapped        alpha -> -alpha
    swapped_pair   (p+, p-) -> (p-, p+), for a SteerVLM: it looks at the pair itself, so this is not the sign turned
    random_like    d'(h) = |d(h)| * g / |g|,   g ~ N(0, I), drawn from (seed, number of the write, id of the row)

What steering does beyond its random control is due to its direction, not to being pushed. Source: Norm-Rnd of Learning
to Steer (arXiv 2508.12815), here for every delta and not for P2S vectors alone. Drawing by id makes a batch equal its
rows one by one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from steer_plugin.context import Context, Delta
from steer_plugin.errors import InputError
from steer_plugin.intervention import FixedVector, Intervention, Steerable, Write, expand_rows
from steer_plugin.methods.steervlm.method import SteerVLM


def swapped(steering: Steerable) -> Intervention:
    """Turn the sign of every write: what pushes towards a behaviour pushes away from it, equally far.

    Raises:
        InputError: a replacement, which has no opposite.
    """
    return -steering.intervention


def swapped_pair(steervlm: SteerVLM) -> SteerVLM:
    """Exchange target and converse prompt of a SteerVLM; alpha stays.

    The module then steers towards the converse by itself, where `swapped` subtracts what it would have added: an
    untrained module may do the same for both pairs, and no module is bound to do the exact opposite.

    Raises:
        InputError: no pair is bound.
    """
    if not steervlm.pairs:
        raise InputError("a SteerVLM without its prompt pair has none to swap: bind one with steervlm.pair(p+, p-).")
    return steervlm.pair([minus for _, minus in steervlm.pairs], [plus for plus, _ in steervlm.pairs])


def random_like(steering: Steerable, ids: Sequence[str] | None = None, seed: int = 0) -> Intervention:
    """Replace what every write adds by a random direction of the same norm, token by token.

    Alpha, sites, positions, reads and asides stay, so the control costs what the steering costs. A norm that depends on
    the stream is taken on the stream as it is: behind an earlier write, that of the control. `ids` names the rows of
    the batch, one direction for each; without it all rows share one. Two calls with one seed draw the same directions:
    take the control of a sum, not the sum of controls.

    Raises:
        InputError: a replacement, no ids, or steering vectors for another number of rows.
    """
    if isinstance(ids, str) or (ids is not None and not ids):
        raise InputError(f"ids must name the rows of the batch, at least one, as in ['a', 'b']; got {ids!r}.")
    names = None if ids is None else tuple(ids)
    return Intervention(
        tuple(_random(write, number, names, seed) for number, write in enumerate(steering.intervention.writes))
    )


@dataclass(frozen=True)
class RandomLike:
    """A delta as long as another one and in a random direction: one for all rows, or one per id.

    Attributes:
        delta: the other one; it sees the same stream and context.
        names: what the directions are drawn from, one for all rows or one per row.
    """

    delta: Delta
    names: tuple[str, ...]

    def __call__(self, hidden: Float[Tensor, "row pos d_model"], context: Context) -> Tensor:
        """Return |delta| times the direction of each row; raises InputError for ids of another batch."""
        # What the original notes is not what is added here, so nobody is told.
        original = self.delta(hidden, replace(context, note=None))
        drawn = context.once("random direction", lambda: directions(self.names, hidden.shape[-1]).to(original.device))
        rows = drawn[0] if len(self.names) == 1 else expand_rows(drawn, hidden.shape[0], "ids")[:, None]
        return original.float().norm(dim=-1, keepdim=True) * rows


def directions(names: Sequence[str], d_model: int) -> Float[Tensor, "row d_model"]:
    """Draw a unit vector for each name; the same name gives the same vector on every machine."""
    rows: list[Tensor] = []
    for name in names:
        digest = hashlib.sha256(name.encode()).digest()
        drawn = torch.randn(d_model, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))
        rows.append(drawn / drawn.norm())
    return torch.stack(rows)


def _random(write: Write, number: int, ids: tuple[str, ...] | None, seed: int) -> Write:
    if write.kind == "replace":
        raise InputError(
            f"the write at {write.site} puts a value in place of what is there: that is no push with a norm to match. "
            "Patch a random value instead."
        )
    start = f"{seed}:{number}"
    names = (start,) if ids is None else tuple(f"{start}:{one}" for one in ids)
    if isinstance(write.delta, FixedVector):
        # A vector stays a vector, with all that is checked and saved of vectors.
        vector = write.delta.vector
        drawn = directions(names, vector.shape[-1]).to(vector.device)
        if ids is not None and vector.ndim == 2 and len(ids) != len(vector):
            raise InputError(f"got {len(ids)} ids and {len(vector)} steering vectors at {write.site}; give one each.")
        if vector.ndim == 1 and ids is None:
            drawn = drawn[0]
        return replace(write, delta=FixedVector(vector.float().norm(dim=-1, keepdim=True) * drawn))
    # The control of a control is that of the original.
    inner = write.delta.delta if isinstance(write.delta, RandomLike) else write.delta
    return replace(write, delta=RandomLike(inner, names))
