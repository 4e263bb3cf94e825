"""The last part of :mod:`.tree_drafting_kernels`: from the ranked candidates of all levels to a tree.

A candidate is chosen if fewer than `nodes - 1` others beat it, and its node is one more than they are; so nothing is sorted,
only counted. Ties of sums go to the candidate in front. The row of a level in the pool ends with an empty place: there, in the
order of ties, stands the token that a chain copied from the context proposes at that depth.
"""

from __future__ import annotations

from .sortable_keys import count_larger, sortable_key
from .triton_support import jit, tl


@jit
def select_tree(
    root,
    pool_sums,
    pool_tokens,
    pool_parents,
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
        chain_sums = tl.where((link >= merged) & (link < reach), (link + 1) * chain_step, lost)
        chain_order = link * SLOTS + SLOTS - 1
        chain_key = sortable_key(chain_sums, chain_order)

    key = sortable_key(sums, entry)
    beaten = count_larger(key, ENTRIES, 8192 // ENTRIES)
    if CHAIN > 0:
        beaten += tl.sum((chain_key[None, :] > key[:, None]).to(tl.int32), axis=1)
    chosen = (sums > lost) & (beaten < nodes - 1)
    node = 1 + beaten
    if CHAIN > 0:
        # Sums fall along the chain and never rise above a parent's, so earlier links come first.
        chain_beaten = tl.sum((key[:, None] > chain_key[None, :]).to(tl.int32), axis=0) + link - merged
        chain_chosen = (chain_sums > lost) & (chain_beaten < nodes - 1)
        chain_node = 1 + chain_beaten

    tree = row * nodes
    below = tl.where(source >= 0, tl.gather(node, tl.maximum(source, 0), 0), 0)
    tl.store(tokens + tree + node, token.to(tl.int64), mask=chosen)
    tl.store(parents + tree + node, below, mask=chosen)
    tl.store(depths + tree + node, level + 1, mask=chosen)
    tl.store(origins + tree + node, tl.full((ENTRIES,), 1, tl.int32), mask=chosen)
    filled = 1 + tl.sum(chosen.to(tl.int32), axis=0)
    if CHAIN > 0:
        branch = tl.max(tl.where((entry == leaf) & chosen, node, 0), axis=0)
        chain_below = tl.gather(chain_node, tl.maximum(link - 1, 0), 0)
        chain_below = tl.where(link == merged, branch, chain_below)
        tl.store(tokens + tree + chain_node, chain_token.to(tl.int64), mask=chain_chosen)
        tl.store(parents + tree + chain_node, chain_below, mask=chain_chosen)
        tl.store(depths + tree + chain_node, link + 1, mask=chain_chosen)
        tl.store(origins + tree + chain_node, tl.full((CHAIN,), 2, tl.int32), mask=chain_chosen)
        filled += tl.sum(chain_chosen.to(tl.int32), axis=0)
    # The root, and padding where candidates are fewer than nodes.
    number = tl.arange(0, NODES)
    real = number < nodes
    spare = real & ((number == 0) | (number >= filled))
    nothing = tl.zeros((NODES,), tl.int32)
    tl.store(tokens + tree + number, tl.where(number == 0, tl.load(root + row), 0), mask=spare)
    tl.store(parents + tree + number, nothing, mask=spare)
    tl.store(depths + tree + number, (number > 0).to(tl.int32), mask=spare)
    tl.store(origins + tree + number, nothing, mask=spare)
    tl.debug_barrier()
    up = tl.load(parents + tree + number, mask=real, other=0)
    DEEPEST: tl.constexpr = STREAMS if STREAMS > CHAIN else CHAIN
    tl.store(ancestors + tree + number, _ancestor_bits(up, number, DEEPEST, NODES), mask=real)


@jit
def _ancestor_bits(up, number, DEEPEST: tl.constexpr, NODES: tl.constexpr):
    """Returns the bits of the nodes on every node's way from the root; each round doubles how far `up` (NODES,) leads."""
    bits = tl.full((NODES,), 1, tl.int64) << number.to(tl.int64)
    for doubling in tl.static_range(6):  # a tree of 64 nodes is at most 63 deep
        if (1 << doubling) <= DEEPEST:
            bits |= tl.gather(bits, up, 0)
            up = tl.gather(up, up, 0)
    return bits


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
