"""Triton kernels of :mod:`.tree_drafting`: one launch scores a level of the draft tree, the last one also selects the tree.

Every program keeps the best few keys (:mod:`.sortable_keys`) of its block of the vocabulary for each parent. The program that
arrives last merges these sorted lists by taking the largest head `beam` times. What it leaves is ranked, best first, so that the
beam of the next level is simply the first `beam` places of the level's row in the pool::

    pool    level 1   .81 .10 .02 ...  | empty       sums of log-probabilities, shown as probabilities
            level 2   .70 .06 .05 ...  | empty       a tree of n nodes never needs more than n - 1 candidates of one level
"""

from __future__ import annotations

from .sortable_keys import key_score, key_token, sortable_key
from .tree_selection_kernels import select_tree
from .triton_support import jit, release_dependents, tl, wait_for_inputs

PARENT_ROWS = 16
"""Rows of the product of parents and tokens: the least `tl.dot` takes, hence the largest beam."""


@jit
def draft_level_kernel(
    logits,
    root,
    parent_table,
    token_table,
    keys,
    maxima,
    totals,
    arrivals,
    candidates,
    pool_sums,
    pool_tokens,
    pool_parents,
    pool_nodes,
    tokens,
    parents,
    depths,
    ancestors,
    origins,
    continuation,
    chain_step,
    logits_batch_stride,
    logits_stream_stride,
    vocab,
    rank,
    level,
    nodes,
    chain_length,
    STREAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    RANK: tl.constexpr,
    BEAM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEEP: tl.constexpr,
    SLOTS: tl.constexpr,
    ENTRIES: tl.constexpr,
    NODES: tl.constexpr,
    CHAIN: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Expands the beam of one level; grid (vocabulary blocks, batch). `RANK` and `CHAIN` are 0 for none."""
    release_dependents(PDL)
    block = tl.program_id(0)
    row = tl.program_id(1)
    blocks = tl.num_programs(0)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    if RANK > 0:
        feature = tl.arange(0, RANK)
        table = tl.load(
            token_table + token[None, :] * rank + feature[:, None],
            mask=inside[None, :] & (feature < rank)[:, None],
            other=0.0,
        )
    wait_for_inputs(PDL)
    parent = tl.arange(0, 16)
    before = (row * STREAMS + level - 1) * SLOTS
    stream = logits + row * logits_batch_stride + level * logits_stream_stride
    scores = tl.load(stream + token, mask=inside, other=float("-inf")).to(tl.float32)[None, :]
    if RANK > 0:
        if FIRST:
            above = tl.load(root + row + parent * 0).to(tl.int32)
        else:
            above = tl.load(pool_tokens + before + parent, mask=parent < BEAM, other=0)
        vectors = tl.load(
            parent_table + above[:, None] * rank + feature[None, :],
            mask=(feature < rank)[None, :],
            other=0.0,
        )
        scores += tl.dot(vectors, table, input_precision="ieee")
    else:
        scores = tl.broadcast_to(scores, (16, BLOCK))

    _reduce_block(scores, token, inside, keys, maxima, totals, row, block, blocks, BEAM, WIDTH)
    tl.debug_barrier()
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == blocks - 1:
        merged, normaliser = _merge_blocks(keys, maxima, totals, row, blocks, BLOCKS, BEAM, WIDTH)
        _rank_level(
            merged, normaliser, candidates, pool_sums, pool_tokens, pool_parents,
            row, level, STREAMS, BEAM, WIDTH, KEEP, SLOTS, FIRST,
        )  # fmt: skip
        if LAST:
            tl.debug_barrier()
            select_tree(
                root, pool_sums, pool_tokens, pool_parents, pool_nodes,
                tokens, parents, depths, ancestors, origins, continuation, chain_step,
                row, nodes, chain_length, STREAMS, SLOTS, ENTRIES, NODES, CHAIN,
            )  # fmt: skip
        tl.store(arrivals + row, 0)


@jit
def _reduce_block(
    scores,
    token,
    inside,
    keys,
    maxima,
    totals,
    row,
    block,
    blocks,
    BEAM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Stores what one block has for each parent: its best keys, best first, its maximum and its sum of exponentials."""
    maximum = tl.max(scores, axis=1)
    finite = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(tl.exp(scores - finite[:, None]), axis=1)
    parent = tl.arange(0, 16)
    place = tl.arange(0, WIDTH)
    worst: tl.constexpr = -0x7FFFFFFFFFFFFFFF
    remaining = tl.where(inside[None, :], sortable_key(scores, token[None, :]), worst)
    best = tl.full((16, WIDTH), worst, tl.int64)
    for i in range(BEAM):
        top = tl.max(remaining, axis=1)
        best = tl.where((place == i)[None, :], top[:, None], best)
        remaining = tl.where(remaining == top[:, None], worst, remaining)
    list_at = ((row * WIDTH + parent[:, None]) * WIDTH + place[None, :]) * blocks + block
    tl.store(keys + list_at, best, mask=(parent < WIDTH)[:, None])
    tl.store(maxima + (row * WIDTH + parent) * blocks + block, maximum, mask=parent < WIDTH)
    tl.store(totals + (row * WIDTH + parent) * blocks + block, total, mask=parent < WIDTH)


@jit
def _merge_blocks(
    keys,
    maxima,
    totals,
    row,
    blocks,
    BLOCKS: tl.constexpr,
    BEAM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Returns the best keys of each parent (WIDTH, WIDTH), best first, and the log of its sum of exponentials (WIDTH,)."""
    worst: tl.constexpr = -0x7FFFFFFFFFFFFFFF
    parent = tl.arange(0, WIDTH)
    place = tl.arange(0, WIDTH)
    block = tl.arange(0, BLOCKS)
    present = (block < blocks)[None, :] & (parent < BEAM)[:, None]
    first = (row * WIDTH + parent[:, None]) * WIDTH * blocks
    end = first + WIDTH * blocks
    at = first + block[None, :]
    # The next entry of every list is fetched one round ahead, so that no round waits for memory.
    heads = tl.load(keys + at, mask=present, other=worst, cache_modifier=".cg")
    at += blocks
    following = tl.load(keys + at, mask=present, other=worst, cache_modifier=".cg")
    part_at = (row * WIDTH + parent[:, None]) * blocks + block[None, :]
    part_maxima = tl.load(maxima + part_at, mask=present, other=float("-inf"), cache_modifier=".cg")
    part_totals = tl.load(totals + part_at, mask=present, other=0.0, cache_modifier=".cg")
    maximum = tl.max(part_maxima, axis=1)
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(part_totals * tl.exp(part_maxima - maximum[:, None]), axis=1)
    normaliser = maximum + tl.log(tl.maximum(total, 1.0))  # the sum holds exp(0), but for rows of padding

    best = tl.full((WIDTH, WIDTH), worst, tl.int64)
    for i in range(BEAM):
        top = tl.max(heads, axis=1)
        best = tl.where((place == i)[None, :], top[:, None], best)
        won = present & (heads == top[:, None])
        heads = tl.where(won, following, heads)
        at += tl.where(won, blocks, 0)
        following = tl.load(keys + at, mask=won & (at < end), other=following, cache_modifier=".cg")
    return best, normaliser


@jit
def _rank_level(
    best,
    normaliser,
    candidates,
    pool_sums,
    pool_tokens,
    pool_parents,
    row,
    level,
    STREAMS: tl.constexpr,
    BEAM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEEP: tl.constexpr,
    SLOTS: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Writes the best `KEEP` candidates of a level to the pool, best first; ties in the order of their parents."""
    lost = float("-inf")
    parent = tl.arange(0, WIDTH)
    place = tl.arange(0, WIDTH)
    before = (row * STREAMS + level - 1) * SLOTS
    above = tl.where(parent == 0, 0.0, lost)
    if not FIRST:
        above = tl.load(pool_sums + before + parent, mask=parent < BEAM, other=lost)
    score = key_score(best)
    gain = tl.minimum(score - normaliser[:, None], 0.0)  # an approximate logarithm may fall below zero
    legal = (score > lost) & (above > lost)[:, None] & (place < BEAM)[None, :]
    sums = tl.where(legal, above[:, None] + gain, lost)
    number = parent[:, None] * WIDTH + place[None, :]
    key = sortable_key(sums, number)
    scratch = candidates + row * WIDTH * WIDTH
    tl.store(scratch + number, key)
    tl.debug_barrier()
    ahead = tl.zeros((WIDTH, WIDTH, WIDTH), tl.int32)
    for start in range(0, WIDTH * WIDTH, WIDTH):
        rivals = tl.load(scratch + start + place)
        ahead += (rivals[None, None, :] > key[:, :, None]).to(tl.int32)
    order = tl.sum(ahead, axis=2)
    if FIRST:
        source = tl.full((WIDTH, WIDTH), -1, tl.int32)
    else:
        source = tl.broadcast_to((level - 1) * SLOTS + parent[:, None], (WIDTH, WIDTH))
    at = (row * STREAMS + level) * SLOTS + order
    kept = order < KEEP
    tl.store(pool_sums + at, sums, mask=kept)
    tl.store(pool_tokens + at, tl.where(legal, key_token(best), 0), mask=kept)
    tl.store(pool_parents + at, source, mask=kept)
