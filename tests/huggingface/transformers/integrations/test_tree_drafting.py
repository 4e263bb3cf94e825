"""Draft trees: the kernels against the reference, the reference against every path there is, and what every tree must be."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from huggingface.transformers.integrations import tree_drafting_workspace
from huggingface.transformers.integrations.tree_drafting import (
    DraftWorkspace,
    TreeTensors,
    _stream_candidates,
    as_bits,
    draft_tree,
    draft_tree_reference,
)
from huggingface.transformers.integrations.tree_drafting_workspace import (
    SELECTION_WARPS,
    block_warps,
    kernel_sizes,
    level_stages,
    next_power_of_two,
)
from huggingface.transformers.integrations.triton_support import unavailable

from .compile_check import compile_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FIELDS = ("tokens", "parents", "depths", "ancestors", "origins")
needs_kernels = pytest.mark.skipif(unavailable(DEVICE) is not None, reason="Triton cannot run here")


def draws(batch, streams, vocab, rank, dtype=torch.float32, seed=0):
    """Returns random logits, roots and tables."""
    torch.manual_seed(seed)
    logits = (2 * torch.randn(batch, streams, vocab)).to(dtype)
    tables = [torch.randn(vocab, rank).to(dtype).to(DEVICE) if rank else None for _ in range(2)]
    return logits.to(DEVICE), torch.randint(vocab, (batch,)).to(DEVICE), *tables


def drafted(inputs, beam, nodes, draft=draft_tree, **options):
    tree = TreeTensors.allocate(len(inputs[0]), nodes, DEVICE)
    draft(*inputs, tree, beam, **options)
    return tree


def rounding_decides(inputs, beam, prior=None, trust=1.0):
    """Returns whether the sums of two candidates are so near that kernel and reference may order them differently."""
    logits, root, *tables = (
        one.double() if one is not None and one.is_floating_point() else one for one in inputs
    )
    for row, first in enumerate(root.tolist()):
        pool = _stream_candidates(logits[row], first, *tables, beam, beam * beam, prior, trust)
        gaps = torch.tensor([candidate.total for candidate in pool], dtype=torch.float64).sort().values.diff()
        if ((gaps > 0) & (gaps < 1e-5)).any():
            return True
    return False


def falling_prior(streams, beam):
    """Returns log-accuracies that fall along the ranks."""
    torch.manual_seed(streams)
    return (-torch.rand(streams, beam).cumsum(1)).to(DEVICE)


def assert_same(tree, expected):
    for field in FIELDS:
        torch.testing.assert_close(
            getattr(tree, field), getattr(expected, field), msg=lambda m, f=field: f"{f}: {m}"
        )


def assert_well_formed(tree, root):
    """Parents first and one deeper each; ancestors are the bits of the way; siblings differ; padding last."""
    for row in range(len(root)):
        tokens, parents, depths, ancestors, origins = (getattr(tree, field)[row].tolist() for field in FIELDS)
        assert (tokens[0], parents[0], depths[0], ancestors[0], origins[0]) == (int(root[row]), 0, 0, 1, 0)
        ways = [{0}]
        for node, parent in enumerate(parents[1:], start=1):
            assert 0 <= parent < node
            assert depths[node] == depths[parent] + 1
            ways.append(ways[parent] | {node})
            assert ancestors[node] == as_bits(ways[node])
        real = [node for node in range(1, len(tokens)) if origins[node]]
        assert real == list(range(1, len(real) + 1))
        assert len({(parents[node], tokens[node]) for node in real}) == len(real)
        assert all((tokens[n], parents[n], depths[n]) == (0, 0, 1) for n in range(len(real) + 1, len(tokens)))


def test_sums_that_rounding_orders_are_seen():
    """Two of these are equal to the seventh digit; the others differ."""
    assert rounding_decides(draws(2, 2, 29, 1, seed=20), 4)
    assert not rounding_decides(draws(2, 2, 29, 1, seed=21), 4)


@needs_kernels
@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 2),
    streams=st.integers(1, 3),
    vocab=st.sampled_from([1, 3, 29, 128, 131]),
    rank=st.sampled_from([0, 1, 16, 20]),
    beam=st.integers(1, 8),
    nodes=st.integers(2, 64),
    seed=st.integers(0, 99),
)
def test_kernels_equal_the_reference(batch, streams, vocab, rank, beam, nodes, seed):
    inputs = draws(batch, streams, vocab, rank, seed=seed)
    assume(not rounding_decides(inputs, beam))
    tree = drafted(inputs, beam, nodes)
    assert_same(tree, drafted(inputs, beam, nodes, draft_tree_reference))
    assert_well_formed(tree, inputs[1])


@needs_kernels
def test_half_precision_and_many_blocks():
    inputs = draws(1, 2, 900, 16, torch.float16)
    assert_same(drafted(inputs, 8, 32), drafted(inputs, 8, 32, draft_tree_reference))


@needs_kernels
def test_a_workspace_serves_step_after_step():
    space = DraftWorkspace.allocate(2, 3, 300, 4, 16, device=DEVICE)
    chain = torch.tensor([[1, 2, 3, 4], [5, -1, -1, -1]], device=DEVICE)
    tree = TreeTensors.allocate(2, 16, DEVICE)
    for seed in (0, 1, 1):
        inputs = draws(2, 3, 300, 8, seed=seed)
        draft_tree(*inputs, tree, 4, space, chain, -0.01)
        reference = drafted(
            inputs, 4, 16, draft_tree_reference, continuation=chain, continuation_log_probability=-0.01
        )
        assert_same(tree, reference)


@pytest.mark.parametrize("draft", [draft_tree, draft_tree_reference])
def test_equal_logits_take_the_lowest_tokens(draft):
    """Four candidates a node, all alike: the shallower first, then the first in their level."""
    inputs = (torch.zeros(1, 2, 200, device=DEVICE), torch.tensor([7], device=DEVICE), None, None)
    tree = drafted(inputs, 4, 11, draft)
    assert tree.tokens[0].tolist() == [7, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert tree.parents[0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("draft", [draft_tree, draft_tree_reference])
def test_zeros_of_both_signs_tie(draft):
    logits = torch.tensor([[[-1.0, 0.0, -0.0, 0.0, -0.0]]], device=DEVICE)
    tree = drafted((logits, torch.tensor([0], device=DEVICE), None, None), 4, 5, draft)
    assert tree.tokens[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("draft", [draft_tree, draft_tree_reference])
def test_impossible_tokens_are_never_drafted(draft):
    logits = torch.full((1, 2, 9), float("-inf"), device=DEVICE)
    logits[0, :, [2, 5]] = torch.tensor([0.0, 1.0], device=DEVICE)
    tree = drafted((logits, torch.tensor([0], device=DEVICE), None, None), 3, 9, draft)
    assert tree.tokens[0].tolist() == [0, 5, 5, 2, 2, 5, 2, 0, 0]
    assert tree.origins[0].tolist() == [0, 1, 1, 1, 1, 1, 1, 0, 0]
    assert_well_formed(tree, torch.tensor([0]))


@pytest.mark.parametrize("draft", [draft_tree, draft_tree_reference])
def test_sixty_four_nodes_use_the_sign_bit(draft):
    inputs = draws(1, 2, 40, 4)
    tree = drafted(inputs, 8, 64, draft)
    assert tree.ancestors[0, 63] < 0
    assert_well_formed(tree, inputs[1])


def test_one_node_is_the_root():
    inputs = draws(2, 2, 9, 4)
    tree = drafted(inputs, 4, 1)
    assert tree.tokens.tolist() == inputs[1][:, None].tolist()
    assert_well_formed(tree, inputs[1])


@pytest.mark.parametrize("draft", [draft_tree, draft_tree_reference])
@pytest.mark.parametrize("seed", range(3))
def test_a_beam_of_the_whole_vocabulary_finds_the_best_of_all_paths(draft, seed):
    inputs = draws(1, 2, 5, 3, seed=seed)
    logits, root, parent_table, token_table = (tensor.double().cpu() for tensor in inputs)
    bias = parent_table @ token_table.T
    first = (logits[0, 0] + bias[int(root)]).log_softmax(0)
    second = (logits[0, 1] + bias).log_softmax(1)
    sums = {(a,): first[a].item() for a in range(5)}
    sums |= {(a, b): (first[a] + second[a, b]).item() for a, b in itertools.product(range(5), repeat=2)}
    tree = drafted(inputs, 5, 12, draft)
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    paths = [()]
    for node in range(1, 12):
        paths.append((*paths[parents[node]], tokens[node]))
    assert set(paths[1:]) == set(sorted(sums, key=sums.get, reverse=True)[:11])


def test_a_beam_of_one_is_greedy():
    inputs = draws(1, 4, 50, 4)
    logits, root, parent_table, token_table = inputs
    expected = [int(root)]
    for scores in logits[0]:
        expected.append(int((scores + token_table @ parent_table[expected[-1]]).argmax()))
    tree = drafted(inputs, 1, 5)
    assert tree.tokens[0].tolist() == expected
    assert tree.parents[0].tolist() == [0, 0, 1, 2, 3]


def test_the_reference_takes_float64():
    inputs = draws(1, 2, 9, 4, torch.float64)
    assert_same(
        drafted(inputs, 3, 9),
        drafted([inputs[0].float(), inputs[1], *map(torch.Tensor.float, inputs[2:])], 3, 9),
    )


@needs_kernels
@settings(max_examples=10, deadline=None)
@given(
    streams=st.integers(1, 3),
    nodes=st.integers(2, 24),
    beam=st.integers(1, 5),
    tokens=st.lists(st.integers(-1, 6), min_size=2, max_size=10).filter(lambda tokens: len(tokens) % 2 == 0),
    step=st.sampled_from([-3.0, -0.5, 0.0]),
    seed=st.integers(0, 99),
)
def test_chains_from_the_context_equal_the_reference(streams, nodes, beam, tokens, step, seed):
    inputs = draws(2, streams, 7, 3, seed=seed)
    assume(not rounding_decides(inputs, beam))
    chain = torch.tensor(tokens, device=DEVICE).view(2, -1)
    options = {"continuation": chain, "continuation_log_probability": step}
    tree = drafted(inputs, beam, nodes, **options)
    assert_same(tree, drafted(inputs, beam, nodes, draft_tree_reference, **options))
    assert_well_formed(tree, inputs[1])


@pytest.mark.parametrize("draft", [draft_tree, draft_tree_reference])
class TestContinuation:
    def test_none_leaves_the_tree_as_it_is(self, draft):
        inputs = draws(1, 3, 40, 4)
        chain = torch.tensor([[-1, 3, 4]], device=DEVICE)
        assert_same(drafted(inputs, 4, 16, draft, continuation=chain), drafted(inputs, 4, 16, draft))

    def test_may_be_deeper_than_the_streams(self, draft):
        inputs = draws(1, 2, 40, 4)
        chain = torch.tensor([[38, 37, 36, 35, 34]], device=DEVICE)
        tree = drafted(inputs, 2, 8, draft, continuation=chain, continuation_log_probability=-0.01)
        assert tree.tokens[0, tree.origins[0] == 2].tolist() == chain[0].tolist()
        assert tree.depths[0, tree.origins[0] == 2].tolist() == [1, 2, 3, 4, 5]

    def test_what_the_streams_propose_too_is_theirs_and_counted_once(self, draft):
        inputs = draws(1, 3, 40, 4)
        chain = drafted(inputs, 1, 4, draft).tokens[:, 1:]
        tree = drafted(inputs, 1, 4, draft, continuation=chain)
        assert tree.tokens[0, 1:].tolist() == chain[0].tolist()
        assert tree.origins[0].tolist() == [0, 1, 1, 1]

    def test_raises_what_it_repeats(self, draft):
        """The second-best token of depth 1 enters a tree of two nodes because the context says so."""
        logits = torch.tensor([[[0.0, 5.0, 1.0]]], device=DEVICE)
        inputs = (logits, torch.tensor([0], device=DEVICE), None, None)
        chain = torch.tensor([[2]], device=DEVICE)
        options = {"continuation": chain, "continuation_log_probability": -0.001}
        assert drafted(inputs, 2, 2, draft).tokens[0].tolist() == [0, 1]
        tree = drafted(inputs, 2, 2, draft, **options)
        assert (tree.tokens[0].tolist(), tree.origins[0].tolist()) == ([0, 2], [0, 1])


@needs_kernels
@settings(max_examples=6, deadline=None)
@given(
    streams=st.integers(1, 3),
    beam=st.integers(1, 8),
    nodes=st.integers(2, 40),
    trust=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_priors_equal_the_reference(streams, beam, nodes, trust, seed):
    inputs = draws(2, streams, 150, 4, seed=seed)
    options = {"prior": falling_prior(streams, beam), "trust": trust}
    assume(not rounding_decides(inputs, beam, **options))
    tree = drafted(inputs, beam, nodes, **options)
    assert_same(tree, drafted(inputs, beam, nodes, draft_tree_reference, **options))
    assert_well_formed(tree, inputs[1])


@needs_kernels
@pytest.mark.parametrize("vocab", [2500, 2100, 75])
def test_blocks_of_several_groups(vocab, monkeypatch):
    """20 blocks of four groups, 17 of the 32 a power of two would have, and one that is mostly empty."""
    monkeypatch.setattr(tree_drafting_workspace, "SMALL_BLOCK", 128)
    monkeypatch.setattr(tree_drafting_workspace, "SMALL_GROUP", 32)
    inputs = draws(1, 3, vocab, 4)
    assert_same(drafted(inputs, 4, 24), drafted(inputs, 4, 24, draft_tree_reference))


@needs_kernels
def test_ties_across_blocks():
    """Few different logits, so that most tokens tie."""
    logits = torch.randint(3, (1, 3, 4480), device=DEVICE).float()
    inputs = (logits, torch.tensor([1], device=DEVICE), None, None)
    assert_same(drafted(inputs, 4, 24), drafted(inputs, 4, 24, draft_tree_reference))


@pytest.mark.parametrize("draft", [draft_tree, draft_tree_reference])
class TestPrior:
    def test_full_trust_leaves_the_tree_as_it_is(self, draft):
        inputs = draws(1, 3, 40, 4)
        assert_same(
            drafted(inputs, 4, 16, draft, prior=falling_prior(3, 4), trust=1.0), drafted(inputs, 4, 16, draft)
        )

    def test_without_trust_only_ranks_count(self, draft):
        """The second-best token of depth 1, however unlikely, comes before the best one of depth 2."""
        logits = torch.tensor([[[9.0, 0.0, -9.0], [9.0, 0.0, -9.0]]], device=DEVICE)
        inputs = (logits, torch.tensor([2], device=DEVICE), None, None)
        prior = torch.tensor([[-0.5, -0.6], [-0.7, -0.8]], device=DEVICE)
        assert drafted(inputs, 2, 3, draft).parents[0].tolist() == [0, 0, 1]
        tree = drafted(inputs, 2, 4, draft, prior=prior, trust=0.0)
        assert tree.tokens[0].tolist() == [2, 0, 1, 0]
        assert tree.parents[0].tolist() == [0, 0, 0, 1]

    def test_weighs_the_log_probability_against_the_rank(self, draft):
        """Sums of the second child of the root and of the best grandchild cross where the weight is 1/2."""
        first, second = torch.tensor([0.7, 0.3]).log(), torch.tensor([0.9, 0.1]).log()
        logits = torch.stack([first, second])[None].to(DEVICE)
        inputs = (logits, torch.tensor([0], device=DEVICE), None, None)
        grandchild, child = (first[0] + second[0]).item(), first[1].item()
        # At depth 1 the second rank is as much better than two steps down as it is worse by its log-probability.
        prior = torch.tensor([[-0.1, -0.2], [-0.1 - (grandchild - child), -3.0]], device=DEVICE)
        for trust, parent in ((0.45, 0), (0.55, 1)):
            tree = drafted(inputs, 2, 3, draft, prior=prior, trust=trust)
            assert tree.parents[0].tolist() == [0, 0, parent]

    def test_gives_impossible_tokens_no_place(self, draft):
        logits = torch.full((1, 2, 9), float("-inf"), device=DEVICE)
        logits[0, :, [2, 5]] = torch.tensor([0.0, 1.0], device=DEVICE)
        inputs = (logits, torch.tensor([0], device=DEVICE), None, None)
        tree = drafted(inputs, 3, 9, draft, prior=falling_prior(2, 3), trust=0.0)
        assert tree.origins[0].tolist() == [0, 1, 1, 1, 1, 1, 1, 0, 0]
        assert_well_formed(tree, torch.tensor([0]))

    def test_of_equal_ranks_keeps_the_order_of_parents(self, draft):
        inputs = draws(1, 2, 40, 4)
        tree = drafted(inputs, 4, 16, draft, prior=torch.full((2, 4), -1.0, device=DEVICE), trust=0.0)
        assert tree.parents[0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]


def test_impossible_requests_are_refused():
    inputs = draws(1, 2, 9, 4)
    tree = TreeTensors.allocate(1, 4, DEVICE)
    with pytest.raises(ValueError, match="1 to 64 nodes"):
        TreeTensors.allocate(1, 65)
    with pytest.raises(ValueError, match="beam"):
        DraftWorkspace.allocate(1, 2, 9, 17, 4)
    with pytest.raises(ValueError, match="stream"):
        DraftWorkspace.allocate(1, 0, 9, 4, 4)
    with pytest.raises(ValueError, match="tables"):
        draft_tree(*inputs[:3], None, tree, 4)
    with pytest.raises(ValueError, match="at most 0"):
        draft_tree(*inputs, tree, 4, continuation_log_probability=0.1)
    with pytest.raises(ValueError, match="trust"):
        draft_tree(*inputs, tree, 4, prior=falling_prior(2, 4), trust=1.5)
    with pytest.raises(ValueError, match="prior"):
        draft_tree(*inputs, tree, 4, prior=falling_prior(2, 3))


@needs_kernels
def test_a_workspace_of_other_sizes_is_refused():
    space = DraftWorkspace.allocate(1, 2, 9, 4, 8, device=DEVICE)
    with pytest.raises(ValueError, match="workspace"):
        drafted(draws(1, 2, 9, 4), 5, 8, workspace=space)


SIZES = {
    # dtype, vocab, beam, nodes, streams, chain
    "small vocabulary": ("bf16", 8192, 8, 32, 4, 0),
    "largest tree": ("bf16", 8192, 8, 64, 7, 16),
    "large vocabulary": ("bf16", 50257, 8, 64, 4, 16),
    "float32, largest vocabulary": ("fp32", 128256, 8, 64, 4, 0),
    "high rank": ("bf16", 50257, 8, 32, 4, 0, 256),
}


MODULE = "huggingface.transformers.integrations.tree_drafting_kernels"
TYPES = {name: "*i64" for name in ("root", "tokens", "ancestors", "continuation")}
TYPES |= {name: "*fp32" for name in ("scored", "parts", "pool_sums", "prior")}
TYPES |= {name: "*i32" for name in ("pool_tokens", "pool_parents", "parents", "depths", "origins")}
TYPES |= {name: "i32" for name in ("logits_batch_stride", "logits_stream_stride", "vocab", "rank", "level")}
TYPES |= {"nodes": "i32", "chain_length": "i32", "chain_step": "fp32", "trust": "fp32"}


def kernels_of(kind, vocab, beam, nodes, streams, chain, rank=64):
    """Returns what compiles the kernel of a level and the one that selects the tree."""
    types = TYPES | {name: f"*{kind}" for name in ("logits", "parent_table", "token_table")}
    sizes = kernel_sizes(beam, nodes, streams, vocab)
    warps = block_warps(sizes["BLOCK"])
    level = {"RANK": rank, "FIRST": False}
    selection = {
        "ENTRIES": next_power_of_two(streams * sizes["SLOTS"]),
        "NODES": next_power_of_two(nodes),
        "CHAIN": chain,
    } | ({} if chain else {"continuation": None})
    return [
        (MODULE, "draft_level_kernel", types, sizes | level, warps, level_stages(rank), ("rank",)),
        (MODULE, "draft_selection_kernel", types, sizes | selection, SELECTION_WARPS, 3, ()),
    ]


def test_kernels_compile_without_spills():
    pytest.importorskip("triton")
    with ThreadPoolExecutor(2) as pool:
        compiled = pool.map(lambda size: compile_kernels(kernels_of(*size)), SIZES.values())
    for name, kernels in zip(SIZES, compiled, strict=True):
        assert all(usage.fits for usages in kernels for usage in usages), (name, kernels)
