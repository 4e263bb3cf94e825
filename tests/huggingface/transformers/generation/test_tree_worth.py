"""What trees are worth, where all nodes carry streams and where some do."""

from __future__ import annotations

import random

import pytest

from huggingface.transformers.generation.draft_tree import TreeShape
from huggingface.transformers.generation.tree_worth import grow_tree, lasting_tokens, node_worths

ACCURACY = [[0.8, 0.1], [0.8, 0.1], [0.8, 0.1]]
MANY_RANKS = [
    [0.6, 0.2, 0.1, 0.05, 0.02, 0.01],
    [0.5, 0.2, 0.1, 0.05, 0.02, 0.01],
    [0.4, 0.2, 0.1, 0.1, 0.02, 0.01],
]


def test_tokens_are_the_worths_of_the_nodes():
    for nodes in (1, 2, 5, 9):
        shape, expected = grow_tree(MANY_RANKS, nodes, 3)
        assert sum(node_worths(MANY_RANKS, shape)) == pytest.approx(expected)
        assert (
            lasting_tokens(MANY_RANKS, shape)
            == lasting_tokens(MANY_RANKS, shape, nodes)
            == pytest.approx(expected)
        )
    assert lasting_tokens(ACCURACY, TreeShape.chain(3, 3)) == pytest.approx(1 + 0.8 + 0.64 + 0.512)


@pytest.mark.parametrize("right", [0.0, 0.3, 1.0])
def test_one_stream_at_the_root(right):
    """After an accepted draft nothing guesses: a step of one token, and the root carries again."""
    share = 1 / (1 + right)  # of steps that have a draft
    expected = share * (1 + right) + (1 - share)
    assert lasting_tokens([[right]], TreeShape.chain(1, 1), 1) == pytest.approx(expected)


def test_more_carriers_are_never_worse():
    for nodes in (4, 9, 16):
        shape, _ = grow_tree(MANY_RANKS, nodes, 3)
        tokens = [lasting_tokens(MANY_RANKS, shape, carriers) for carriers in range(1, nodes + 1)]
        assert tokens == sorted(tokens)
        assert tokens[0] < tokens[-1]


@pytest.mark.parametrize("carriers", [1, 2, 4])
def test_the_average_is_that_of_decoding(carriers):
    """Steps are drawn, node by node, and the streams' guesses counted down where the last node has none of its own."""
    chance, emitted, steps, back = random.Random(0), 0, 20000, 0
    for _ in range(steps):
        left = MANY_RANKS[back:]
        shape, _ = grow_tree(left, 8, len(left))
        worths = node_worths(left, shape)
        carrying = sorted(range(shape.nodes), key=lambda node: -worths[node])[:carriers]
        node = 0
        while True:
            emitted += 1
            children = [child for child in range(shape.nodes) if shape.parents[child] == node]
            draw = chance.random()
            for child in children:
                draw -= worths[child] / worths[node]
                if draw < 0:
                    break
            else:
                break
            node = child
        back = 0
        while node not in carrying:
            node, back = shape.parents[node], back + 1
    assert emitted / steps == pytest.approx(
        lasting_tokens(MANY_RANKS, grow_tree(MANY_RANKS, 8, 3)[0], carriers), rel=0.02
    )
