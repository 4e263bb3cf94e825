"""The kernels behind `quantized_linear.py`: products of a few rows with weights of 8 or 4 bits.

Weights are turned into numbers in registers, so memory is read at the packed size. Integers of 8 bits are exact in half
precision, so a group's products are summed as integers times inputs and multiplied with the scale once.

`packing.py` says how 4-bit weights lie: byte h of a run holds input h in its low half and input h + run / 2 in its high half.
At 8 bits a "run" is a stretch of consecutive inputs, a byte each.
"""

from __future__ import annotations

from .gemv import activate
from .triton_support import jit, release_dependents, tl, wait_for_inputs


@jit
def _numbers(packed, zero, BITS: tl.constexpr, HIGH: tl.constexpr):
    """Returns the float32 integers of packed weights, those in the high halves of their bytes if HIGH."""
    if BITS == 8:
        return packed.to(tl.float32)
    if HIGH:
        return (packed >> 4).to(tl.float32) - zero
    return (packed & 15).to(tl.float32) - zero


@jit
def _scale_and_zero(
    scale_ptr, zero_ptr, column, run, groups, inside, ZERO: tl.constexpr, GROUPED: tl.constexpr
):  # fmt: skip
    """Returns float32 scales and zero points of (columns, 1) outputs and (1, runs) or scalar runs."""
    at = column * groups + (run if GROUPED else 0 * run)
    scale = tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
    zero = 8.0 + 0.0 * scale
    if ZERO:
        zero = tl.load(zero_ptr + at, mask=inside, other=0).to(tl.float32)
    return scale, zero


@jit
def _row_sum(
    weight_ptr, scale_ptr, zero_ptr, row_ptr, column, columns, inner, runs, groups,
    RUN: tl.constexpr, BYTES: tl.constexpr, BLOCK_RUNS: tl.constexpr, CHUNKS: tl.constexpr, BITS: tl.constexpr,
    ZERO: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Returns (columns,) float32 products of one row."""
    total = tl.zeros((column.shape[0],), dtype=tl.float32)
    byte = tl.arange(0, BYTES)
    for chunk in tl.range(0, CHUNKS):
        run = chunk * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)
        inside = (column < columns)[:, None] & (run < runs)[None, :]
        first = (run * RUN)[:, None] + byte[None, :]
        if BITS == 8:
            # The last run of a row may end before its last byte.
            packed = tl.load(
                weight_ptr + column.to(tl.int64)[:, None, None] * inner + first[None, :, :],
                mask=inside[:, :, None] & (first < inner)[None, :, :], other=0, eviction_policy="evict_first",
            )  # fmt: skip
        else:
            place = column.to(tl.int64)[:, None, None] * (runs * BYTES)
            place += (run * BYTES)[None, :, None] + byte[None, None, :]
            packed = tl.load(
                weight_ptr + place, mask=inside[:, :, None], other=0, eviction_policy="evict_first"
            )
        scale, zero = _scale_and_zero(
            scale_ptr,
            zero_ptr,
            column.to(tl.int64)[:, None],
            run[None, :],
            groups,
            inside,
            ZERO,
            GROUPED,
        )
        low = tl.load(row_ptr + first, mask=first < inner, other=0.0).to(tl.float32)
        products = _numbers(packed, zero[:, :, None], BITS, False) * low[None, :, :]
        if BITS == 4:
            high = tl.load(row_ptr + first + BYTES, mask=first + BYTES < inner, other=0.0).to(tl.float32)
            products += _numbers(packed, zero[:, :, None], BITS, True) * high[None, :, :]
        total += tl.sum(tl.sum(products, 2) * scale, 1)
    return total


@jit
def quantized_row_kernel(
    row_ptr, weight_ptr, scale_ptr, zero_ptr, bias_ptr, residual_ptr, output_ptr,
    columns, inner, runs, groups,
    BLOCK_COLUMNS: tl.constexpr, BLOCK_RUNS: tl.constexpr, CHUNKS: tl.constexpr, RUN: tl.constexpr, BYTES: tl.constexpr,
    BITS: tl.constexpr, ZERO: tl.constexpr, GROUPED: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Computes `BLOCK_COLUMNS` outputs of one row."""
    release_dependents(PDL)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    wait_for_inputs(PDL)
    total = _row_sum(
        weight_ptr, scale_ptr, zero_ptr, row_ptr, column, columns, inner, runs, groups,
        RUN, BYTES, BLOCK_RUNS, CHUNKS, BITS, ZERO, GROUPED,
    )  # fmt: skip
    inside = column < columns
    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    total = activate(total, ACTIVATION)
    if GATED:
        total *= _row_sum(
            weight_ptr, scale_ptr, zero_ptr, row_ptr, column + columns, 2 * columns, inner, runs, groups,
            RUN, BYTES, BLOCK_RUNS, CHUNKS, BITS, ZERO, GROUPED,
        )  # fmt: skip
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(output_ptr + column, total.to(output_ptr.dtype.element_ty), mask=inside)


@jit
def _tile(
    weight_ptr, scale_ptr, zero_ptr, input_ptr, column, last, row, rows, inner, runs, groups, first_run, past_run,
    RUN: tl.constexpr, BYTES: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Returns (columns, rows) float32 products over some runs."""
    total = tl.zeros((column.shape[0], row.shape[0]), dtype=tl.float32)
    byte = tl.arange(0, BYTES)
    valid = column < last
    rows_in = (row < rows)[None, :]
    inputs = input_ptr + row.to(tl.int64)[None, :] * inner
    kind = input_ptr.dtype.element_ty
    for run in range(first_run, past_run):
        first = run * RUN + byte
        if BITS == 8:
            packed = tl.load(
                weight_ptr + column.to(tl.int64)[:, None] * inner + first[None, :],
                mask=valid[:, None] & (first < inner)[None, :], other=0,
            )  # fmt: skip
        else:
            packed = tl.load(
                weight_ptr + (column.to(tl.int64) * runs + run)[:, None] * BYTES + byte[None, :],
                mask=valid[:, None], other=0,
            )  # fmt: skip
        scale, zero = _scale_and_zero(
            scale_ptr, zero_ptr, column.to(tl.int64), run, groups, valid, ZERO, GROUPED
        )
        low = tl.load(inputs + first[:, None], mask=rows_in & (first < inner)[:, None], other=0.0)
        part = tl.dot(_numbers(packed, zero[:, None], BITS, False).to(kind), low)
        if BITS == 4:
            beyond = first + BYTES
            high = tl.load(inputs + beyond[:, None], mask=rows_in & (beyond < inner)[:, None], other=0.0)
            part = tl.dot(_numbers(packed, zero[:, None], BITS, True).to(kind), high, part)
        total += part * scale[:, None]
    return total


@jit
def quantized_rows_kernel(  # noqa: C901 - one kernel; its branches are compile-time
    input_ptr, weight_ptr, scale_ptr, zero_ptr, bias_ptr, residual_ptr, output_ptr, partial_ptr, arrival_ptr,
    rows, columns, inner, runs, groups,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, SPLITS: tl.constexpr, RUN: tl.constexpr, BYTES: tl.constexpr,
    BITS: tl.constexpr, ZERO: tl.constexpr, GROUPED: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Computes one tile of outputs; the runs are divided among `SPLITS` programs, and the last to arrive adds up in order."""
    release_dependents(PDL)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    split = tl.program_id(1)
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    share = tl.cdiv(runs, SPLITS)
    first, past = split * share, tl.minimum((split + 1) * share, runs)
    wait_for_inputs(PDL)
    total = _tile(
        weight_ptr, scale_ptr, zero_ptr, input_ptr, column, columns, row, rows, inner, runs, groups, first, past,
        RUN, BYTES, BITS, ZERO, GROUPED,
    )  # fmt: skip
    factor = total
    if GATED:
        factor = _tile(
            weight_ptr, scale_ptr, zero_ptr, input_ptr, column + columns, 2 * columns, row, rows, inner, runs, groups,
            first, past, RUN, BYTES, BITS, ZERO, GROUPED,
        )  # fmt: skip
    complete = True
    if SPLITS > 1:
        size: tl.constexpr = BLOCK_COLUMNS * BLOCK_ROWS
        width: tl.constexpr = size * (2 if GATED else 1)
        cell = tl.arange(0, BLOCK_COLUMNS)[:, None] * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
        mine = partial_ptr + (tile * SPLITS + split) * width
        tl.store(mine + cell, total)
        if GATED:
            tl.store(mine + size + cell, factor)
        tl.debug_barrier()
        complete = tl.atomic_add(arrival_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
        if complete:
            tl.store(arrival_ptr + tile, 0)
            total = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), dtype=tl.float32)
            factor = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), dtype=tl.float32)
            for other in range(SPLITS):
                theirs = partial_ptr + (tile * SPLITS + other) * width
                total += tl.load(theirs + cell, cache_modifier=".cg")
                if GATED:
                    factor += tl.load(theirs + size + cell, cache_modifier=".cg")
    if complete:
        valid = (column < columns)[:, None] & (row < rows)[None, :]
        if HAS_BIAS:
            total += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[:, None]
        total = activate(total, ACTIVATION)
        if GATED:
            total = total * factor
        place = row.to(tl.int64)[None, :] * columns + column[:, None]
        if HAS_RESIDUAL:
            total += tl.load(residual_ptr + place, mask=valid, other=0.0).to(tl.float32)
        tl.store(output_ptr + place, total.to(output_ptr.dtype.element_ty), mask=valid)
