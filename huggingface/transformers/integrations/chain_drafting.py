"""Draft trees that are chains, :mod:`.tree_drafting` with a beam of one: the best token of each level after the one in front.

Nothing has to be ranked here. A launch scores one level after a single parent, and the programs agree on the best token by an
atomic maximum of keys that sort by score and then by lower token; whoever comes first, the maximum is the same. So a level costs
three round trips, for the parent, for its factors and for the maximum; a tree's also descends to the best tokens of its parents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .sortable_keys import key_score, key_token, sortable_key
from .tree_drafting_workspace import DraftWorkspace, next_power_of_two, padded_rank
from .triton_support import constant, jit, tl

if TYPE_CHECKING:
    from .tree_drafting import TreeTensors

SMALL_VOCABULARY, SMALL_BLOCK, LARGE_BLOCK = 16384, 64, 256
"""Tokens that one program scores, up to so many in all and beyond: programs enough for an H200's 132 multiprocessors."""
LEVEL_WARPS, SELECTION_WARPS = 8, 1
FEATURES = constant(64)
"""Features of the transition bias that a program holds at a time."""
LOWEST = constant(-(2**63))
"""Less than every key."""


def draft_chain(
    logits: torch.Tensor,
    root: torch.Tensor,
    parent_table: torch.Tensor | None,
    token_table: torch.Tensor | None,
    tree: TreeTensors,
    workspace: DraftWorkspace,
) -> None:
    """Fills `tree` with what :func:`.tree_drafting.draft_tree` draws with a beam of one; its arguments are explained there."""
    batch, streams, vocab = logits.shape
    nodes = tree.tokens.shape[1]
    rank = parent_table.shape[1] if parent_table is not None else 0
    block = SMALL_BLOCK if vocab <= SMALL_VOCABULARY else LARGE_BLOCK
    for level in range(min(streams, nodes - 1)):
        chain_level_kernel[(-(-vocab // block), batch)](
            logits, root, parent_table, token_table, workspace.best,
            logits.stride(0), logits.stride(1), vocab, rank, level,
            STREAMS=streams,
            RANK=padded_rank(rank),
            BLOCK=block,
            FIRST=level == 0,
            num_warps=LEVEL_WARPS,
        )  # fmt: skip
    chain_selection_kernel[(batch,)](
        root, workspace.best,
        tree.tokens, tree.parents, tree.depths, tree.ancestors, tree.origins,
        nodes,
        STREAMS=streams,
        NODES=next_power_of_two(nodes),
        num_warps=SELECTION_WARPS,
    )  # fmt: skip


@jit
def chain_level_kernel(
    logits,
    root,
    parent_table,
    token_table,
    best,
    logits_batch_stride,
    logits_stream_stride,
    vocab,
    rank,
    level,
    STREAMS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Raises the level's key to the best of a block's; grid (vocabulary blocks, batch). `RANK` is 0 for no bias."""
    row = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    AT_ONCE: tl.constexpr = min(RANK, FEATURES)
    if RANK > 0:
        table = _factors(token_table, token, inside, 0, rank, AT_ONCE)
    stream = logits + row * logits_batch_stride + level * logits_stream_stride
    scores = tl.load(stream + token, mask=inside, other=float("-inf")).to(tl.float32)
    if RANK > 0:
        before = best + row * STREAMS + level - 1
        above = tl.load(root + row) if FIRST else key_token(tl.load(before)).to(tl.int64)
        for start in tl.static_range(0, RANK, AT_ONCE):
            if start > 0:
                table = _factors(token_table, token, inside, start, rank, AT_ONCE)
            feature = start + tl.arange(0, AT_ONCE)
            vector = tl.load(parent_table + above * rank + feature, mask=feature < rank, other=0.0)
            scores += tl.sum(table * vector.to(tl.float32)[None, :], 1)
    # What is no number makes no token of the level possible, whatever its sign: above all else it ends the chain.
    scores = tl.where(scores == scores, scores, float("nan"))  # noqa: PLR0124
    key = tl.where(inside, sortable_key(scores, token), tl.full((BLOCK,), LOWEST, tl.int64))
    tl.atomic_max(best + row * STREAMS + level, tl.max(key, 0), sem="relaxed")


@jit
def _factors(factor, token, inside, start, rank, AT_ONCE: tl.constexpr):
    """Returns the features from `start` on of tokens: (tokens, AT_ONCE) float32."""
    feature = start + tl.arange(0, AT_ONCE)
    mask = inside[:, None] & (feature < rank)[None, :]
    return tl.load(factor + token[:, None] * rank + feature[None, :], mask=mask, other=0.0).to(tl.float32)


@jit
def chain_selection_kernel(
    root,
    best,
    tokens,
    parents,
    depths,
    ancestors,
    origins,
    nodes,
    STREAMS: tl.constexpr,
    NODES: tl.constexpr,
):
    """Writes the chains and makes the keys the lowest again; grid (batch,)."""
    row = tl.program_id(0)
    node = tl.arange(0, NODES)
    level = node - 1
    scored = (level >= 0) & (level < STREAMS)
    keys = best + row * STREAMS + level
    lowest = tl.full((NODES,), LOWEST, tl.int64)
    key = tl.load(keys, mask=scored, other=LOWEST)
    tl.store(keys, lowest, mask=scored)
    # A level that nobody scored has no number for a score, and that is not above -inf either; beside +inf nothing has a
    # probability.
    score = key_score(key)
    ended = (node > 0) & ~(scored & (score > float("-inf")) & (score < float("inf")))
    real = (node > 0) & (tl.cumsum(ended.to(tl.int32), 0) == 0)
    token = tl.where(real, key_token(key), 0).to(tl.int64)
    way = tl.full((NODES,), 2, tl.int64) << node.to(tl.int64)
    alone = tl.full((NODES,), 1, tl.int64) << node.to(tl.int64)
    at = row * nodes + node
    kept = node < nodes
    tl.store(tokens + at, tl.where(node == 0, tl.load(root + row), token), mask=kept)
    tl.store(parents + at, tl.where(real, level, 0), mask=kept)
    tl.store(depths + at, tl.where(real, node, (node > 0).to(tl.int32)), mask=kept)
    tl.store(ancestors + at, tl.where(real | (node == 0), way - 1, alone | 1), mask=kept)
    tl.store(origins + at, real.to(tl.int32), mask=kept)
