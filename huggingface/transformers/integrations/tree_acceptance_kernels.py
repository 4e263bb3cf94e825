"""Triton kernels of :mod:`.tree_acceptance`.

A node is accepted if it and all its ancestors hold the token that the target picks at their parents. With the ancestors of a node
as bits of one integer that is one comparison, `ancestors & ~agreeing == 0`, and the deepest accepted node is the end of the path.
"""

from __future__ import annotations

from .sortable_keys import key_token, sortable_key
from .triton_support import jit, release_dependents, tl, wait_for_inputs


@jit
def best_tokens_kernel(
    logits,
    keys,
    arrivals,
    out,
    vocab,
    nodes,
    batch_stride,
    node_stride,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (parts of the vocabulary, batch * nodes); the last program of a row compares what the others found."""
    release_dependents(PDL)
    wait_for_inputs(PDL)
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    parts = tl.num_programs(0)
    worst: tl.constexpr = -0x7FFFFFFFFFFFFFFF
    best = tl.full((BLOCK,), worst, tl.int64)
    logits += (row // nodes) * batch_stride + (row % nodes) * node_stride
    for tile in range(TILES):
        token = (part * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        inside = token < vocab
        scores = tl.load(logits + token, mask=inside, other=0.0).to(tl.float32)
        best = tl.maximum(best, tl.where(inside, sortable_key(scores, token), worst))
    top = tl.max(best, axis=0)
    if BLOCKS == 1:
        tl.store(out + row, key_token(top).to(tl.int64))
    else:
        tl.store(keys + row * parts + part, top)
        tl.debug_barrier()
        if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == parts - 1:
            other = tl.arange(0, BLOCKS)
            found = tl.load(keys + row * parts + other, mask=other < parts, other=worst, cache_modifier=".cg")
            tl.store(out + row, key_token(tl.max(found, axis=0)).to(tl.int64))
            tl.store(arrivals + row, 0)


@jit
def accept_kernel(
    chosen,
    tokens,
    parents,
    depths,
    ancestors,
    stream_states,
    root,
    lengths,
    finished,
    kept_states,
    history,
    base,
    packed,
    path,
    nodes,
    deepest,
    carriers,
    streams,
    width,
    capacity,
    batch_stride,
    carrier_stride,
    stream_stride,
    STREAMS: tl.constexpr,
    HISTORY: tl.constexpr,
    NODES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (batch, 1 + streams * parts of their states); every program finds the path, the first one of a row writes it down."""
    release_dependents(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    node = tl.arange(0, NODES)
    inside = node < nodes
    tree = row * nodes
    picked = tl.load(chosen + tree + node, mask=inside, other=0)
    above = tl.load(parents + tree + node, mask=inside, other=0)
    depth = tl.load(depths + tree + node, mask=inside, other=0)
    way = tl.load(ancestors + tree + node, mask=inside, other=0)
    token = tl.load(tokens + tree + node, mask=inside, other=0)
    agrees = inside & ((node == 0) | (token == tl.load(chosen + tree + above, mask=inside, other=0)))
    agreeing = tl.sum(tl.where(agrees, tl.full((NODES,), 1, tl.int64) << node.to(tl.int64), 0), axis=0)
    accepted = inside & ((way & ~agreeing) == 0) & (depth <= deepest)
    reach = tl.where(accepted, depth, -1)
    last = tl.argmax(reach, axis=0)
    count = tl.max(reach, axis=0) + 1
    on_path = ((tl.sum(tl.where(node == last, way, 0), axis=0) >> node.to(tl.int64)) & 1) != 0
    if part == 0:
        bonus = tl.sum(tl.where(node == last, picked, 0), axis=0)
        column = tl.arange(0, COLUMNS)
        emitted = packed + row * (deepest + 2)
        tl.store(emitted, count.to(tl.int64))
        tl.store(emitted + 1 + depth, picked, mask=on_path)
        tl.store(emitted + column, 0, mask=(column > count) & (column < deepest + 2))
        tl.store(path + row * (deepest + 1) + depth, node.to(tl.int64), mask=on_path)
        tl.store(
            path + row * (deepest + 1) + column,
            last.to(tl.int64),
            mask=(column >= count) & (column <= deepest),
        )
        length = tl.load(lengths + row)
        grows = tl.load(finished + row).to(tl.int32) == 0
        tl.store(base + row, length)
        tl.store(root + row, bonus)
        tl.store(lengths + row, length + tl.where(grows, count, 0))
        if HISTORY:
            position = length + 1 + depth
            end = tl.where(grows, capacity, 0)
            tl.store(history + row * capacity + position, picked, mask=on_path & (position < end))
    elif STREAMS:
        carrier = tl.max(tl.where(on_path & (node < carriers), node, 0), axis=0)
        passed = count - 1 - tl.sum(tl.where(node == carrier, depth, 0), axis=0)
        stream = (part - 1) % streams
        feature = (part - 1) // streams * BLOCK + tl.arange(0, BLOCK)
        within = feature < width
        ahead = stream + passed
        source = stream_states + row * batch_stride + carrier.to(tl.int64) * carrier_stride
        values = tl.load(
            source + ahead.to(tl.int64) * stream_stride + feature, mask=within & (ahead < streams), other=0.0
        )
        tl.store(kept_states + (row * streams + stream) * width + feature, values, mask=within)


@jit
def commit_kernel(
    block,
    path,
    packed,
    base,
    finished,
    heads,
    slots,
    columns,
    layer_stride,
    kind_stride,
    batch_stride,
    head_stride,
    slot_stride,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (layers * 2 * kv_heads, batch); a program reads all rows that move before it writes the first."""
    release_dependents(PDL)
    wait_for_inputs(PDL)
    plane = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    pair = (plane // heads).to(tl.int64)
    head = (plane % heads).to(tl.int64)
    place = tl.arange(0, ROWS)
    node = tl.load(path + row * columns + place, mask=place < columns, other=0)
    start = tl.load(base + row)
    grows = tl.load(finished + row).to(tl.int32) == 0
    count = tl.where(grows, tl.load(packed + row * (columns + 1)), 0)
    moves = (place > 0) & (place < count) & (node != place) & (start + node < slots)
    lane = tl.arange(0, LANES)
    mask = moves[:, None] & (lane < SIZE)[None, :]
    plane_at = (
        block
        + (pair // 2) * layer_stride
        + (pair % 2) * kind_stride
        + row * batch_stride
        + head * head_stride
    )
    rows = tl.load(plane_at + (start + node)[:, None] * slot_stride + lane[None, :], mask=mask)
    tl.debug_barrier()
    tl.store(plane_at + (start + place)[:, None] * slot_stride + lane[None, :], rows, mask=mask)
