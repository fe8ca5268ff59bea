"""Where the tokens behind a trunk run: nodes of a tree, laid out in the rows and columns of one forward.

    packed    all nodes behind one trunk row in one row, each token attending to its ancestors alone; nothing is copied
    flat      every leaf a row with its ancestors' tokens in front, under the usual causal mask

A trunk's keys and values are many times as large as what is behind them: flat copies them for each leaf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Node:
    """Tokens behind a trunk row, or behind another node of that row."""

    row: int
    tokens: Sequence[int]
    parent: int | None = None


@dataclass(frozen=True)
class Placed:
    """A forward of nodes.

    Attributes:
        rows: of each row, the trunk row that it goes on from.
        tokens: of each row, its token ids.
        ahead: of each token, how many stand between it and the trunk.
        starts: of each node, the row and column of its first token.
        sees: (row, token, token) what each token attends to behind the trunk; None: what stands before it.
    """

    rows: list[int]
    tokens: list[list[int]]
    ahead: list[list[int]]
    starts: list[tuple[int, int]]
    sees: Bool[Tensor, "row token token"] | None

    def columns(self, node: int, within: Sequence[int]) -> tuple[int, list[int]]:
        """Row and columns of some tokens of a node, counted from its first."""
        row, start = self.starts[node]
        return row, [start + one for one in within]


def flat(nodes: Sequence[Node]) -> Placed:
    """Give every leaf a row of its own."""
    parents = {node.parent for node in nodes}
    rows, tokens, starts = list[int](), list[list[int]](), dict[int, tuple[int, int]]()
    for leaf in (number for number in range(len(nodes)) if number not in parents):
        path, row = _path(nodes, leaf), list[int]()
        for number in path:
            starts.setdefault(number, (len(rows), len(row)))
            row.extend(nodes[number].tokens)
        rows.append(nodes[leaf].row)
        tokens.append(row)
    ahead = [list(range(len(row))) for row in tokens]
    return Placed(rows, tokens, ahead, [starts[number] for number in range(len(nodes))], None)


def packed(nodes: Sequence[Node], count: int) -> Placed:
    """Put all nodes of each of `count` trunk rows into one row."""
    tokens, ahead = [list[int]() for _ in range(count)], [list[int]() for _ in range(count)]
    starts: list[tuple[int, int]] = []
    for number, node in enumerate(nodes):
        before = sum(len(nodes[one].tokens) for one in _path(nodes, number)[:-1])
        starts.append((node.row, len(tokens[node.row])))
        tokens[node.row].extend(node.tokens)
        ahead[node.row].extend(range(before, before + len(node.tokens)))
    width = max(map(len, tokens))
    # Padding sees itself: a token that sees nothing at all has no attention to speak of.
    sees = torch.eye(width, dtype=torch.bool).repeat(count, 1, 1)
    for number, node in enumerate(nodes):
        (row, start), size = starts[number], len(node.tokens)
        for above in _path(nodes, number)[:-1]:
            first = starts[above][1]
            sees[row, start : start + size, first : first + len(nodes[above].tokens)] = True
        sees[row, start : start + size, start : start + size] = torch.ones(size, size).tril().bool()
    return Placed(list(range(count)), tokens, ahead, starts, sees)


def _path(nodes: Sequence[Node], number: int) -> list[int]:
    """The nodes from the trunk to this one."""
    parent = nodes[number].parent
    return [number] if parent is None else [*_path(nodes, parent), number]


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Int[Tensor, "row token"]:
    """Rows of numbers, each filled up with its last one (an empty row with 0)."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[row[-1] if row else 0] * (width - len(row))] for row in rows], device=device)
