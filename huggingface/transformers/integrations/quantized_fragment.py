"""The kernel behind `quantized_linear.py` for few rows: packed weights go from memory through registers to the tensor core.

The kernel for any number of rows (`quantized_linear_kernels.py`) passes weights and inputs through shared memory: a thread
loads other numbers than the tensor core wants it to hold. With few rows that detour is what a product waits for. Packed words
need none.
With the inner dimension ordered so that a thread holds 8 consecutive inputs (`DotOperandLayout(k_width=8)`), the 16 bytes that it
loads are what it has to hold. At 4 bits, with t = 0, 8, 16 or 24 for the four threads of an output::

    words of a thread         t   t + 1  ..  t + 7
    nibble 0: inputs          t   ..         t + 7      } one left operand, 64 inputs: two fields of 32,
    nibble 1: inputs     32 + t   ..    32 + t + 7      } four threads with 8 consecutive inputs each
    nibble 2: inputs     64 + t   ..    64 + t + 7      } the other
    nibble 3: inputs     96 + t   ..    96 + t + 7      }

At 8 bits 16 bytes twice hold a run of 128 inputs, and a word's bytes are 64 inputs apart. The rows are the right operand, whose
threads load 8 consecutive inputs as well. Nothing moves between threads before the end.

Each warp takes a slice of the inner dimension: the batch dimension of a product of three dimensions. So all warps of a program
have weights in flight from the start, asked for before the program waits for its inputs, and meet once, when their sums are
added. How many registers a thread may have (`maxnreg`) is part of a tile: it decides how many programs a multiprocessor holds.
"""

from __future__ import annotations

from .gemv import activate
from .gluon_support import gl, gluon_jit, mma_v2, word_layout
from .quantized_linear_kernels import nibbles, signed_bytes
from .triton_support import release_dependents, tl, wait_for_inputs


@gluon_jit
def _field(words, PLACE: tl.constexpr, BITS: tl.constexpr, BRAIN: tl.constexpr, PACKED: tl.constexpr):
    """Returns the half-precision numbers of one field of int16 words."""
    if BITS == 4:
        return nibbles(words, PLACE, BRAIN, PACKED)
    return signed_bytes(words, PLACE, BRAIN, PACKED)


@gluon_jit
def _operand(
    words, FIRST: tl.constexpr, BITS: tl.constexpr, BRAIN: tl.constexpr, PACKED: tl.constexpr, layout: tl.constexpr
):  # fmt: skip
    """Returns a left operand, (slices, columns, 64) numbers, of two fields of (slices, columns, 32) words."""
    low = _field(words, FIRST, BITS, BRAIN, PACKED)
    high = _field(words, FIRST + 1, BITS, BRAIN, PACKED)
    both = tl.permute(tl.join(low, high), (0, 1, 3, 2))
    both = tl.reshape(both, [words.shape[0], words.shape[1], 64])
    return gl.convert_layout(both, layout, assert_trivial=True)


@gluon_jit
def _ask(
    pointer, at, more, half, COUNT: tl.constexpr, STRIDE: tl.constexpr, HALVES: tl.constexpr, MASKED: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    """Returns a tuple of what lies at `COUNT` strides from offsets, then the same of a gated product's other half."""
    found = ()
    for h in tl.static_range(HALVES):
        for i in tl.static_range(COUNT):
            pointers = pointer + (at + h * half) + i * STRIDE
            if MASKED:
                found = found + (tl.load(pointers, mask=more, other=0, eviction_policy=KEPT),)
            else:
                found = found + (tl.load(pointers, eviction_policy=KEPT),)
    return found


@gluon_jit
def _ask_inputs(pointers, BITS: tl.constexpr):
    """Returns the two right operands, (slices, 64, rows), of a run of each slice."""
    return tl.load(pointers), tl.load(pointers + (64 if BITS == 4 else 32))


@gluon_jit
def _add_run(total, numbers, more_numbers, scale, inputs, GROUPED: tl.constexpr, layout: tl.constexpr):
    """Returns (slices, columns, rows) totals with a run of each slice added."""
    first, second = inputs
    part = total
    if GROUPED:
        part = gl.zeros([total.shape[0], total.shape[1], total.shape[2]], tl.float32, layout)
    part = mma_v2(numbers, first, part)
    part = mma_v2(more_numbers, second, part)
    if GROUPED:
        part = total + part * tl.expand_dims(scale.to(tl.float32), 2)
    return part


@gluon_jit(do_not_specialize=["rows", "splits", "steps"])
def fragment_kernel(  # noqa: C901
    input_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr, output_ptr, partial_ptr, arrival_ptr,
    rows, columns, runs, splits, steps,
    BLOCK_ROWS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, SLICES: tl.constexpr, RUNS: tl.constexpr,
    AHEAD: tl.constexpr, LOOP: tl.constexpr, DIVIDED: tl.constexpr, BITS: tl.constexpr, GROUPED: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    PACKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of columns, split). See `quantized_linear.quantized_linear_reference` for what it computes.

    It computes all rows, in `BLOCKS` of `BLOCK_ROWS`, and `BLOCK_COLUMNS` outputs; of a gated product, of each half. Each of
    `SLICES` warps has `RUNS` runs of the inner dimension at a time, in `steps` (`LOOP`: more than one). Inputs of `AHEAD` pairs
    of a run and a block of rows are asked for before they are needed. Rows and columns that are none are computed like the last
    one and not written.

    Args:
        input_ptr: (rows, in) half precision.
        weight_ptr: (out, words) int16 as `packing.py` lays them out, in whole runs, without zero points.
        scale_ptr: (out, runs) where `GROUPED`, one a run, else (out, 1).
        bias_ptr: (columns,); any pointer without `HAS_BIAS`.
        residual_ptr: (rows, columns); any pointer without `HAS_RESIDUAL`.
        output_ptr: (rows, columns).
        partial_ptr: float32, room for all programs' sums where `DIVIDED`.
        arrival_ptr: int32 zeros, one a tile of columns where `DIVIDED`; left at zero.
        rows, columns, runs: sizes; splits: programs that share a tile's runs; steps: each program's.
    """
    release_dependents(PDL)
    BRAIN: tl.constexpr = output_ptr.dtype.element_ty == tl.bfloat16
    HALVES: tl.constexpr = 2 if GATED else 1
    WIDTH: tl.constexpr = 32 if BITS == 4 else 64  # words of a run
    PIECES: tl.constexpr = BITS // 4  # stretches of 32 words of a run
    mma: tl.constexpr = gl.NVMMADistributedLayout([2, 0], [SLICES, 1, 1], [1, 16, 8])
    left: tl.constexpr = gl.DotOperandLayout(0, mma, 8)
    right: tl.constexpr = gl.DotOperandLayout(1, mma, 8)
    packed: tl.constexpr = word_layout(SLICES, BLOCK_COLUMNS)
    scaled: tl.constexpr = gl.SliceLayout(2, mma)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    begin = split * steps * (SLICES * RUNS)  # a program's runs; those of a step slice by slice

    slice_w = tl.expand_dims(gl.arange(0, SLICES, gl.SliceLayout(1, gl.SliceLayout(2, packed)))[:, None], 2)
    column_w = tl.expand_dims(
        gl.arange(0, BLOCK_COLUMNS, gl.SliceLayout(0, gl.SliceLayout(2, packed)))[None, :], 2
    )
    word_w = tl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, packed)))[None, :], 1)
    column_w = tl.minimum(tile * BLOCK_COLUMNS + column_w, columns - 1)
    at_w = column_w * (runs * WIDTH) + (begin + slice_w * RUNS) * WIDTH + word_w
    half_words, half_scales = columns * runs * WIDTH, columns * runs
    words = _ask(weight_ptr, at_w, True, half_words, RUNS * PIECES, 32, HALVES, False, "evict_first")
    slice_s = gl.arange(0, SLICES, gl.SliceLayout(1, scaled))[:, None]
    column_s = gl.arange(0, BLOCK_COLUMNS, gl.SliceLayout(0, scaled))[None, :]
    at_s = tl.minimum(tile * BLOCK_COLUMNS + column_s, columns - 1) * runs + begin + slice_s * RUNS
    factors = _ask(scale_ptr, at_s, True, half_scales, RUNS if GROUPED else 0, 1, HALVES, False, "")

    slice_b = tl.expand_dims(gl.arange(0, SLICES, gl.SliceLayout(1, gl.SliceLayout(2, right)))[:, None], 2)
    inner_b = tl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(2, right)))[None, :], 2)
    row_b = tl.expand_dims(gl.arange(0, BLOCK_ROWS, gl.SliceLayout(0, gl.SliceLayout(1, right)))[None, :], 1)
    if BITS == 8:
        inner_b = inner_b // 32 * 64 + inner_b % 32
    inner_b = (begin + slice_b * RUNS) * 128 + inner_b
    inputs = ()
    totals = ()
    for b in tl.static_range(BLOCKS):
        inputs = inputs + (tl.minimum(row_b + b * BLOCK_ROWS, rows - 1) * (runs * 128) + inner_b,)
        for _ in tl.static_range(HALVES):
            totals = totals + (gl.zeros([SLICES, BLOCK_COLUMNS, BLOCK_ROWS], tl.float32, mma),)
    wait_for_inputs(PDL)
    moved = 0
    for step in range(steps if LOOP else 1):
        operands = ()
        for i in tl.static_range(AHEAD):
            operands = operands + (
                _ask_inputs(input_ptr + (inputs[i % BLOCKS] + (i // BLOCKS * 128 + moved)), BITS),
            )
        next_words = words
        next_factors = factors
        if LOOP:
            at_w += SLICES * RUNS * WIDTH
            at_s += SLICES * RUNS
            more = step + 1 < steps
            next_words = _ask(
                weight_ptr, at_w, more, half_words, RUNS * PIECES, 32, HALVES, True, "evict_first"
            )
            next_factors = _ask(
                scale_ptr, at_s, more, half_scales, RUNS if GROUPED else 0, 1, HALVES, True, ""
            )
        for r in tl.static_range(RUNS):
            numbers = ()
            for h in tl.static_range(HALVES):
                earlier = words[(h * RUNS + r) * PIECES]
                later = words[(h * RUNS + r) * PIECES + PIECES - 1]
                first = _operand(earlier, 0, BITS, BRAIN, PACKED, left)
                second = _operand(later, 2 if BITS == 4 else 0, BITS, BRAIN, PACKED, left)
                numbers = numbers + ((first, second),)
            added = ()
            for b in tl.static_range(BLOCKS):
                if r * BLOCKS + b + AHEAD < RUNS * BLOCKS:
                    ahead = inputs[(b + AHEAD) % BLOCKS] + ((r * BLOCKS + b + AHEAD) // BLOCKS * 128 + moved)
                    operands = operands + (_ask_inputs(input_ptr + ahead, BITS),)
                for h in tl.static_range(HALVES):
                    scale = factors[h * RUNS + r] if GROUPED else 1.0
                    first, second = numbers[h]
                    added = added + (
                        _add_run(totals[b * HALVES + h], first, second, scale, operands[r * BLOCKS + b], GROUPED, mma),
                    )  # fmt: skip
            totals = added
        moved += SLICES * RUNS * 128
        words = next_words
        factors = next_factors

    # Slices are added, then an output's neighbours lie next to each other, as they are written.
    joined: tl.constexpr = gl.BlockedLayout(
        [SLICES, BLOCK_COLUMNS // 16, 1], [1, 16, 2], [1, 1, SLICES], [1, 2, 0]
    )
    written: tl.constexpr = gl.SliceLayout(0, joined)
    local = gl.arange(0, BLOCK_COLUMNS, gl.SliceLayout(1, written))
    local_row = gl.arange(0, BLOCK_ROWS, gl.SliceLayout(0, written))
    column = tile * BLOCK_COLUMNS + local
    valid = column < columns
    AREA: tl.constexpr = BLOCK_COLUMNS * BLOCK_ROWS
    cell = local[:, None] + local_row[None, :] * BLOCK_COLUMNS
    sums = ()
    for i in tl.static_range(BLOCKS * HALVES):
        sums = sums + (tl.sum(gl.convert_layout(totals[i], joined), 0),)
    complete = True
    if DIVIDED:
        mine = partial_ptr + (tile * splits + split) * (AREA * BLOCKS * HALVES)
        for i in tl.static_range(BLOCKS * HALVES):
            inside = valid[:, None] & (i // HALVES * BLOCK_ROWS + local_row < rows)[None, :]
            tl.store(mine + i * AREA + cell, sums[i], mask=inside)
        tl.debug_barrier()
        complete = tl.atomic_add(arrival_ptr + tile, 1, sem="acq_rel") == splits - 1
        if complete:
            tl.store(arrival_ptr + tile, 0)
    if complete:
        for b in tl.static_range(BLOCKS):
            row = b * BLOCK_ROWS + local_row
            inside = valid[:, None] & (row < rows)[None, :]
            results = ()
            for h in tl.static_range(HALVES):
                result = sums[b * HALVES + h]  # type: ignore[var-annotated]  # a tuple of tensors
                if DIVIDED:
                    result = gl.zeros([BLOCK_COLUMNS, BLOCK_ROWS], tl.float32, written)
                    for other in range(splits):
                        theirs = (
                            partial_ptr
                            + ((tile * splits + other) * (BLOCKS * HALVES) + b * HALVES + h) * AREA
                        )
                        result += tl.load(theirs + cell, mask=inside, other=0.0, cache_modifier=".cg")
                if not GROUPED:
                    result *= tl.load(scale_ptr + column + h * columns, mask=valid, other=0.0)[:, None]
                results = results + (result,)
            result = results[0]
            if HAS_BIAS:
                result += tl.load(bias_ptr + column, mask=valid, other=0.0).to(tl.float32)[:, None]
            result = activate(result, ACTIVATION)
            if GATED:
                result = result * results[1]
            place = row[None, :] * columns + column[:, None]
            if HAS_RESIDUAL:
                result += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(output_ptr + place, result.to(output_ptr.dtype.element_ty), mask=inside)
