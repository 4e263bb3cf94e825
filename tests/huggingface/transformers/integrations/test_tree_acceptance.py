"""Acceptance and commit: the kernels against their references, both against the eager path that the CPU runs."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from huggingface.transformers.generation.draft_tree import DraftTree, TreeShape
from huggingface.transformers.generation.verification import verify
from huggingface.transformers.integrations.tree_acceptance import (
    BestTokensWorkspace,
    StepState,
    accept_and_advance,
    accept_and_advance_reference,
    best_tokens,
    best_tokens_reference,
    commit_rows,
    commit_rows_reference,
)
from huggingface.transformers.integrations.tree_drafting import TreeTensors, as_bits
from huggingface.transformers.integrations.triton_support import unavailable

from .compile_check import compile_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(unavailable(DEVICE) is not None, reason="Triton cannot run here")


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 5000), (2, 3, 37), (1, 4, 2048), (300, 1, 1030)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_best_tokens_equal_the_reference(shape, dtype):
    torch.manual_seed(0)
    logits = torch.randint(-5, 5, shape).to(dtype).to(DEVICE)  # ties everywhere
    assert best_tokens(logits).tolist() == best_tokens_reference(logits).tolist()


@needs_kernels
def test_rows_may_lie_apart():
    logits = torch.randn(2, 9, 3007).to(DEVICE)[:, 2:7, :3001]
    assert best_tokens(logits).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("best", [best_tokens, best_tokens_reference])
def test_ties_go_to_the_lowest_token(best):
    assert best(torch.zeros(1, 2, 3000, device=DEVICE)).tolist() == [[0, 0]]
    logits = torch.full((1, 1, 3000), float("-inf"), device=DEVICE)
    assert best(logits).tolist() == [[0]]
    logits[0, 0, [17, 2900]] = -3.0
    assert best(logits).tolist() == [[17]]
    assert best(torch.tensor([[[-1.0, -0.0, 0.0]]], device=DEVICE)).tolist() == [[1]]


@needs_kernels
def test_a_workspace_serves_call_after_call():
    space = BestTokensWorkspace.allocate(2, 5000, DEVICE)
    out = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
    for seed in range(3):
        torch.manual_seed(seed)
        logits = torch.randn(1, 2, 5000).to(DEVICE)
        assert best_tokens(logits, space, out) is out
        assert out.tolist() == logits.argmax(-1).tolist()
        assert space.arrivals.tolist() == [0, 0]


@st.composite
def steps(draw):
    """Draws parents of random trees and tokens of a small vocabulary, picked ones made to agree often."""
    batch, nodes = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 5, 12, 64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    reach = draw(st.sampled_from([1, 2, 60]))  # how far back a parent may lie: deep trees or wide ones
    vocab = draw(st.sampled_from([1, 2, 9]))
    parents = [
        [-1, *(int(torch.randint(max(0, n - reach), n, (), generator=generator)) for n in range(1, nodes))]
        for _ in range(batch)
    ]
    tokens = torch.randint(vocab, (batch, nodes), generator=generator)
    chosen = torch.randint(vocab, (batch, nodes), generator=generator)
    return parents, tokens, chosen


def tree_of(parents, tokens):
    tree = TreeTensors.allocate(*tokens.shape, DEVICE)
    tree.tokens.copy_(tokens)
    for row, above in enumerate(parents):
        shape = TreeShape(tuple(above))
        tree.parents[row] = torch.tensor([max(parent, 0) for parent in above])
        tree.depths[row] = torch.tensor(shape.depths)
        tree.ancestors[row] = torch.tensor([as_bits(set(shape.path(node))) for node in range(shape.nodes)])
    return tree


def state_of(batch, lengths, finished=None, capacity=80):
    torch.manual_seed(1)
    return StepState(
        root=torch.zeros(batch, dtype=torch.int64, device=DEVICE),
        lengths=torch.tensor(lengths, device=DEVICE),
        finished=torch.tensor(finished or [False] * batch, device=DEVICE),
        stream_states=torch.randn(batch, 3, 5).to(DEVICE),
        history=torch.randint(9, (batch, capacity)).to(DEVICE),
        base=torch.zeros(batch, dtype=torch.int64, device=DEVICE),
    )


def accepted(accept, parents, tokens, chosen, state, depth=63, carriers=None):
    batch, nodes = tokens.shape
    torch.manual_seed(2)
    # As they come out of the LM head: behind other rows, and with a gap behind each.
    states = torch.randn(batch, 2 + 3 * (carriers or nodes), 8).to(DEVICE)[:, 2:, :5].unflatten(1, (-1, 3))
    packed = torch.full((batch, depth + 2), -7, device=DEVICE)
    path = torch.full((batch, depth + 1), -7, device=DEVICE)
    accept(chosen.to(DEVICE), tree_of(parents, tokens), states, state, packed, path)
    return packed, path, states


@settings(max_examples=25, deadline=None)
@given(steps())
def test_acceptance_is_that_of_the_eager_path(step):
    parents, tokens, chosen = step
    batch, nodes = tokens.shape
    state = state_of(batch, [4] * batch)
    packed, path, states = accepted(accept_and_advance, parents, tokens, chosen, state)
    for row, above in enumerate(parents):
        expected = verify(chosen[row : row + 1], DraftTree(TreeShape(tuple(above)), tokens[row : row + 1]))
        count = int(expected.counts)
        assert packed[row].tolist() == [count, *expected.tokens[0, :count].tolist(), *[0] * (64 - count)]
        assert path[row, : expected.path.shape[1]].tolist() == expected.path[0].tolist()
        last = int(expected.last)
        assert path[row, count - 1 :].tolist() == [last] * (65 - count)
        torch.testing.assert_close(state.stream_states[row], states[row, last])


@needs_kernels
@settings(max_examples=15, deadline=None)
@given(steps(), st.integers(0, 63), st.data())
def test_acceptance_equals_the_reference(step, depth, data):
    parents, tokens, chosen = step
    batch, nodes = tokens.shape
    carriers = data.draw(st.integers(1, nodes))
    lengths = data.draw(st.lists(st.integers(0, 79), min_size=batch, max_size=batch))
    finished = data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch))
    states = state_of(batch, lengths, finished), state_of(batch, lengths, finished)
    results = [
        accepted(accept, parents, tokens, chosen, state, depth, carriers)
        for accept, state in zip((accept_and_advance, accept_and_advance_reference), states, strict=True)
    ]
    for name, ours, theirs in zip(("packed", "path"), *results, strict=False):
        assert ours.tolist() == theirs.tolist(), name
    for field in fields(StepState):
        ours, theirs = (getattr(state, field.name) for state in states)
        assert torch.equal(ours, theirs), field.name


@pytest.mark.parametrize("accept", [accept_and_advance, accept_and_advance_reference])
class TestAdvance:
    parents = [[-1, 0, 0, 2]]
    tokens = torch.tensor([[9, 1, 2, 3]])
    chosen = torch.tensor([[2, 8, 3, 6]])

    def test_the_bonus_token_becomes_the_root(self, accept):
        state = state_of(1, [5])
        before = state.history.tolist()[0]
        packed, path, _ = accepted(accept, self.parents, self.tokens, self.chosen, state, depth=3)
        assert packed.tolist() == [[3, 2, 3, 6, 0]]
        assert path.tolist() == [[0, 2, 3, 3]]
        assert (state.root.tolist(), state.lengths.tolist(), state.base.tolist()) == ([6], [8], [5])
        assert state.history.tolist()[0] == [*before[:6], 2, 3, 6, *before[9:]]

    @pytest.mark.parametrize("carriers, carrier, passed", [(4, 3, 0), (3, 2, 1), (2, 0, 2)])
    def test_the_nearest_carriers_streams_guess_on(self, accept, carriers, carrier, passed):
        """Node 3 is the last one accepted, behind nodes 2 and 0."""
        state = state_of(1, [5])
        _, _, states = accepted(accept, self.parents, self.tokens, self.chosen, state, 3, carriers)
        assert torch.equal(state.stream_states[0, : 3 - passed], states[0, carrier, passed:])
        assert not state.stream_states[0, 3 - passed :].any()

    def test_streams_that_are_all_used_up_leave_nothing(self, accept):
        state = state_of(1, [5])
        chain, tokens = [[-1, 0, 1, 2, 3]], torch.tensor([[9, 1, 2, 3, 4]])
        accepted(accept, chain, tokens, torch.tensor([[1, 2, 3, 4, 5]]), state, depth=4, carriers=1)
        assert not state.stream_states.any()

    def test_a_finished_sequence_grows_no_longer(self, accept):
        state = state_of(1, [5], [True])
        before = state.history.tolist()
        packed, _, _ = accepted(accept, self.parents, self.tokens, self.chosen, state, depth=3)
        assert packed[0, 0] == 3
        assert (state.lengths.tolist(), state.base.tolist(), state.history.tolist()) == ([5], [5], before)

    def test_the_history_is_never_overrun(self, accept):
        whole = torch.zeros(2, 8, dtype=torch.int64, device=DEVICE)
        state = state_of(1, [6])
        state = StepState(state.root, state.lengths, state.finished, None, whole[:1], state.base)
        accepted(accept, self.parents, self.tokens, self.chosen, state, depth=3)
        assert whole.tolist() == [[0] * 7 + [2], [0] * 8]

    def test_nodes_deeper_than_the_path_are_rejected(self, accept):
        state = state_of(1, [5])
        packed, path, _ = accepted(accept, self.parents, self.tokens, self.chosen, state, depth=1)
        assert (packed.tolist(), path.tolist()) == ([[2, 2, 3]], [[0, 2]])

    def test_without_streams_and_history(self, accept):
        full = state_of(1, [5])
        state = StepState(full.root, full.lengths, full.finished, None, None, full.base)
        packed, path = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE), full.base[:, None].clone()
        accept(
            torch.tensor([[4]], device=DEVICE), TreeTensors.allocate(1, 1, DEVICE), None, state, packed, path
        )
        assert (packed.tolist(), state.root.tolist(), state.lengths.tolist()) == ([[1, 4]], [4], [6])


def committed(commit, path, count, base, finished=(False,), slots=10):
    torch.manual_seed(3)
    batch = len(path)
    block = torch.randn(2, 2, batch, 3, slots, 5).to(DEVICE)
    before = block.clone()
    integers = [torch.tensor(values, device=DEVICE) for values in (path, [[n] for n in count], base)]
    packed = torch.cat([integers[1], torch.zeros_like(integers[0])], dim=1)
    commit(block, integers[0], packed, integers[2], torch.tensor(finished, device=DEVICE))
    return block, before


@pytest.mark.parametrize("commit", [commit_rows, commit_rows_reference])
class TestCommit:
    def test_accepted_rows_go_to_their_positions_and_nothing_else_moves(self, commit):
        """Row 5 lies where row 3's target is the source of another row: 1 -> 1, 3 -> 2, 5 -> 3."""
        block, before = committed(commit, [[0, 1, 3, 5, 5]], [4], [2])
        order = [0, 1, 2, 3, 5, 7, 6, 7, 8, 9]
        torch.testing.assert_close(block, before[:, :, :, :, order])

    def test_a_row_that_is_source_and_target_is_read_first(self, commit):
        block, before = committed(commit, [[0, 2, 3, 4]], [4], [0])
        torch.testing.assert_close(block[..., 1:4, :], before[..., 2:5, :])

    def test_a_chain_stays_as_it_is(self, commit):
        block, before = committed(commit, [[0, 1, 2, 3]], [4], [2])
        assert torch.equal(block, before)

    def test_finished_sequences_and_rejected_rows_stay(self, commit):
        block, before = committed(commit, [[0, 2, 5], [0, 3, 4]], [2, 3], [1, 0], (False, True))
        assert torch.equal(block[:, :, 1], before[:, :, 1])
        assert torch.equal(block[:, :, 0, :, 3:], before[:, :, 0, :, 3:])
        assert torch.equal(block[:, :, 0, :, 2], before[:, :, 0, :, 3])

    def test_slots_beyond_the_end_are_skipped(self, commit):
        block, before = committed(commit, [[0, 2, 6]], [3], [6])
        assert torch.equal(block[..., 7, :], before[..., 8, :])
        assert torch.equal(block[..., 8:, :], before[..., 8:, :])


@needs_kernels
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_commits_equal_the_reference(data):
    batch, depth = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    nodes = st.sets(st.integers(1, 12), min_size=depth, max_size=depth)
    path = [[0, *sorted(data.draw(nodes))] for _ in range(batch)]
    count = [data.draw(st.integers(1, depth + 1)) for _ in range(batch)]
    base = [data.draw(st.integers(0, 11)) for _ in range(batch)]
    finished = [data.draw(st.booleans()) for _ in range(batch)]
    ours, theirs = (
        committed(commit, path, count, base, finished, 12)[0]
        for commit in (commit_rows, commit_rows_reference)
    )
    assert torch.equal(ours, theirs)


def test_kernels_compile_without_spills():
    pytest.importorskip("triton")
    module = "huggingface.transformers.integrations.tree_acceptance_kernels"
    integers = {
        name: "*i64" for name in ("chosen", "tokens", "ancestors", "root", "lengths", "history", "base")
    }
    integers |= {name: "*i64" for name in ("packed", "path", "keys", "out")}
    integers |= {name: "*i32" for name in ("parents", "depths", "arrivals")} | {"finished": "*i1"}
    sizes = (
        "nodes",
        "deepest",
        "carriers",
        "streams",
        "width",
        "capacity",
        "vocab",
        "heads",
        "slots",
        "columns",
    )
    strides = ("layer_stride", "kind_stride", "batch_stride", "head_stride", "slot_stride")
    strides += ("node_stride", "carrier_stride", "stream_stride")
    integers |= {name: "i32" for name in (*sizes, *strides)}
    kernels = []
    for kind in ("bf16", "fp32"):
        floats = {name: f"*{kind}" for name in ("logits", "stream_states", "kept_states", "block")}
        best = {"TILES": 2, "BLOCK": 1024, "BLOCKS": 64}
        accept = {"STREAMS": True, "HISTORY": True, "NODES": 64, "COLUMNS": 32, "BLOCK": 2048}
        commit = {"SIZE": 128, "LANES": 128, "ROWS": 16}
        for name, constants in (("best_tokens", best), ("accept", accept), ("commit", commit)):
            kernels.append((module, f"{name}_kernel", integers | floats, constants, 4, 3, strides))
    for kernel, usages in zip(kernels, compile_kernels(kernels), strict=True):
        assert all(usage.fits for usage in usages), (kernel[1], usages)
