"""The last part of :mod:`.tree_drafting_kernels`: from the ranked candidates of all levels to a tree.

A candidate is chosen if fewer than `nodes - 1` others beat it, and its node is one more than the chosen ones in front of it; so
nothing is sorted, only counted. Ties of sums go to the candidate in front. The row of a level in the pool ends with an empty
place: there, in the order of ties, stands the token that a chain copied from the context proposes at that depth.
"""

from __future__ import annotations

from .sortable_keys import sortable_key
from .triton_support import jit, tl


@jit
def select_tree(
    root,
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
    row,
    nodes,
    chain_length,
    STREAMS: tl.constexpr,
    SLOTS: tl.constexpr,
    ENTRIES: tl.constexpr,
    NODES: tl.constexpr,
    CHAIN: tl.constexpr,
):
    """Writes one row's tree: the root and the best `nodes - 1` entries of its pool and of the context's chain."""
    lost = float("-inf")
    entry = tl.arange(0, ENTRIES)
    pool = row * STREAMS * SLOTS
    within = entry < STREAMS * SLOTS
    level = entry // SLOTS
    sums = tl.load(pool_sums + pool + entry, mask=within, other=lost, cache_modifier=".cg")
    token = tl.load(pool_tokens + pool + entry, mask=within, other=0, cache_modifier=".cg")
    source = tl.load(pool_parents + pool + entry, mask=within, other=-1, cache_modifier=".cg")
    if CHAIN > 0:
        link = tl.arange(0, CHAIN)
        chain = continuation + row * chain_length
        chain_token = tl.load(chain + link, mask=link < chain_length, other=-1).to(tl.int32)
        reach = tl.min(tl.where(chain_token < 0, link, CHAIN), axis=0)
        offered = tl.load(chain + level, mask=within & (level < chain_length), other=-1).to(tl.int32)
        sums, merged, leaf = _merge_chain(
            sums, token, source, offered, level < reach, entry, level, chain_step, STREAMS
        )  # fmt: skip
        tl.store(pool_sums + pool + entry, sums, mask=within)
        tl.debug_barrier()
        chain_sums = tl.where((link >= merged) & (link < reach), (link + 1) * chain_step, lost)
        chain_order = link * SLOTS + SLOTS - 1
        chain_key = sortable_key(chain_sums, chain_order)

    key = sortable_key(sums, entry)
    # Few columns at a time: the whole table of comparisons does not fit into registers.
    COLUMNS: tl.constexpr = SLOTS if SLOTS * ENTRIES <= 4096 else 4096 // ENTRIES
    ahead = tl.zeros((ENTRIES, COLUMNS), tl.int32)
    for start in range(0, STREAMS * SLOTS, COLUMNS):
        rival = start + tl.arange(0, COLUMNS)
        rivals = sortable_key(tl.load(pool_sums + pool + rival), rival)
        ahead += (rivals[None, :] > key[:, None]).to(tl.int32)
    beaten = tl.sum(ahead, axis=1)
    if CHAIN > 0:
        beaten += tl.sum((chain_key[None, :] > key[:, None]).to(tl.int32), axis=1)
    chosen = (sums > lost) & (beaten < nodes - 1)
    node = tl.cumsum(chosen.to(tl.int32), 0)
    count = tl.sum(chosen.to(tl.int32), axis=0)
    if CHAIN > 0:
        # Sums fall along the chain and never rise above a parent's, so earlier links come first.
        chain_beaten = tl.sum((key[:, None] > chain_key[None, :]).to(tl.int32), axis=0)
        chain_chosen = (chain_sums > lost) & (chain_beaten + link - merged < nodes - 1)
        in_front = chosen[:, None] & (entry[:, None] < chain_order[None, :])
        chain_node = tl.sum(in_front.to(tl.int32), axis=0) + tl.cumsum(chain_chosen.to(tl.int32), 0)
        in_front = chain_chosen[None, :] & (chain_order[None, :] < entry[:, None])
        node += tl.sum(in_front.to(tl.int32), axis=1)
        count += tl.sum(chain_chosen.to(tl.int32), axis=0)

    tl.store(pool_nodes + pool + entry, node, mask=within & chosen)
    tl.debug_barrier()
    below = tl.load(pool_nodes + pool + source, mask=chosen & (source >= 0), other=0, cache_modifier=".cg")
    tree = row * nodes
    tl.store(tokens + tree + node, token.to(tl.int64), mask=chosen)
    tl.store(parents + tree + node, below, mask=chosen)
    tl.store(depths + tree + node, level + 1, mask=chosen)
    tl.store(origins + tree + node, 1, mask=chosen)
    if CHAIN > 0:
        branch = tl.load(pool_nodes + pool + leaf, mask=leaf >= 0, other=0, cache_modifier=".cg")
        chain_below = tl.gather(chain_node, tl.maximum(link - 1, 0), 0)
        chain_below = tl.where(link == merged, branch, chain_below)
        tl.store(tokens + tree + chain_node, chain_token.to(tl.int64), mask=chain_chosen)
        tl.store(parents + tree + chain_node, chain_below, mask=chain_chosen)
        tl.store(depths + tree + chain_node, link + 1, mask=chain_chosen)
        tl.store(origins + tree + chain_node, 2, mask=chain_chosen)
    _finish_tree(root, tokens, parents, depths, ancestors, origins, row, nodes, count, NODES)


@jit
def _finish_tree(
    root,
    tokens,
    parents,
    depths,
    ancestors,
    origins,
    row,
    nodes,
    count,
    NODES: tl.constexpr,
):
    """Writes the root, the padding behind the `count` nodes below it, and every node's ancestors."""
    tree = row * nodes
    number = tl.arange(0, NODES)
    padding = (number > count) & (number < nodes)
    tl.store(tokens + tree + number, 0, mask=padding)
    tl.store(parents + tree + number, 0, mask=padding | (number == 0))
    tl.store(depths + tree + number, 1, mask=padding)
    tl.store(origins + tree + number, 0, mask=padding | (number == 0))
    tl.store(tokens + tree, tl.load(root + row))
    tl.store(depths + tree, 0)

    tl.debug_barrier()
    up = tl.load(parents + tree + number, mask=number < nodes, other=0, cache_modifier=".cg")
    bits = tl.full((NODES,), 1, tl.int64)
    at = number
    while tl.max(at, axis=0) > 0:
        bits |= tl.full((NODES,), 1, tl.int64) << at.to(tl.int64)
        # Parents come first, so the minimum changes nothing; it keeps a fault elsewhere from becoming an endless loop.
        at = tl.minimum(tl.gather(up, at, 0), tl.maximum(at - 1, 0))
    tl.store(ancestors + tree + number, bits, mask=number < nodes)


@jit
def _merge_chain(sums, token, source, offered, reached, entry, level, chain_step, STREAMS: tl.constexpr):
    """Raises the pool entries that the context's chain repeats.

    Returns:
        The sums, the number of repeated entries and the last of them, -1 for the root.
    """
    same = (token == offered) & reached & (sums > float("-inf"))
    merged = tl.max(entry, axis=0) * 0
    leaf = merged - 1
    for depth in range(STREAMS):
        hit = same & (level == depth) & (source == leaf) & (merged == depth)
        found = tl.max(tl.where(hit, entry, -1), axis=0)
        sums = tl.where(entry == found, tl.maximum(sums, (depth + 1) * chain_step), sums)
        merged += (found >= 0).to(tl.int32)
        leaf = tl.where(found >= 0, found, leaf)
    return sums, merged, leaf
