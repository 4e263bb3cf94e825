"""The kernel behind `quantized_linear.py` for a few rows: weights of 8 or 4 bits times the inputs on the tensor cores.

The weight tile is the left operand: its many outputs fill the tensor core's long side, the step's few rows the short one. Weights
become half-precision integers in registers, in pairs and without a conversion: four bits put at the end of a mantissa whose
exponent makes its last bit worth one *are* a number plus a constant, which one packed operation takes off (Marlin, arXiv
2408.11743, does the same). Integers are exact in half precision, so a group's products are summed as integers times inputs and
multiplied with the scale once.

`packing.py` says how 4-bit weights lie: a run of 128 inputs is 32 words of 16 bits, and word h holds inputs h, 32 + h, 64 + h and
96 + h. So each nibble, taken from a stretch of words, gives consecutive inputs. At 8 bits a run is 128 consecutive bytes.
"""

from __future__ import annotations

from .gemv import activate
from .triton_support import jit, release_dependents, tl, wait_for_inputs


@jit
def _nibbles(words, PLACE: tl.constexpr, BRAIN: tl.constexpr, PACKED: tl.constexpr):
    """Returns the half-precision numbers q - 8 of one of the four nibbles of int16 words.

    PACKED: in pairs, by instructions for a GPU; otherwise by operations that Triton's interpreter knows.
    """
    if not PACKED:
        numbers = (((words >> (4 * PLACE)) & 15) - 8).to(tl.float32)
        result = numbers.to(tl.bfloat16 if BRAIN else tl.float16)
    else:
        SHIFT: tl.constexpr = (
            "mov.b32 t, $1;" if PLACE == 0 else
            "shr.u32 t, $1, 4;" if PLACE == 1 else
            "shr.u32 t, $1, 8;" if PLACE == 2 else
            "shr.u32 t, $1, 12;"
        )  # fmt: skip
        # 128 + q, times one, minus 136, since bfloat16 has no packed sum before Hopper; or 1024 + q, minus 1032.
        END: tl.constexpr = (
            "0x43004300, 0xEA; mov.b32 u, 0x3F803F80; mov.b32 v, 0xC308C308; fma.rn.bf16x2 $0, t, u, v; }" if BRAIN else
            "0x64006400, 0xEA; mov.b32 u, 0x64086408; sub.f16x2 $0, t, u; }"
        )  # fmt: skip
        asm: tl.constexpr = "{ .reg .b32 t, u, v;" + SHIFT + "lop3.b32 t, t, 0x000F000F, " + END
        result = tl.inline_asm_elementwise(
            asm, "=r,r", [words], dtype=tl.bfloat16 if BRAIN else tl.float16, is_pure=True, pack=2
        )
    return result


@jit
def _signed(packed, BRAIN: tl.constexpr, PACKED: tl.constexpr):
    """Returns the half-precision numbers of signed bytes; PACKED as for `_nibbles`."""
    if not PACKED:
        result = packed.to(tl.float32).to(tl.bfloat16 if BRAIN else tl.float16)
    elif BRAIN:
        # The lower seven bits and 128, minus 128 or, where the sign bit raises the exponent, 256.
        result = tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, c, d, e; mov.b32 e, 0xBF80BF80;
            prmt.b32 a, $2, 0, 0x4140; prmt.b32 b, $2, 0, 0x4342;
            lop3.b32 c, a, 0x007F007F, 0x43004300, 0xEA; lop3.b32 a, a, 0x00800080, 0x43004300, 0xEA;
            lop3.b32 d, b, 0x007F007F, 0x43004300, 0xEA; lop3.b32 b, b, 0x00800080, 0x43004300, 0xEA;
            fma.rn.bf16x2 $0, a, e, c; fma.rn.bf16x2 $1, b, e, d; }""",
            "=r,=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        # 1024 and the byte with its sign turned over, minus 1152.
        result = tl.inline_asm_elementwise(
            """{ .reg .b32 a, b, c, d; mov.b32 d, 0x64806480;
            xor.b32 c, $2, 0x80808080; mov.b32 b, 0x64646464;
            prmt.b32 a, c, b, 0x4140; prmt.b32 b, c, b, 0x4342;
            sub.f16x2 $0, a, d; sub.f16x2 $1, b, d; }""",
            "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    return result


@jit
def _quarter(words, zero, PLACE: tl.constexpr, ZERO: tl.constexpr, BRAIN: tl.constexpr, PACKED: tl.constexpr):
    """Returns the half-precision numbers of a quarter of a run; with zero points (columns, 1) by plain operations."""
    if ZERO:
        numbers = ((words >> (4 * PLACE)) & 15).to(tl.float32) - zero
        result = numbers.to(tl.bfloat16 if BRAIN else tl.float16)
    else:
        result = _nibbles(words, PLACE, BRAIN, PACKED)
    return result


@jit
def _inputs(pointers, at, limit, rows_in, MASKED: tl.constexpr):
    """Returns (inputs, rows) inputs; `MASKED` where inputs may end before the run does."""
    if MASKED:
        return tl.load(pointers + at[:, None], mask=rows_in & (at < limit)[:, None], other=0.0)
    return tl.load(pointers + at[:, None], mask=rows_in, other=0.0)


@jit
def _columns(pointers, valid, MASKED: tl.constexpr):
    """Returns what belongs to (columns,) outputs, 0 for those that are none."""
    if MASKED:
        return tl.load(pointers, mask=valid, other=0)
    return tl.load(pointers)


@jit
def _add_run4(
    total, words, first, second, third, fourth, scale_ptr, zero_ptr, group, valid,
    PARTS: tl.constexpr, ZERO: tl.constexpr, GROUPED: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Returns (columns, rows) totals with the products of a run of 4-bit weights added; `first` to `fourth`: its inputs."""
    BRAIN: tl.constexpr = first.dtype == tl.bfloat16
    part = tl.zeros_like(total) if GROUPED else total
    for place in tl.static_range(4):
        # The index of the group that a quarter belongs to changes with every 4 / PARTS quarters.
        if GROUPED and place % (4 // PARTS) == 0:
            at = group + place * PARTS // 4
            scale = _columns(scale_ptr + at, valid, MASKED).to(tl.float32)[:, None]
        zero = 0.0
        if ZERO:
            zero = _columns(zero_ptr + group + place * PARTS // 4, valid, MASKED).to(tl.float32)[:, None]
        numbers = _quarter(words, zero, place, ZERO, BRAIN, PACKED)
        if place == 0:
            inputs = first
        elif place == 1:
            inputs = second
        elif place == 2:
            inputs = third
        else:
            inputs = fourth
        part = tl.dot(numbers, inputs, part)
        if GROUPED and (place + 1) % (4 // PARTS) == 0:
            total += part * scale
            part = tl.zeros_like(total)
    return total if GROUPED else part


@jit(do_not_specialize=["rows", "splits"])  # so that one compilation serves every number
def quantized_rows_kernel(  # noqa: C901 - one kernel; its branches are compile-time
    input_ptr, weight_ptr, scale_ptr, zero_ptr, bias_ptr, residual_ptr, output_ptr, partial_ptr, arrival_ptr,
    rows, columns, inner, runs, splits,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, DIVIDED: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr,
    ZERO: tl.constexpr, GROUPED: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Computes one tile of outputs; the runs are divided among `splits` programs, and the last to arrive adds up in order.

    `weight_ptr` holds int16 words at 4 bits, bytes at 8. `MASKED`: outputs or inputs do not divide into blocks and runs. `PARTS`:
    groups in a run.
    """
    release_dependents(PDL)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    split = tl.program_id(1)
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    share = tl.cdiv(runs, splits)
    start, past = split * share, tl.minimum((split + 1) * share, runs)
    valid = column < columns
    rows_in = (row < rows)[None, :]
    inputs = input_ptr + row.to(tl.int64)[None, :] * inner
    total = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), dtype=tl.float32)
    factor = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), dtype=tl.float32)
    groups = runs * PARTS
    WIDTH: tl.constexpr = 32 if BITS == 4 else 128
    length = runs * WIDTH if BITS == 4 else inner
    stretch = tl.arange(0, WIDTH)
    weights = weight_ptr + column.to(tl.int64)[:, None] * length + stretch[None, :]
    factors = weight_ptr + (column + columns).to(tl.int64)[:, None] * length + stretch[None, :]
    wait_for_inputs(PDL)
    for run in range(start, past):
        if BITS == 4:
            at = run * 128 + stretch
            first = _inputs(inputs, at, inner, rows_in, MASKED)
            second = _inputs(inputs, at + 32, inner, rows_in, MASKED)
            third = _inputs(inputs, at + 64, inner, rows_in, MASKED)
            fourth = _inputs(inputs, at + 96, inner, rows_in, MASKED)
            words = _columns(weights + run * WIDTH, valid[:, None], MASKED)
            total = _add_run4(
                total, words, first, second, third, fourth, scale_ptr, zero_ptr, column * groups + run * PARTS, valid,
                PARTS, ZERO, GROUPED, MASKED, PACKED,
            )  # fmt: skip
            if GATED:
                words = _columns(factors + run * WIDTH, valid[:, None], MASKED)
                factor = _add_run4(
                    factor, words, first, second, third, fourth, scale_ptr, zero_ptr,
                    (column + columns) * groups + run * PARTS, valid, PARTS, ZERO, GROUPED, MASKED, PACKED,
                )  # fmt: skip
        else:
            at = run * 128 + stretch
            within = valid[:, None] & (at < inner)[None, :]
            value = _inputs(inputs, at, inner, rows_in, MASKED)
            packed = _columns(weights + run * WIDTH, within, MASKED)
            total = tl.dot(_signed(packed, value.dtype == tl.bfloat16, PACKED), value, total)
            if GATED:
                packed = _columns(factors + run * WIDTH, within, MASKED)
                factor = tl.dot(_signed(packed, value.dtype == tl.bfloat16, PACKED), value, factor)
    complete = True
    if DIVIDED:
        size: tl.constexpr = BLOCK_COLUMNS * BLOCK_ROWS
        width: tl.constexpr = size * (2 if GATED else 1)
        cell = tl.arange(0, BLOCK_COLUMNS)[:, None] * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
        mine = partial_ptr + (tile * splits + split) * width
        tl.store(mine + cell, total, mask=rows_in)
        if GATED:
            tl.store(mine + size + cell, factor, mask=rows_in)
        tl.debug_barrier()
        complete = tl.atomic_add(arrival_ptr + tile, 1, sem="acq_rel") == splits - 1
        if complete:
            tl.store(arrival_ptr + tile, 0)
            total = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), dtype=tl.float32)
            factor = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), dtype=tl.float32)
            for other in range(splits):
                theirs = partial_ptr + (tile * splits + other) * width
                total += tl.load(theirs + cell, mask=rows_in, other=0.0, cache_modifier=".cg")
                if GATED:
                    factor += tl.load(theirs + size + cell, mask=rows_in, other=0.0, cache_modifier=".cg")
    if complete:
        if not GROUPED:
            total *= tl.load(scale_ptr + column, mask=valid, other=0.0)[:, None]
            if GATED:
                factor *= tl.load(scale_ptr + column + columns, mask=valid, other=0.0)[:, None]
        if HAS_BIAS:
            total += tl.load(bias_ptr + column, mask=valid, other=0.0).to(tl.float32)[:, None]
        total = activate(total, ACTIVATION)
        if GATED:
            total = total * factor
        place = row.to(tl.int64)[None, :] * columns + column[:, None]
        inside = valid[:, None] & rows_in
        if HAS_RESIDUAL:
            total += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(output_ptr + place, total.to(output_ptr.dtype.element_ty), mask=inside)
