"""Triton kernels of :mod:`.tree_drafting`: a launch scores one level of the draft tree, a last one selects the tree.

The programs of a launch cannot wait for each other, so what a level's beam is, is found out by the next launch, and there by
every program for itself: all of them need it, and to descend to the best tokens (:mod:`.top_tokens`) costs less than to hand the
result around once more. What is found is ranked, best first, so that the beam is simply the first `beam` candidates; the first
program keeps them in the level's row of the pool::

    pool    level 1   .81 .10 .02 ...  | empty       sums of log-probabilities, shown as probabilities
            level 2   .70 .06 .05 ...  | empty       a tree of n nodes never needs more than n - 1 candidates of one level

The kernels start when the one in front has finished: started early (see :mod:`.triton_support`), four levels over 8,192 tokens
took 45 us on an H200, not 32. Scores are (2, batch, floats): of two levels, one is read while the other is written.
"""

from __future__ import annotations

from .sortable_keys import count_larger, key_score, key_token, sortable_key
from .top_tokens import store_scores, top_tokens
from .tree_selection_kernels import select_tree
from .triton_support import jit, tl


@jit
def draft_level_kernel(
    logits,
    root,
    parent_table,
    token_table,
    scored,
    parts,
    pool_sums,
    pool_tokens,
    pool_parents,
    prior,
    trust,
    logits_batch_stride,
    logits_stream_stride,
    vocab,
    rank,
    level,
    STREAMS: tl.constexpr,
    RANK: tl.constexpr,
    BEAM: tl.constexpr,
    KEEP: tl.constexpr,
    SLOTS: tl.constexpr,
    PARENTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    FLOATS: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Ranks the level in front and scores its children; grid (vocabulary blocks, batch). `RANK` is 0 for no bias."""
    block = tl.program_id(0)
    row = tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    # Without tensor cores (float32) a product needs its operands in registers, too many to fetch them all beforehand.
    FEATURES: tl.constexpr = 16 if RANK > 0 and token_table.dtype.element_ty == tl.float32 else 64
    AT_ONCE: tl.constexpr = min(RANK, FEATURES)
    if RANK > 0:
        table = _load_factor(token_table, token, inside, 0, rank, AT_ONCE)
    stream = logits + row * logits_batch_stride + level * logits_stream_stride
    scores = tl.load(stream + token, mask=inside, other=float("-inf")).to(tl.float32)[:, None]
    parent = tl.arange(0, PARENTS)
    if FIRST:
        above = tl.load(root + row + parent * 0).to(tl.int32)
    else:
        above = rank_level(
            scored, parts, pool_sums, pool_tokens, pool_parents, prior, trust, row, tl.num_programs(1),
            level - 1, block == 0,
            STREAMS, BEAM, KEEP, SLOTS, PARENTS, WIDTH, BLOCK, GROUP, BLOCKS, PADDED, FLOATS,
        )  # fmt: skip
    scores = tl.broadcast_to(scores, (BLOCK, PARENTS))
    if RANK > 0:
        vectors = _load_factor(parent_table, above, parent >= 0, 0, rank, AT_ONCE)
        scores += tl.dot(table, tl.trans(vectors), input_precision="ieee")
        for start in range(AT_ONCE, RANK, AT_ONCE):
            table = _load_factor(token_table, token, inside, start, rank, AT_ONCE)
            vectors = _load_factor(parent_table, above, parent >= 0, start, rank, AT_ONCE)
            scores += tl.dot(table, tl.trans(vectors), input_precision="ieee")
    scores = tl.where(inside[:, None], scores, float("-inf"))
    at = ((level % 2) * tl.num_programs(1) + row) * PARENTS
    maximum = store_scores(scores, scored + at.to(tl.int64) * FLOATS, block, BLOCK, GROUP, BLOCKS, PARENTS)
    finite = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(tl.exp(scores - finite[None, :]), axis=0)
    tl.store(parts + (at + parent) * BLOCKS + block, finite + tl.log(total))


@jit
def _load_factor(factor, token, real, start, rank, FEATURES: tl.constexpr):
    """Returns the features from `start` on of tokens: (tokens, FEATURES)."""
    feature = start + tl.arange(0, FEATURES)
    mask = real[:, None] & (feature < rank)[None, :]
    return tl.load(factor + token[:, None] * rank + feature[None, :], mask=mask, other=0.0)


@jit
def draft_selection_kernel(
    root,
    scored,
    parts,
    pool_sums,
    pool_tokens,
    pool_parents,
    prior,
    trust,
    tokens,
    parents,
    depths,
    ancestors,
    origins,
    continuation,
    chain_step,
    nodes,
    chain_length,
    STREAMS: tl.constexpr,
    BEAM: tl.constexpr,
    KEEP: tl.constexpr,
    SLOTS: tl.constexpr,
    PARENTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    FLOATS: tl.constexpr,
    ENTRIES: tl.constexpr,
    NODES: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """Ranks the last level and writes the trees; grid (batch,). `CHAIN` is 0 for none."""
    row = tl.program_id(0)
    rank_level(
        scored, parts, pool_sums, pool_tokens, pool_parents, prior, trust, row, tl.num_programs(0),
        STREAMS - 1, row >= 0,
        STREAMS, BEAM, KEEP, SLOTS, PARENTS, WIDTH, BLOCK, GROUP, BLOCKS, PADDED, FLOATS,
    )  # fmt: skip
    tl.debug_barrier()
    select_tree(
        root, pool_sums, pool_tokens, pool_parents, tokens, parents, depths, ancestors, origins,
        continuation, chain_step, row, nodes, chain_length, STREAMS, SLOTS, ENTRIES, NODES, CHAIN,
    )  # fmt: skip


@jit
def rank_level(
    scored,
    parts,
    pool_sums,
    pool_tokens,
    pool_parents,
    prior,
    trust,
    row,
    rows,
    level,
    keeps,
    STREAMS: tl.constexpr,
    BEAM: tl.constexpr,
    KEEP: tl.constexpr,
    SLOTS: tl.constexpr,
    PARENTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    FLOATS: tl.constexpr,
):
    """Returns the tokens of the level's beam (PARENTS,), best first, 0 for none; ties in the order of their parents.

    The program that `keeps` writes the best `KEEP` candidates to the pool.
    """
    lost = float("-inf")
    parent = tl.arange(0, PARENTS)
    place = tl.arange(0, WIDTH)
    before = (row * STREAMS + level - 1) * SLOTS
    above = tl.load(
        pool_sums + before + parent, mask=(parent < BEAM) & (level > 0), other=lost, cache_modifier=".cg"
    )
    above = tl.where((parent == 0) & (level == 0), 0.0, above)
    at = ((level % 2) * rows + row) * PARENTS
    normaliser = _merge_parts(parts + at * BLOCKS, PARENTS, BLOCKS, PADDED)
    score, child = top_tokens(scored + at.to(tl.int64) * FLOATS, BLOCK, GROUP, BLOCKS, PADDED, PARENTS, WIDTH)

    # An approximate logarithm may rise above zero; what has no probability is left out below and must not make a NaN here.
    gain = tl.where(score > lost, tl.minimum(score - normaliser[:, None], 0.0), 0.0)
    if prior is not None:
        expected = tl.load(prior + level * BEAM + place, mask=place < BEAM, other=0.0)
        gain = tl.minimum(trust * gain + (1.0 - trust) * expected[None, :], 0.0)
    legal = (score > lost) & (above > lost)[:, None] & (place < BEAM)[None, :]
    sums = tl.where(legal, above[:, None] + gain, lost)
    number = parent[:, None] * WIDTH + place[None, :]
    COUNT: tl.constexpr = WIDTH * PARENTS
    key = tl.reshape(sortable_key(sums, number), (COUNT,))
    token = tl.reshape(tl.where(legal, child, 0), (COUNT,))
    order = count_larger(key, COUNT, 4096 // COUNT)

    to = (row * STREAMS + level) * SLOTS + order
    kept = (order < KEEP) & keeps
    source = tl.where(level > 0, (level - 1) * SLOTS + key_token(key) // WIDTH, -1)
    tl.store(pool_sums + to, key_score(key), mask=kept)
    tl.store(pool_tokens + to, token, mask=kept)
    tl.store(pool_parents + to, source, mask=kept)
    wanted = (order[:, None] == parent[None, :]) & (parent < BEAM)[None, :]
    return tl.sum(tl.where(wanted, token[:, None], 0), axis=0)


@jit
def _merge_parts(parts, PARENTS: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr):
    """Returns the log-sum-exp of each parent (PARENTS,) from those of the blocks."""
    parent = tl.arange(0, PARENTS)[:, None]
    block = tl.arange(0, PADDED)[None, :]
    part = tl.load(
        parts + parent * BLOCKS + block, mask=block < BLOCKS, other=float("-inf"), cache_modifier=".cg"
    )
    maximum = tl.max(part, axis=1)
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(tl.exp(part - maximum[:, None]), axis=1)
    return maximum + tl.log(tl.maximum(total, 1.0))  # the sum holds exp(0), unless no token is possible
