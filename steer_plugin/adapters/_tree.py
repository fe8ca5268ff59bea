"""One batch of contrastive pairs as a tree of prefixes; nothing runs behind the last layer that is read of it.

trunk      what prompts about one picture begin with           up to max(L, L'), for what is behind it
branches   rest of the bare prompt; rest of the prompt, suffix, T+ | T-     in one forward, up to the last read
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steer_plugin.adapters._branches import Branches
from steer_plugin.adapters._completions import left_padded
from steer_plugin.adapters._gathered import Gathered, Pick
from steer_plugin.adapters._nodes import Node
from steer_plugin.adapters._parts import ModelParts
from steer_plugin.adapters._plan import Pair, Plan
from steer_plugin.adapters._shared import Shared
from steer_plugin.adapters._taps import Ends, Taps
from steer_plugin.context import Read
from steer_plugin.errors import PositionError
from steer_plugin.sites import Site


@dataclass(frozen=True)
class Batch:
    """Pairs with their completions (all positive ones, then all negative ones) and their prompts.

    Attributes:
        shared: bare prompts of all pairs, then the suffixed ones of the pairs that have a suffix.
        full: of each pair, the number of the prompt that its completions continue.
    """

    pairs: Sequence[Pair]
    completions: list[list[int]]
    shared: Shared | None
    full: list[int]

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)


class Tree:
    """Grows batches on one model."""

    def __init__(self, parts: ModelParts, ends: Ends, plan: Plan) -> None:
        self.parts, self.plan, self.branches = parts, plan, Branches(parts, ends)

    def shifts(
        self, batch: Batch, shared: Shared
    ) -> tuple[Float[Tensor, "twice d_model"], Float[Tensor, "row d_model"]]:
        """Return (pooled completions, contexts)."""
        plan, count = self.plan, len(batch)
        front, behind = shared.split(selected(self.parts, shared.ids[:count], Read(plan.read, plan.context)))
        contexts, completions = Gathered(count), Gathered(2 * count)
        deepest = max(plan.write, plan.read, key=lambda site: site.order)
        picks = [Pick(i, shared.rows[i], columns) for i, columns in enumerate(front)]
        # What is behind a trunk attends to it in all layers that it runs itself.
        trunk_last = deepest if any(front) or any(behind) else plan.write
        trunk = self.branches.trunk(shared.inputs, _taps(plan.read, contexts, picks), trunk_last)
        nodes, prompts, forced = _nodes(batch, shared, behind)
        placed = self.branches.placed(nodes, trunk)
        picks = [Pick(i, *placed.columns(node, behind[i])) for i, node in prompts.items() if behind[i]]
        taps = _taps(plan.read, contexts, picks)
        pooled = [range(len(nodes[node].tokens)) for node in forced]
        if plan.target == "last":
            pooled = [tokens[-1:] for tokens in pooled]
        ends = [
            Pick(i, *placed.columns(node, tokens)) for i, (node, tokens) in enumerate(zip(forced, pooled, strict=True))
        ]
        self.branches.grow(
            trunk, placed, [*taps, *_taps(plan.write, completions, ends)], deepest if taps else plan.write
        )
        return completions.mean(), contexts.mean()


def _nodes(
    batch: Batch, shared: Shared, behind: Sequence[Sequence[int]]
) -> tuple[list[Node], dict[int, int], list[int]]:
    """Nodes of a batch; of each pair, the one that ends its bare prompt; the completions, T+ of all and then T-."""
    nodes, prompts, parents = list[Node](), dict[int, int](), list[int | None]()
    for i, number in enumerate(batch.full):
        if number != i and behind[i]:  # a suffix follows the prompt: where its bare end is read, that is a leaf
            prompts[i] = len(nodes)
            nodes.append(Node(shared.rows[i], shared.tails[i]))
        parents.append(len(nodes) if shared.tails[number] else None)
        if shared.tails[number]:
            prompts.setdefault(i, len(nodes))
            nodes.append(Node(shared.rows[number], shared.tails[number]))
    # Equal completions of one prompt are one node: their difference is nothing at all, and not rounding.
    forced, known = list[int](), dict[tuple[int, tuple[int, ...]], int]()
    for i, tokens in enumerate(batch.completions):
        pair = i % len(batch)
        node = known.setdefault((pair, tuple(tokens)), len(nodes))
        forced.append(node)
        if node == len(nodes):
            nodes.append(Node(shared.rows[batch.full[pair]], tokens, parents[pair]))
    return nodes, prompts, forced


def _taps(site: Site, gathered: Gathered, picks: Sequence[Pick]) -> Taps:
    """What takes these tokens; nothing where there are none."""
    return [(site, gathered.taking(picks))] if any(pick.columns for pick in picks) else []


def selected(parts: ModelParts, rows: Sequence[Sequence[int]], read: Read) -> list[list[int]]:
    """Number, from its first token, the tokens of each prompt that a read is of.

    Raises:
        PositionError: none in some row.
    """
    ids, real = left_padded(rows, torch.device("cpu"))
    mask = read.positions.mask(parts.layout(ids, real, None))
    found = [(one.nonzero()[:, 0] - (ids.shape[1] - len(row))).tolist() for one, row in zip(mask, rows, strict=True)]
    if not all(found):
        row = next(number for number, columns in enumerate(found) if not columns)
        raise PositionError(f"the read at {read.site} on {str(read.positions)!r} finds no token in row {row}.")
    return found
