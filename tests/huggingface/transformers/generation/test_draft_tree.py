"""Shapes, masks, verification and pruning as properties over random trees (gate G7)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from huggingface.transformers.generation.decode_step import prune
from huggingface.transformers.generation.draft_tree import (
    DraftTree,
    TreeShape,
    ancestor_matrix,
    stream_block,
)
from huggingface.transformers.generation.tree_worth import grow_tree
from huggingface.transformers.generation.verification import verify
from huggingface.transformers.masking_utils import visible_in_step, visible_with_streams


@st.composite
def shapes(draw, most: int = 12) -> TreeShape:
    parents = [-1]
    for node in range(1, draw(st.integers(1, most))):
        parents.append(draw(st.integers(0, node - 1)))
    return TreeShape(tuple(parents), draw(st.integers(0, 3)))


def test_a_tree_by_hand():
    """The drawing in the module's docstring."""
    shape = TreeShape((-1, 0, 0, 1), streams=1)
    assert shape.depths == (0, 1, 1, 2)
    assert shape.ranks == (0, 0, 1, 0)
    assert shape.path(3) == (0, 1, 3)
    assert shape.cut(1) == TreeShape((-1, 0, 0), 1)
    assert ancestor_matrix(shape).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [1, 1, 0, 1],
    ]


@pytest.mark.parametrize("parents", [(), (0,), (-1, 2, 0), (-1, -1)])
def test_impossible_trees_are_refused(parents):
    with pytest.raises(ValueError, match="parent"):
        TreeShape(parents)


@given(shapes())
def test_ancestors_are_the_path_and_transitive(shape):
    matrix = ancestor_matrix(shape)
    for node in range(shape.nodes):
        assert set(matrix[node].nonzero()[:, 0].tolist()) == set(shape.path(node))
        assert len(shape.path(node)) == shape.depths[node] + 1
    reach = matrix.float() @ matrix.float() > 0
    assert torch.equal(reach, matrix)


@given(shapes(), st.integers(1, 9), st.integers(0, 3), st.sampled_from([None, 3]))
def test_step_mask_is_context_ancestors_and_own_streams(shape, length, shorter, window):
    """Against the definition, row by row: also in a batch of unequal lengths and with a local window."""
    lengths = torch.tensor([length, max(1, length - shorter)])
    tables = shape.tables(torch.device("cpu"))
    positions = lengths[:, None] + tables.row_depths
    visible = visible_in_step(tables.block, positions, lengths, length, window)
    owners = [*range(shape.nodes), *(n for n in range(shape.nodes) for _ in range(shape.streams))]
    numbers = [0] * shape.nodes + list(range(1, shape.streams + 1)) * shape.nodes
    for row in range(2):
        for query, (owner, number) in enumerate(zip(owners, numbers, strict=True)):
            for key in range(visible.shape[-1]):
                if key < length:
                    want, position = key < lengths[row], key
                else:
                    other, other_number = owners[key - length], numbers[key - length]
                    on_path = other in shape.path(owner) and other_number == 0
                    sibling = other == owner and 0 < other_number <= number
                    want, position = on_path or sibling, int(positions[row, key - length])
                if window is not None:
                    want = want and int(positions[row, query]) - position < window
                assert bool(visible[row, 0, query, key]) == bool(want)


def test_streams_of_a_sequence_by_hand():
    """The drawing in `visible_with_streams`."""
    visible = visible_with_streams(torch.arange(3)[None], torch.tensor([[1]]), streams=2)
    assert visible[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]


@given(shapes(), st.randoms(use_true_random=False))
def test_verify_walks_like_a_person(shape, rng):
    """Against a walk from the root, with few tokens so that siblings repeat and paths go deep."""
    tokens = torch.tensor([[rng.randrange(3) for _ in range(shape.nodes)]])
    chosen = torch.tensor([[rng.randrange(3) for _ in range(shape.nodes)]])
    got = verify(chosen, DraftTree(shape, tokens))

    def longest(node: int) -> list[int]:
        ways = [
            longest(child)
            for child, parent in enumerate(shape.parents)
            if parent == node and tokens[0, child] == chosen[0, node]
        ]
        return [int(chosen[0, node]), *max(ways, key=len, default=[])]

    want = longest(0)
    count = int(got.counts[0])
    assert count == len(want)
    assert got.tokens[0, :count].tolist()[0] == want[0]
    path = got.path[0, :count].tolist()
    assert path == list(shape.path(int(got.last[0])))
    for parent, child in zip(path, path[1:], strict=False):
        assert tokens[0, child] == chosen[0, parent]


@settings(deadline=None)
@given(shapes(), st.integers(1, 12), st.integers(0, 1000))
def test_pruning_keeps_parents_and_scores_at_the_parent(shape, keep, seed):
    keep = min(keep, shape.nodes)
    generator = torch.Generator().manual_seed(seed)
    early = torch.rand(2, shape.nodes, 5, generator=generator).softmax(-1)
    tree = DraftTree(shape, torch.randint(0, 5, (2, shape.nodes), generator=generator))
    kept = prune(early, tree, keep)
    for row in range(2):
        nodes = kept.nodes[row].tolist()
        assert nodes == sorted(set(nodes))
        assert len(nodes) == keep
        assert nodes[0] == 0
        assert all(shape.parents[node] in nodes for node in nodes[1:])
        worth = [1.0] * shape.nodes
        for node in range(1, shape.nodes):
            parent = shape.parents[node]
            worth[node] = worth[parent] * float(early[row, parent, tree.tokens[row, node]])
        left_out = [worth[node] for node in range(shape.nodes) if node not in nodes]
        assert min(worth[node] for node in nodes) >= max(left_out, default=0.0) - 1e-6
        assert [int(kept.places[row, node]) for node in nodes] == list(range(keep))


def test_stream_block_without_streams_is_the_tree():
    matrix = ancestor_matrix(TreeShape((-1, 0, 1)))[None]
    assert torch.equal(stream_block(matrix, 0)[:, 0], matrix)


def test_grown_tree_by_hand():
    """Worths: depth 1: .6 .3; depth 2 under rank 0: .48 .06, under rank 1: .24 .03."""
    accuracy = [[0.6, 0.3], [0.8, 0.1]]
    shape, expected = grow_tree(accuracy, 5, streams=2)
    assert shape.parents == (-1, 0, 0, 1, 2)
    assert shape.streams == 2
    assert expected == pytest.approx(1 + 0.6 + 0.3 + 0.48 + 0.24)


@given(st.integers(1, 40), st.integers(0, 4))
def test_grown_trees_are_valid_and_within_budget(nodes, streams):
    accuracy = [[0.5, 0.2, 0.1]] * streams
    shape, expected = grow_tree(accuracy, nodes, streams)
    assert shape.nodes <= nodes
    assert shape.depth <= streams
    assert 1.0 <= expected <= streams + 1


def test_a_tree_needs_its_root():
    with pytest.raises(ValueError, match="at least its root"):
        grow_tree([[0.5]], 0, 1)
