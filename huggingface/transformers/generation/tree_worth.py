"""What a draft tree is worth: the tokens that a step with it emits on average, from measured accuracies of the streams.

A node is worth the probability that decoding passes through it: the product of its path's accuracies. The best tree of n nodes
holds the n worthiest, and worth never grows with depth, so it is grown greedily. Expected tokens are the sum of the worths; the
root's 1 is the bonus token.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch

from .draft_tree import TreeShape

ROUNDS = 64
"""Steps after which it no longer matters how decoding began."""


def grow_tree(accuracy: Sequence[Sequence[float]], max_nodes: int, streams: int) -> tuple[TreeShape, float]:
    """Returns the tree of at most `max_nodes` nodes with the most expected tokens, and that number.

    Args:
        accuracy: accuracy[j][r], probability that rank r of stream j + 1 is right, given that the path to it is.
        max_nodes: node budget, root included.
        streams: streams the nodes carry; also the largest depth.

    Raises:
        ValueError: no room for the root, or no accuracies.
    """
    if max_nodes < 1:
        raise ValueError(f"a draft tree has at least its root; got a budget of {max_nodes} nodes.")
    if streams and not accuracy:
        raise ValueError("streams need rank accuracies; calibrate the model with train_spec_stream.py.")
    depth_limit = min(streams, len(accuracy))
    # An entry is (-worth, depth, path of ranks); shallower and better-ranked paths win ties.
    heap: list[tuple[float, int, tuple[int, ...]]] = [(-1.0, 0, ())]
    chosen: list[tuple[int, ...]] = []
    expected = 0.0
    while heap and len(chosen) < max_nodes:
        worth, depth, path = heapq.heappop(heap)
        chosen.append(path)
        expected -= worth
        if depth < depth_limit:
            heapq.heappush(heap, (worth * accuracy[depth][0], depth + 1, (*path, 0)))
        if path and path[-1] + 1 < len(accuracy[depth - 1]):
            parent_worth = worth / max(accuracy[depth - 1][path[-1]], 1e-12)
            sibling = accuracy[depth - 1][path[-1] + 1]
            heapq.heappush(heap, (parent_worth * sibling, depth, (*path[:-1], path[-1] + 1)))
    ordered = sorted(chosen, key=lambda path: (len(path), path))
    index = {path: node for node, path in enumerate(ordered)}
    parents = tuple(index[path[:-1]] if path else -1 for path in ordered)
    deepest = max(len(path) for path in ordered)
    return TreeShape(parents, deepest), expected


def node_worths(accuracy: Sequence[Sequence[float]], shape: TreeShape) -> list[float]:
    """Returns the probability that decoding passes through each node; the root's is 1."""
    worths = [1.0]
    for node in range(1, shape.nodes):
        worths.append(worths[shape.parents[node]] * accuracy[shape.depths[node] - 1][shape.ranks[node]])
    return worths


def lasting_tokens(
    accuracy: Sequence[Sequence[float]], shape: TreeShape, carriers: int | None = None
) -> float:
    """Returns the tokens that steps with such trees emit on average, one after the other.

    Where the last accepted node carries no streams, those of its nearest ancestor that does guess on, and as many fewer as that
    lies back; their guesses come from further. How far back is a Markov chain; the average is that of its long run. An
    approximation: what the transition bias guesses alone, below the last of these streams, is not counted.

    Args:
        accuracy: as :func:`grow_tree` takes it.
        shape: tree of a step behind a node with streams.
        carriers: worthiest nodes that carry streams; `None` for all.
    """
    if carriers is None or carriers >= shape.nodes:
        return sum(node_worths(accuracy, shape))
    streams = min(shape.streams, len(accuracy))
    tokens = torch.zeros(streams + 1, dtype=torch.float64)
    moves = torch.zeros(streams + 1, streams + 1, dtype=torch.float64)
    for back in range(streams + 1):
        left = accuracy[back:streams]
        tree = shape if back == 0 else grow_tree(left, shape.nodes, len(left))[0]
        worths = node_worths(left, tree)
        tokens[back] = sum(worths)
        moves[back] = _steps_back(tree, worths, carriers, streams)
    share = torch.zeros(streams + 1, dtype=torch.float64)
    share[0] = 1
    for _ in range(ROUNDS):
        # Half of it stays, so that what goes to and fro settles too.
        share = (share + share @ moves) / 2
    return float(share @ tokens)


def _steps_back(shape: TreeShape, worths: Sequence[float], carriers: int, streams: int) -> torch.Tensor:
    """Returns (streams + 1,) the probability that the last accepted node lies so far behind its nearest carrier."""
    carrying = set(sorted(range(shape.nodes), key=lambda node: -worths[node])[:carriers])
    ends = list(worths)
    for node in range(1, shape.nodes):
        ends[shape.parents[node]] -= worths[node]
    shares = torch.zeros(streams + 1, dtype=torch.float64)
    for node, probability in enumerate(ends):
        back = 0
        while node not in carrying:
            node, back = shape.parents[node], back + 1
        shares[back] += probability
    return shares
