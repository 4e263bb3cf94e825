"""The Triton kernel of `tree_attention`, which says what is computed and how the work is divided.

A program takes a block of rows of one kv head and one part of the keys: the step's own keys, or a split of the committed ones.
The query heads of a kv head's group lie side by side in the block (packed row = row * group + head of the group), so keys and
values are read once for all of them. Running maximum, sum and unnormalised output of the rows go from one block of keys to the
next as in FlashAttention (Dao et al., arXiv 2205.14135, algorithm 1), in powers of two; the parts are merged the same way.

It starts when the kernel in front of it has finished, and lets the one behind it start at once (see `triton_support`): the output
product fetches its weights meanwhile, which is 0.8 to 2 us a layer (H200; GPT-Neo-125M and 1.3B, 8 and 32 nodes; with 160 rows
nothing at 1.3B, and 0.5 us lost at 125M). Started early itself, its programs crowd onto the multiprocessors that happen to be
free, and a layer takes 1 us longer and more.
"""

from __future__ import annotations

from huggingface.transformers.integrations.triton_support import jit, release_dependents, tl


@jit
def _place(row, nodes, anchor, TREE: tl.constexpr, STREAMS: tl.constexpr):
    """Returns the node a row belongs to and its stream number, 0 for the node itself."""
    if STREAMS == 0:
        return row, row * 0
    beyond = row - nodes
    if TREE:
        return tl.where(beyond < 0, row, beyond // STREAMS), tl.where(beyond < 0, 0, beyond % STREAMS + 1)
    return tl.where(beyond < 0, row, anchor), tl.where(beyond < 0, 0, beyond + 1)


@jit
def _absorb(query, key, value, visible, scale, maximum, total, accumulator):
    """Returns maximum, sum and unnormalised output after one more block of keys."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    scores = tl.where(visible, scores, float("-inf"))
    raised = tl.maximum(maximum, tl.max(scores, 1))
    # A row that has seen nothing yet keeps -inf, which must not be subtracted from itself.
    origin = tl.where(raised == float("-inf"), 0.0, raised)
    weights = tl.exp2(scores - origin[:, None])
    fade = tl.exp2(maximum - origin)
    total = total * fade + tl.sum(weights, 1)
    accumulator = tl.dot(weights.to(value.dtype), value, accumulator * fade[:, None], input_precision="ieee")
    return raised, total, accumulator


@jit
def _absorb_committed(
    query, key_plane, value_plane, key_stride, value_stride, length, slots, part, offset, scale,
    maximum, total, accumulator, inner,
    WINDOW: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Absorbs this part's share of the committed rows; there is none for part 0 unless it is the only one."""
    committed = tl.minimum(length, slots)
    lowest = 0
    if WINDOW > 0:
        lowest = tl.minimum(tl.maximum(length + tl.min(offset, 0) - WINDOW + 1, 0), committed)
    first, end = lowest, committed
    if PARTS > 1:
        span = tl.cdiv(committed - lowest, PARTS - 1)
        first = tl.where(part == 0, committed, lowest + (part - 1) * span)
        end = tl.minimum(first + span, committed)
    columns = tl.arange(0, BLOCK_N)
    for start in range(first, end, BLOCK_N):
        inside = columns < end - start
        loaded = inside[:, None] & inner
        # Within a block offsets fit 32 bits, from the first slot they may not.
        key_tile = key_plane + tl.cast(start, tl.int64) * key_stride
        value_tile = value_plane + tl.cast(start, tl.int64) * value_stride
        key = tl.load(key_tile + (columns * key_stride)[:, None], mask=loaded, other=0.0)
        value = tl.load(value_tile + (columns * value_stride)[:, None], mask=loaded, other=0.0)
        visible = inside[None, :]
        if WINDOW > 0:
            visible = visible & ((start + columns)[None, :] > (length + offset - WINDOW)[:, None])
        maximum, total, accumulator = _absorb(query, key, value, visible, scale, maximum, total, accumulator)
    return maximum, total, accumulator


@jit
def _absorb_step(
    query, fresh_keys, fresh_values, row_size, paths, depths, anchor, nodes, rows, first_row, part,
    row, node, stream, offset, scale, maximum, total, accumulator, inner,
    TREE: tl.constexpr, STREAMS: tl.constexpr, WINDOW: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Absorbs the step's own keys, in part 0: blocks of the nodes some row may see, then blocks of such streams."""
    first_node, end_node, first_stream = 0, nodes, nodes
    if TREE:
        if STREAMS > 0:
            first_stream = nodes + tl.maximum(first_row - nodes, 0) // STREAMS * STREAMS
        path = tl.load(paths + node)
        # Two words: shifting 64 bits takes several instructions and twice the registers.
        low_word, high_word = path.to(tl.int32), (path >> 32).to(tl.int32)
    else:
        end_node = tl.max(node, 0) + 1
        if WINDOW > 0:
            first_node = tl.maximum(tl.min(offset, 0) - WINDOW + 1, 0)
    node_blocks = tl.cdiv(end_node - first_node, BLOCK_N)
    blocks = node_blocks + tl.maximum(tl.cdiv(tl.max(row, 0) + 1 - first_stream, BLOCK_N), 0)
    if PARTS > 1:
        blocks = tl.where(part == 0, blocks, 0)
    for block in range(0, blocks):
        of_nodes = block < node_blocks
        start = tl.where(
            of_nodes, first_node + block * BLOCK_N, first_stream + (block - node_blocks) * BLOCK_N
        )
        key_row = start + tl.arange(0, BLOCK_N)
        inside = key_row < tl.where(of_nodes, end_node, rows)
        loaded = inside[:, None] & inner
        key = tl.load(fresh_keys + (key_row * row_size)[:, None], mask=loaded, other=0.0)
        value = tl.load(fresh_values + (key_row * row_size)[:, None], mask=loaded, other=0.0)
        key_node, key_stream = _place(key_row, nodes, anchor, TREE, STREAMS)
        key_offset = key_node + key_stream
        if TREE:
            word = tl.where(key_node[None, :] < 32, low_word[:, None], high_word[:, None])
            visible = ((word >> (key_node[None, :] % 32)) & 1) != 0
            if WINDOW > 0:
                key_offset = tl.load(depths + key_node, mask=inside, other=0) + key_stream
        else:
            visible = key_node[None, :] <= node[:, None]
        if STREAMS > 0:
            own = (key_node[None, :] == node[:, None]) & (key_stream[None, :] <= stream[:, None])
            visible = tl.where(key_stream[None, :] > 0, own, visible)
        if WINDOW > 0:
            visible = visible & (key_offset[None, :] > (offset - WINDOW)[:, None])
        visible = visible & inside[None, :]
        maximum, total, accumulator = _absorb(query, key, value, visible, scale, maximum, total, accumulator)
    return maximum, total, accumulator


@jit
def _is_last(
    partials, arrived, part, maximum, total, accumulator, stored,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Stores the results of a part and returns whether all others of its block are there already."""
    lines, columns = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    numbers = partials + part * (BLOCK_M * (WIDTH + 2))
    tl.store(numbers + lines[:, None] * WIDTH + columns[None, :], accumulator, mask=stored)
    tl.store(numbers + BLOCK_M * WIDTH + lines, maximum)
    tl.store(numbers + BLOCK_M * (WIDTH + 1) + lines, total)
    tl.debug_barrier()
    return tl.atomic_add(arrived, 1, sem="acq_rel") == PARTS - 1


@jit
def _merge(partials, stored, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """Returns the sum and the unnormalised output of a block's parts, added up in their order."""
    PART: tl.constexpr = BLOCK_M * (WIDTH + 2)
    # A small block loads several parts at a time; more than this many numbers at once would spill registers.
    AT_ONCE: tl.constexpr = min(PARTS, max(1, 8192 // (BLOCK_M * WIDTH)))
    lines, columns = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    maxima = partials + BLOCK_M * WIDTH + lines
    highest = tl.max(tl.load(maxima[None, :] + tl.arange(0, PARTS)[:, None] * PART, cache_modifier=".cg"), 0)
    origin = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for part in tl.range(0, PARTS, loop_unroll_factor=AT_ONCE):
        fade = tl.exp2(tl.load(maxima + part * PART, cache_modifier=".cg") - origin)
        total += fade * tl.load(maxima + BLOCK_M + part * PART, cache_modifier=".cg")
        outputs = partials + part * PART + lines[:, None] * WIDTH + columns[None, :]
        accumulator += fade[:, None] * tl.load(outputs, mask=stored, other=0.0, cache_modifier=".cg")
    return total, accumulator


@jit
def tree_attention_kernel(
    projected, keys, values, lengths, ancestors, depths, anchors, out, partials, arrivals,
    nodes, rows, slots, scale,
    key_batch_stride, key_head_stride, key_slot_stride, value_batch_stride, value_head_stride, value_slot_stride,
    TREE: tl.constexpr, STREAMS: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attends one block of rows of one kv head to one part of the keys. Grid: (row blocks * parts, kv heads, batch)."""
    release_dependents(PDL)
    part = tl.program_id(0) % PARTS
    row_blocks = tl.num_programs(0) // PARTS
    # The last rows of a sequence have the most keys, so they start first.
    row_block = row_blocks - 1 - tl.program_id(0) // PARTS
    kv_head, kv_heads, batch_row = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    packed = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    # Packed rows past the end repeat the last row: they read valid memory and are never stored.
    row = tl.minimum(packed // GROUP, rows - 1)
    head = kv_head * GROUP + packed % GROUP
    columns = tl.arange(0, WIDTH)[None, :]
    inner = columns < HEAD_DIM
    row_size = kv_heads * (GROUP + 2) * HEAD_DIM
    queries = projected + batch_row * rows * row_size + columns
    fresh_keys = queries + (kv_heads * GROUP + kv_head) * HEAD_DIM
    fresh_values = fresh_keys + kv_heads * HEAD_DIM
    key_plane = keys + batch_row * key_batch_stride + kv_head.to(tl.int64) * key_head_stride + columns
    value_plane = values + batch_row * value_batch_stride + kv_head.to(tl.int64) * value_head_stride + columns
    paths, node_depths = ancestors, depths
    if TREE:
        paths += batch_row * nodes
        node_depths += batch_row * nodes

    query = tl.load(queries + (row * row_size + head * HEAD_DIM)[:, None], mask=inner, other=0.0)
    length = tl.load(lengths + batch_row).to(tl.int32)
    anchor = 0
    if STREAMS > 0 and not TREE:
        anchor = tl.load(anchors + batch_row).to(tl.int32)
    node, stream = _place(row, nodes, anchor, TREE, STREAMS)
    # A row's position less the length; committed keys lie at their slots.
    offset = node + stream
    if TREE:
        offset = tl.load(node_depths + node) + stream

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    maximum, total, accumulator = _absorb_committed(
        query, key_plane, value_plane, key_slot_stride, value_slot_stride, length, slots, part, offset, scale,
        maximum, total, accumulator, inner, WINDOW, PARTS, BLOCK_N,
    )  # fmt: skip
    maximum, total, accumulator = _absorb_step(
        query, fresh_keys, fresh_values, row_size, paths, node_depths, anchor, nodes, rows, row_block * BLOCK_M // GROUP, part,
        row, node, stream, offset, scale, maximum, total, accumulator, inner, TREE, STREAMS, WINDOW, PARTS, BLOCK_N,
    )  # fmt: skip

    slot = length.to(tl.int64) + row
    if part == 0:
        # Every row has one packed row that belongs to the first head of the group; that one writes.
        kept = ((packed % GROUP == 0) & (packed < nodes * GROUP) & (slot < slots))[:, None] & inner
        fresh = (row * row_size)[:, None]
        tl.store(
            key_plane + slot[:, None] * key_slot_stride, tl.load(fresh_keys + fresh, mask=kept), mask=kept
        )
        tl.store(
            value_plane + slot[:, None] * value_slot_stride,
            tl.load(fresh_values + fresh, mask=kept),
            mask=kept,
        )

    stored = (packed < rows * GROUP)[:, None] & inner
    out += ((batch_row * rows + row) * kv_heads * GROUP + head)[:, None] * HEAD_DIM + columns
    if PARTS == 1:
        result = accumulator / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out, result.to(out.dtype.element_ty), mask=stored)
    else:
        block = (batch_row * kv_heads + kv_head) * row_blocks + row_block
        partials += block * PARTS * BLOCK_M * (WIDTH + 2)
        if _is_last(
            partials, arrivals + block, part, maximum, total, accumulator, stored, PARTS, BLOCK_M, WIDTH
        ):
            total, accumulator = _merge(partials, stored, PARTS, BLOCK_M, WIDTH)
            result = accumulator / tl.where(total == 0.0, 1.0, total)[:, None]
            tl.store(out, result.to(out.dtype.element_ty), mask=stored)
            tl.store(arrivals + block, 0)
