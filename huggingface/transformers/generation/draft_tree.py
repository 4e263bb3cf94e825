"""Shapes of draft trees, and the index tables that a step needs for each.

A tree is a flat list, parents before children; node 0 is the root, the last committed token. Siblings are ordered by rank: the
r-th child of a node holds the r-th most likely token. ::

    parents (-1, 0, 0, 1)            0 root
                                    / \
                            rank 0 1   2 rank 1
                                  /
                          rank 0 3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch


@dataclass(frozen=True)
class TreeShape:
    """Shape of a draft tree and the number of streams its nodes carry; hashable.

    Attributes:
        parents: parent of each node, -1 for the root, which comes first.
        streams: stream rows of each node while this tree is verified: the depth the next tree can have.
    """

    parents: tuple[int, ...]
    streams: int = 0

    def __post_init__(self) -> None:
        if not self.parents or self.parents[0] != -1:
            raise ValueError(f"a tree starts with its root, whose parent is -1; got parents {self.parents}.")
        for node, parent in enumerate(self.parents[1:], start=1):
            if not 0 <= parent < node:
                raise ValueError(
                    f"node {node} has parent {parent}; parents come before their children, roots once."
                )
        if self.streams < 0:
            raise ValueError(f"streams must be 0 or more, got {self.streams}.")

    @classmethod
    def chain(cls, depth: int, streams: int) -> TreeShape:
        """Returns a tree without branches, `depth` nodes below the root."""
        return cls(tuple(range(-1, depth)), streams)

    @property
    def nodes(self) -> int:
        """Number of nodes, root included."""
        return len(self.parents)

    @property
    def rows(self) -> int:
        """Rows in the layers that carry streams."""
        return self.nodes * (1 + self.streams)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Distance of each node from the root."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """Largest distance from the root."""
        return max(self.depths)

    @property
    def is_chain(self) -> bool:
        """Whether no node has more than one child, so that an accepted path is the first rows of a step."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Place of each node among its siblings, 0 for the most likely; the root has 0."""
        seen: dict[int, int] = {}
        ranks = []
        for parent in self.parents:
            ranks.append(seen.get(parent, 0))
            seen[parent] = ranks[-1] + 1
        return tuple(ranks)

    def path(self, node: int) -> tuple[int, ...]:
        """Returns the nodes from the root to `node`, both included."""
        path = [node]
        while path[-1]:
            path.append(self.parents[path[-1]])
        return tuple(reversed(path))

    def cut(self, depth: int) -> TreeShape:
        """Returns the tree without nodes deeper than `depth`."""
        if depth >= self.depth:
            return self
        kept = [node for node, at in enumerate(self.depths) if at <= max(depth, 0)]
        index = {node: place for place, node in enumerate(kept)}
        parents = tuple(-1 if node == 0 else index[self.parents[node]] for node in kept)
        return TreeShape(parents, self.streams)

    def tables(self, device: torch.device) -> ShapeTables:
        """Returns the index tables of this shape on a device, made once."""
        return _tables(self, device)


@dataclass(frozen=True)
class Level:
    """Nodes of one depth, in terms of the parents that have children.

    Attributes:
        nodes: (nodes,) int64 node numbers.
        parents: (parents,) int64 node numbers of the parents.
        slots: (nodes,) int64 place of each node's parent in `parents`.
        ranks: (nodes,) int64 rank of each node among its siblings.
        width: largest number of children of one parent.
    """

    nodes: torch.Tensor
    parents: torch.Tensor
    slots: torch.Tensor
    ranks: torch.Tensor
    width: int


@dataclass(frozen=True)
class ShapeTables:
    """Device-side constants of a :class:`TreeShape`.

    Attributes:
        parents: (nodes,) int64; the root is its own parent.
        depths: (nodes,) int64.
        ancestors: (nodes, nodes) bool; row: which nodes lie on the way from the root to this node, itself included.
        on_path: (nodes, nodes) float32, `ancestors` transposed: a row of node flags times this counts flags on each path.
        paths: (nodes, depth + 1) int64 nodes from the root to each node, the last one repeated.
        row_depths: (rows,) int64 position of each row past the root's, nodes then streams.
        block: (1, 1, rows, rows) bool, what the rows of a step see of each other.
        levels: one a depth, from 1 on.
    """

    parents: torch.Tensor
    depths: torch.Tensor
    ancestors: torch.Tensor
    on_path: torch.Tensor
    paths: torch.Tensor
    row_depths: torch.Tensor
    block: torch.Tensor
    levels: tuple[Level, ...]


def stream_block(ancestors: torch.Tensor, streams: int) -> torch.Tensor:
    """Returns what node rows and stream rows of a step see of each other.

    A stream row sees the nodes its own node sees and the streams 1..j of that node; nothing else sees a stream row.

    Args:
        ancestors: (batch or 1, nodes, nodes) bool.
        streams: stream rows of each node.

    Returns:
        (batch or 1, 1, rows, rows) bool, rows = nodes * (1 + streams), nodes first.
    """
    batch, nodes, _ = ancestors.shape
    rows = nodes * streams
    owner = torch.arange(nodes, device=ancestors.device).repeat_interleave(streams)
    number = torch.arange(streams, device=ancestors.device).repeat(nodes)
    siblings = (owner[:, None] == owner) & (number[:, None] >= number)
    top = torch.cat([ancestors, ancestors.new_zeros(batch, nodes, rows)], dim=2)
    bottom = torch.cat([ancestors[:, owner], siblings.expand(batch, rows, rows)], dim=2)
    return torch.cat([top, bottom], dim=1)[:, None]


def ancestor_matrix(shape: TreeShape) -> torch.Tensor:
    """Returns (nodes, nodes) bool: True where the column's node lies on the path from the root to the row's node."""
    matrix = torch.zeros(shape.nodes, shape.nodes, dtype=torch.bool)
    for node in range(shape.nodes):
        matrix[node, list(shape.path(node))] = True
    return matrix


@lru_cache(maxsize=256)
def _tables(shape: TreeShape, device: torch.device) -> ShapeTables:
    def ids(values: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    ancestors = ancestor_matrix(shape).to(device)
    paths = [shape.path(node) for node in range(shape.nodes)]
    padded = [path + (path[-1],) * (shape.depth + 1 - len(path)) for path in paths]
    streams = [depth + j for depth in shape.depths for j in range(1, shape.streams + 1)]
    return ShapeTables(
        parents=ids([max(parent, 0) for parent in shape.parents]),
        depths=ids(shape.depths),
        ancestors=ancestors,
        on_path=ancestors.T.float().contiguous(),
        paths=ids(padded).view(shape.nodes, shape.depth + 1),
        row_depths=ids([*shape.depths, *streams]),
        block=stream_block(ancestors[None], shape.streams),
        levels=tuple(_level(shape, depth, ids) for depth in range(1, shape.depth + 1)),
    )


def _level(shape: TreeShape, depth: int, ids) -> Level:
    nodes = [node for node, at in enumerate(shape.depths) if at == depth]
    parents = sorted({shape.parents[node] for node in nodes})
    return Level(
        nodes=ids(nodes),
        parents=ids(parents),
        slots=ids([parents.index(shape.parents[node]) for node in nodes]),
        ranks=ids([shape.ranks[node] for node in nodes]),
        width=1 + max(shape.ranks[node] for node in nodes),
    )


@dataclass
class DraftTree:
    """The tokens of a draft tree on the device.

    Attributes:
        shape: its shape.
        tokens: (batch, nodes) int64; column 0 is the root.
    """

    shape: TreeShape
    tokens: torch.Tensor
