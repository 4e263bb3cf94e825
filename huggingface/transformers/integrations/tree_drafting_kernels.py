"""Triton kernels of :mod:`.tree_drafting`: a launch scores one level of the draft tree, a last one selects the tree.

The programs of a launch cannot wait for each other, so what they find, the best few keys of every block of the vocabulary, is
merged by the next launch, and there by every program for itself: the beam of a level is needed by all of them, and to merge a few
lists costs less than to hand the result around once more. What is merged is ranked, best first, so that the beam is simply the
first `beam` candidates; the first program keeps them in the level's row of the pool::

    pool    level 1   .81 .10 .02 ...  | empty       sums of log-probabilities, shown as probabilities
            level 2   .70 .06 .05 ...  | empty       a tree of n nodes never needs more than n - 1 candidates of one level

Lists of keys are (2, batch, PARENTS, WIDTH, blocks): of two levels, one is read while the other is written. The sizes are powers
of two; where a name begins with `LOG_` it is the binary logarithm.
"""

from __future__ import annotations

from .sortable_keys import (
    count_larger,
    join_lists,
    key_score,
    key_token,
    merge_lists,
    sort_lists,
    sortable_key,
)
from .tree_selection_kernels import select_tree
from .triton_support import jit, release_dependents, tl, wait_for_inputs


@jit
def draft_level_kernel(
    logits,
    root,
    parent_table,
    token_table,
    keys,
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
    LOG_BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
    RANK: tl.constexpr,
    BEAM: tl.constexpr,
    KEEP: tl.constexpr,
    SLOTS: tl.constexpr,
    PARENTS: tl.constexpr,
    LOG_WIDTH: tl.constexpr,
    LOG_BLOCKS: tl.constexpr,
    LOG_MERGED: tl.constexpr,
    FIRST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Ranks the level in front and scores its children; grid (vocabulary blocks, batch). `RANK` is 0 for no bias."""
    release_dependents(PDL)
    BLOCK: tl.constexpr = 1 << LOG_BLOCK
    block = tl.program_id(0)
    row = tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    # Without tensor cores (float32) a product needs its operands in registers, too many to fetch them all beforehand.
    AT_ONCE: tl.constexpr = 16 if RANK > 0 and token_table.dtype.element_ty == tl.float32 else RANK
    if RANK > 0:
        table = _load_factor(token_table, token, inside, 0, rank, AT_ONCE)
    wait_for_inputs(PDL)
    stream = logits + row * logits_batch_stride + level * logits_stream_stride
    scores = tl.load(stream + token, mask=inside, other=float("-inf")).to(tl.float32)[:, None]
    parent = tl.arange(0, PARENTS)
    if FIRST:
        above = tl.load(root + row + parent * 0).to(tl.int32)
    else:
        above = rank_level(
            keys, parts, pool_sums, pool_tokens, pool_parents, prior, trust, row, tl.num_programs(1),
            level - 1, block == 0,
            STREAMS, BEAM, KEEP, SLOTS, PARENTS, LOG_WIDTH, LOG_BLOCKS, LOG_MERGED,
        )  # fmt: skip
    scores = tl.broadcast_to(scores, (BLOCK, PARENTS))
    if RANK > 0:
        vectors = _load_factor(parent_table, above, parent >= 0, 0, rank, AT_ONCE)
        scores += tl.dot(table, tl.trans(vectors), input_precision="ieee")
        for start in range(AT_ONCE, RANK, AT_ONCE):
            table = _load_factor(token_table, token, inside, start, rank, AT_ONCE)
            vectors = _load_factor(parent_table, above, parent >= 0, start, rank, AT_ONCE)
            scores += tl.dot(table, tl.trans(vectors), input_precision="ieee")
    _reduce_block(
        scores, token, inside, keys, parts, row, level, block,
        LOG_BLOCK, WARPS, PARENTS, LOG_WIDTH, LOG_BLOCKS, LOG_MERGED,
    )  # fmt: skip


@jit
def _load_factor(factor, token, real, start, rank, FEATURES: tl.constexpr):
    """Returns the features from `start` on of tokens: (tokens, FEATURES)."""
    feature = start + tl.arange(0, FEATURES)
    mask = real[:, None] & (feature < rank)[None, :]
    return tl.load(factor + token[:, None] * rank + feature[None, :], mask=mask, other=0.0)


@jit
def draft_selection_kernel(
    root,
    keys,
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
    LOG_WIDTH: tl.constexpr,
    LOG_BLOCKS: tl.constexpr,
    LOG_MERGED: tl.constexpr,
    ENTRIES: tl.constexpr,
    NODES: tl.constexpr,
    CHAIN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Ranks the last level and writes the trees; grid (batch,). `CHAIN` is 0 for none."""
    release_dependents(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0)
    rank_level(
        keys, parts, pool_sums, pool_tokens, pool_parents, prior, trust, row, tl.num_programs(0),
        STREAMS - 1, row >= 0,
        STREAMS, BEAM, KEEP, SLOTS, PARENTS, LOG_WIDTH, LOG_BLOCKS, LOG_MERGED,
    )  # fmt: skip
    tl.debug_barrier()
    select_tree(
        root, pool_sums, pool_tokens, pool_parents, tokens, parents, depths, ancestors, origins,
        continuation, chain_step, row, nodes, chain_length, STREAMS, SLOTS, ENTRIES, NODES, CHAIN,
    )  # fmt: skip


@jit
def _reduce_block(
    scores,
    token,
    inside,
    keys,
    parts,
    row,
    level,
    block,
    LOG_BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
    PARENTS: tl.constexpr,
    LOG_WIDTH: tl.constexpr,
    LOG_BLOCKS: tl.constexpr,
    LOG_MERGED: tl.constexpr,
):
    """Stores what one block has for each parent: its best keys, sorted, and its log-sum-exp. `scores` is (BLOCK, PARENTS)."""
    worst: tl.constexpr = -0x7FFFFFFFFFFFFFFF
    WIDTH: tl.constexpr = 1 << LOG_WIDTH
    at = (level % 2) * tl.num_programs(1) + row
    parent = tl.arange(0, PARENTS)
    maximum = tl.max(scores, axis=0)
    finite = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(tl.exp(scores - finite[None, :]), axis=0)
    tl.store(parts + ((at * PARENTS + parent) << LOG_BLOCKS) + block, finite + tl.log(total))

    key = tl.where(inside[:, None], sortable_key(scores, token[:, None]), worst)
    # The product leaves each thread every eighth token of its warp's 16 (PTX, fragments of mma). The order of tokens is free:
    # first what one thread holds is sorted, then merged between the threads of a warp, and last between warps.
    BLOCK: tl.constexpr = 1 << LOG_BLOCK
    OWN: tl.constexpr = BLOCK // (8 * WARPS)
    SORTED: tl.constexpr = OWN if OWN < WIDTH else WIDTH
    SHARED: tl.constexpr = WIDTH // SORTED
    LISTS: tl.constexpr = BLOCK // WIDTH
    key = tl.permute(tl.reshape(key, (OWN // 2, WARPS, 2, 8, PARENTS)), (0, 2, 4, 1, 3))
    key = tl.reshape(key, (SORTED, OWN // SORTED, PARENTS, WARPS, SHARED, 8 // SHARED))
    key = tl.reshape(tl.permute(key, (0, 4, 2, 3, 5, 1)), (WIDTH, PARENTS * LISTS))
    key = sort_lists(key, LISTS, LOG_WIDTH, PARENTS * LISTS)
    best = merge_lists(key, LOG_BLOCK - LOG_WIDTH, LOG_WIDTH, PARENTS)
    rises = ((block & 1) != (block >> LOG_MERGED != 0).to(tl.int32)) & (LOG_BLOCKS > 0)
    place = tl.arange(0, WIDTH)
    place = tl.where(rises, WIDTH - 1 - place, place)
    list_at = ((at * PARENTS + parent[None, :]) * WIDTH + place[:, None]) << LOG_BLOCKS
    tl.store(keys + list_at + block, best)


@jit
def rank_level(
    keys,
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
    LOG_WIDTH: tl.constexpr,
    LOG_BLOCKS: tl.constexpr,
    LOG_MERGED: tl.constexpr,
):
    """Returns the tokens of the level's beam (PARENTS,), best first, 0 for none; ties in the order of their parents.

    The program that `keeps` writes the best `KEEP` candidates to the pool.
    """
    WIDTH: tl.constexpr = 1 << LOG_WIDTH
    lost = float("-inf")
    parent = tl.arange(0, PARENTS)
    place = tl.arange(0, WIDTH)
    before = (row * STREAMS + level - 1) * SLOTS
    above = tl.load(
        pool_sums + before + parent, mask=(parent < BEAM) & (level > 0), other=lost, cache_modifier=".cg"
    )
    above = tl.where((parent == 0) & (level == 0), 0.0, above)
    at = (level % 2) * rows + row
    best = _merge_blocks(keys, at, PARENTS, LOG_WIDTH, LOG_BLOCKS, LOG_MERGED)
    normaliser = _merge_parts(parts, at, PARENTS, LOG_BLOCKS)

    score = key_score(best)
    # An approximate logarithm may rise above zero; what has no probability is left out below and must not make a NaN here.
    gain = tl.where(score > lost, tl.minimum(score - normaliser[None, :], 0.0), 0.0)
    if prior is not None:
        expected = tl.load(prior + level * BEAM + place, mask=place < BEAM, other=0.0)
        gain = tl.minimum(trust * gain + (1.0 - trust) * expected[:, None], 0.0)
    legal = (score > lost) & (above > lost)[None, :] & (place < BEAM)[:, None]
    sums = tl.where(legal, above[None, :] + gain, lost)
    number = parent[None, :] * WIDTH + place[:, None]
    COUNT: tl.constexpr = WIDTH * PARENTS
    key = tl.reshape(sortable_key(sums, number), (COUNT,))
    token = tl.reshape(tl.where(legal, key_token(best), 0), (COUNT,))
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
def _merge_blocks(
    keys,
    at,
    PARENTS: tl.constexpr,
    LOG_WIDTH: tl.constexpr,
    LOG_BLOCKS: tl.constexpr,
    LOG_MERGED: tl.constexpr,
):
    """Returns the best keys of each parent (WIDTH, PARENTS), falling, `1 << LOG_MERGED` blocks at a time."""
    WIDTH: tl.constexpr = 1 << LOG_WIDTH
    MERGED: tl.constexpr = 1 << LOG_MERGED
    COLUMNS: tl.constexpr = PARENTS * MERGED
    BLOCKS: tl.constexpr = 1 << LOG_BLOCKS
    lists = keys + ((at * PARENTS * WIDTH) << LOG_BLOCKS)
    best = _load_lists(lists, 0, PARENTS, WIDTH, MERGED, BLOCKS)
    if BLOCKS > MERGED:
        following = _load_lists(lists, MERGED, PARENTS, WIDTH, MERGED, BLOCKS)
        for start in range(2 * MERGED, BLOCKS + MERGED, MERGED):
            others = following
            following = _load_lists(lists, start, PARENTS, WIDTH, MERGED, BLOCKS)
            best = join_lists(best, others, MERGED, LOG_WIDTH, COLUMNS)
    return merge_lists(best, LOG_MERGED, LOG_WIDTH, PARENTS)


@jit
def _load_lists(
    lists, start, PARENTS: tl.constexpr, WIDTH: tl.constexpr, MERGED: tl.constexpr, BLOCKS: tl.constexpr
):
    """Returns the lists of each parent and of the blocks from `start` on: (WIDTH, PARENTS * MERGED).

    The compiler deals out threads along the first of equal dimensions, and loads wider than a key, which the hint forbids, would
    change that. Short lists shall each be held by one thread, and those of one parent by one warp; long ones are spread over
    threads.
    """
    SHORT: tl.constexpr = WIDTH <= 8
    block = start + tl.max_contiguous(tl.arange(0, MERGED), 1)
    parent = tl.arange(0, PARENTS)[None, :, None]
    place = tl.arange(0, WIDTH)
    block = block[:, None, None] if SHORT else block[None, None, :]
    place = place[None, None, :] if SHORT else place[:, None, None]
    at = (parent * WIDTH + place) * BLOCKS + block
    table = tl.load(lists + at, mask=block < BLOCKS, other=0, cache_modifier=".cg")
    if SHORT:
        table = tl.permute(table, (2, 1, 0))
    return tl.reshape(table, (WIDTH, PARENTS * MERGED))


@jit
def _merge_parts(parts, at, PARENTS: tl.constexpr, LOG_BLOCKS: tl.constexpr):
    """Returns the log-sum-exp of each parent (PARENTS,) from those of the blocks."""
    parent = tl.arange(0, PARENTS)[:, None]
    block = tl.arange(0, 1 << LOG_BLOCKS)[None, :]
    part = tl.load(parts + ((at * PARENTS + parent) << LOG_BLOCKS) + block, cache_modifier=".cg")
    maximum = tl.max(part, axis=1)
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(tl.exp(part - maximum[:, None]), axis=1)
    return maximum + tl.log(tl.maximum(total, 1.0))  # the sum holds exp(0), unless no token is possible
