"""Chains: the kernels against the reference of trees, level after level, and what they need of a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from huggingface.transformers.integrations import chain_drafting, tree_drafting
from huggingface.transformers.integrations.tree_drafting import (
    DraftWorkspace,
    TreeTensors,
    draft_tree,
    draft_tree_reference,
)
from huggingface.transformers.integrations.tree_drafting_workspace import padded_rank

from .compile_check import compile_kernels
from .test_tree_drafting import DEVICE, TYPES, assert_same, assert_well_formed, drafted, draws, needs_kernels

MODULE = "huggingface.transformers.integrations.chain_drafting"
pytestmark = needs_kernels


@pytest.fixture
def drawn(monkeypatch) -> list[str]:
    """Returns a list that gains an entry for every chain that is drawn here."""
    known: list[str] = []
    monkeypatch.setattr(
        tree_drafting, "draft_chain", lambda *args: known.append("chain") or chain_drafting.draft_chain(*args)
    )
    return known


def test_a_beam_of_one_without_a_continuation_is_drawn_here(drawn):
    inputs = draws(1, 3, 40, 8)
    for options in ({}, {"continuation": torch.tensor([[3, 1]], device=DEVICE)}):
        assert_same(drafted(inputs, 1, 4, **options), drafted(inputs, 1, 4, draft_tree_reference, **options))
        assert drawn == ["chain"]
    drafted(inputs, 2, 4)
    assert drawn == ["chain"]


def test_chains_need_little_memory():
    """And then no continuation can join them."""
    space = DraftWorkspace.allocate(1, 3, 40, 1, 4, DEVICE, continued=False)
    assert space.scored.numel() == space.parts.numel() == 0
    tree, inputs = TreeTensors.allocate(1, 4, DEVICE), draws(1, 3, 40, 8)
    draft_tree(*inputs, tree, 1, space)
    assert_same(tree, drafted(inputs, 1, 4, draft_tree_reference))
    with pytest.raises(ValueError, match="no continuation"):
        draft_tree(*inputs, tree, 1, space, torch.tensor([[3]], device=DEVICE))
    assert DraftWorkspace.allocate(1, 3, 40, 2, 4, DEVICE, continued=False).scored.numel()


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    streams=st.integers(1, 6),
    vocab=st.sampled_from([1, 3, 64, 65, 300]),
    rank=st.sampled_from([0, 1, 16, 20, 64, 80]),
    nodes=st.integers(2, 64),
    seed=st.integers(0, 99),
)
def test_equal_the_reference(batch, streams, vocab, rank, nodes, seed):
    """Shorter than the streams reach, as long, and longer, which leaves padding."""
    inputs = draws(batch, streams, vocab, rank, seed=seed)
    tree = drafted(inputs, 1, nodes)
    assert_same(tree, drafted(inputs, 1, nodes, draft_tree_reference))
    assert_well_formed(tree, inputs[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_a_prior_that_cannot_matter(dtype):
    inputs = draws(1, 4, 900, 16, dtype)
    prior = -torch.rand(4, 1, device=DEVICE)
    expected = drafted(inputs, 1, 5, draft_tree_reference, prior=prior, trust=0.5)
    assert_same(drafted(inputs, 1, 5, prior=prior, trust=0.5), expected)


def test_a_large_vocabulary_has_larger_blocks(monkeypatch):
    monkeypatch.setattr(chain_drafting, "SMALL_VOCABULARY", 100)
    inputs = draws(1, 2, 700, 16)
    assert_same(drafted(inputs, 1, 3), drafted(inputs, 1, 3, draft_tree_reference))


def test_a_workspace_serves_step_after_step():
    """Keys of the step before are gone, also those of better scores."""
    space = DraftWorkspace.allocate(2, 3, 100, 1, 4, device=DEVICE)
    tree = TreeTensors.allocate(2, 4, DEVICE)
    for seed in (0, 1, 2):
        logits, *rest = draws(2, 3, 100, 8, seed=seed)
        inputs = (logits - 10 * seed, *rest)
        draft_tree(*inputs, tree, 1, space)
        assert_same(tree, drafted(inputs, 1, 4, draft_tree_reference))


def test_ties_go_to_the_lowest_token_of_any_block():
    logits = torch.zeros(1, 2, 300, device=DEVICE)
    logits[0, 0, [70, 200]] = 1.0
    tree = drafted((logits, torch.tensor([5], device=DEVICE), None, None), 1, 3)
    assert tree.tokens[0].tolist() == [5, 70, 0]


@pytest.mark.parametrize(
    "number, where",
    [
        ("-inf", slice(None)),
        ("inf", 70),
        ("inf", slice(None)),
        ("nan", 70),
        ("-nan", 70),
        ("-nan", slice(None)),
    ],
)
def test_a_chain_ends_where_no_token_is_possible(number, where):
    """One token that is not a number, or infinitely likely, leaves no other a probability, nor itself."""
    logits, *rest = draws(1, 4, 130, 8)
    logits[0, 2, where] = float(number) if number != "-nan" else -torch.tensor(float("nan"))
    inputs = (logits, *rest)
    tree = drafted(inputs, 1, 5)
    assert_same(tree, drafted(inputs, 1, 5, draft_tree_reference))
    assert tree.origins[0].tolist() == [0, 1, 1, 0, 0]


@pytest.mark.parametrize(
    "kind, vocab, rank", [("bf16", 8192, 64), ("bf16", 128256, 256), ("fp32", 8192, 64), ("fp32", 128256, 20)]
)
def test_kernels_compile_without_spills(kind, vocab, rank):
    pytest.importorskip("triton")
    types = (
        TYPES | {name: f"*{kind}" for name in ("logits", "parent_table", "token_table")} | {"best": "*i64"}
    )
    small = vocab <= chain_drafting.SMALL_VOCABULARY
    level = {
        "STREAMS": 6, "RANK": padded_rank(rank), "FIRST": False,
        "BLOCK": chain_drafting.SMALL_BLOCK if small else chain_drafting.LARGE_BLOCK,
    }  # fmt: skip
    kernels: list[tuple] = [
        (MODULE, "chain_level_kernel", types, level, chain_drafting.LEVEL_WARPS, 3, ("rank",)),
        (
            MODULE,
            "chain_selection_kernel",
            types,
            {"STREAMS": 6, "NODES": 64},
            chain_drafting.SELECTION_WARPS,
            3,
            (),
        ),
    ]
    assert all(usage.fits for usages in compile_kernels(kernels) for usage in usages)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [8192, 50257])
def test_on_the_gpu_at_real_sizes(vocab):
    """Scores rounded to quarters, so that sums are exact and ties many."""
    logits, root, parent_table, token_table = draws(3, 6, vocab, 64, torch.bfloat16)
    inputs = (logits * 4).round() / 4, root, parent_table.round(), token_table.round()
    expected = drafted(inputs, 1, 7, draft_tree_reference)
    for _ in range(20):
        assert_same(drafted(inputs, 1, 7), expected)
