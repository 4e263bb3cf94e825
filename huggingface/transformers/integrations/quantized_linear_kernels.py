"""The kernel behind `quantized_linear.py` for a few rows: weights of 8 or 4 bits times the inputs on the tensor cores.

The weight tile is the left operand: its many outputs fill the tensor core's long side, the step's few rows the short one. Weights
become half-precision integers in registers, in pairs and without a conversion: four bits put at the end of a mantissa whose
exponent makes its last bit worth one *are* a number plus a constant, which one packed operation takes off (Marlin, arXiv
2408.11743, does the same). Integers are exact in half precision, so a group's products are summed as integers times inputs and
multiplied with the scale once.

`packing.py` says how 4-bit weights lie: a run of 128 inputs is 32 words of 16 bits, and word h holds inputs h, 32 + h, 64 + h and
96 + h. So each nibble, taken from a stretch of words, gives consecutive inputs. At 8 bits word h of 64 holds inputs h and 64 + h;
inputs that do not fill their last run are bytes in order.

Programs of one column tile and different rows follow each other and find its weights in the second-level cache. Before a program
waits for its inputs it asks for the first of its weights and scales to be brought there.
"""

from __future__ import annotations

from .gemv import activate
from .triton_support import jit, release_dependents, tl, wait_for_inputs


@jit
def nibbles(words, PLACE: tl.constexpr, BRAIN: tl.constexpr, PACKED: tl.constexpr):
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
def signed_bytes(words, PLACE: tl.constexpr, BRAIN: tl.constexpr, PACKED: tl.constexpr):
    """Returns the half-precision numbers of one of the two signed bytes of int16 words; PACKED as for `nibbles`."""
    if not PACKED:
        numbers = (((words >> (8 * PLACE)) & 255) ^ 128).to(tl.float32) - 128.0
        result = numbers.to(tl.bfloat16 if BRAIN else tl.float16)
    else:
        SHIFT: tl.constexpr = "mov.b32 t, $1;" if PLACE == 0 else "shr.u32 t, $1, 8;"
        # The lower seven bits and 128, minus 128 or, where the sign bit raises the exponent, 256; or 1024 and the byte with its
        # sign turned over, minus 1152.
        END: tl.constexpr = (
            "lop3.b32 u, t, 0x007F007F, 0x43004300, 0xEA; lop3.b32 t, t, 0x00800080, 0x43004300, 0xEA;"
            "mov.b32 v, 0xBF80BF80; fma.rn.bf16x2 $0, t, v, u; }" if BRAIN else
            "lop3.b32 t, t, 0x00FF00FF, 0x64806480, 0x6A; mov.b32 u, 0x64806480; sub.f16x2 $0, t, u; }"
        )  # fmt: skip
        asm: tl.constexpr = "{ .reg .b32 t, u, v;" + SHIFT + END
        result = tl.inline_asm_elementwise(
            asm, "=r,r", [words], dtype=tl.bfloat16 if BRAIN else tl.float16, is_pure=True, pack=2
        )
    return result


@jit
def _quarter(words, zero, PLACE: tl.constexpr, ZERO: tl.constexpr, BRAIN: tl.constexpr, PACKED: tl.constexpr):
    """Returns the half-precision numbers of a quarter of a run; with zero points (columns, 1) by plain operations."""
    if ZERO:
        numbers = ((words >> (4 * PLACE)) & 15).to(tl.float32) - zero
        result = numbers.to(tl.bfloat16 if BRAIN else tl.float16)
    else:
        result = nibbles(words, PLACE, BRAIN, PACKED)
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


@jit
def _add_run8(total, words, first, second, PAIRED: tl.constexpr, PACKED: tl.constexpr):
    """Returns (columns, rows) totals with the products of a run of bytes added; `second`: its later half where `PAIRED`."""
    BRAIN: tl.constexpr = first.dtype == tl.bfloat16
    if PAIRED:
        total = tl.dot(signed_bytes(words, 0, BRAIN, PACKED), first, total)
        total = tl.dot(signed_bytes(words, 1, BRAIN, PACKED), second, total)
    else:
        total = tl.dot(words.to(tl.float32).to(first.dtype), first, total)
    return total


@jit
def _prefetch(pointers):
    """Asks for the cache lines at pointers to be brought to the second-level cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64, bitcast=True)], dtype=tl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@jit
def _add_joined(total, words, inputs, scale, BITS: tl.constexpr, PACKED: tl.constexpr):
    """Returns (columns, rows) totals with the scaled products of a run added, in one go with its (128, rows) inputs.

    In the layout that Hopper's tensor cores take weights in, joining the fields renames registers. At 8 bits as well the sum is
    scaled after every run: a product that starts from a total would be cut in parts, each of them waited for.
    """
    BRAIN: tl.constexpr = inputs.dtype == tl.bfloat16
    if BITS == 4:
        earlier = tl.join(nibbles(words, 0, BRAIN, PACKED), nibbles(words, 1, BRAIN, PACKED))
        later = tl.join(nibbles(words, 2, BRAIN, PACKED), nibbles(words, 3, BRAIN, PACKED))
        numbers = tl.permute(tl.join(earlier, later), (0, 3, 2, 1))
    else:
        numbers = tl.permute(
            tl.join(signed_bytes(words, 0, BRAIN, PACKED), signed_bytes(words, 1, BRAIN, PACKED)), (0, 2, 1)
        )
    numbers = tl.reshape(numbers, (words.shape[0], 128))
    return total + tl.dot(numbers, inputs) * scale.to(tl.float32)[:, None]


@jit
def _lines(pointer, outputs, length, start, past, COUNT: tl.constexpr):
    """Returns pointers to the first few cache lines of elements `start` to `past` of outputs that have `length` elements."""
    LINE: tl.constexpr = 128 // (pointer.dtype.element_ty.primitive_bitwidth // 8)
    # Clamped instead of masked: the instruction takes no mask.
    line = tl.minimum(start + tl.arange(0, COUNT) * LINE, past - 1)
    return pointer + outputs.to(tl.int64)[:, None] * length + line[None, :]


@jit(do_not_specialize=["rows", "splits"])  # so that one compilation serves every number
def quantized_rows_kernel(  # noqa: C901 - one kernel; its branches are compile-time
    input_ptr, weight_ptr, scale_ptr, zero_ptr, bias_ptr, residual_ptr, output_ptr, partial_ptr, arrival_ptr,
    rows, columns, inner, runs, splits,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, DIVIDED: tl.constexpr, TOGETHER: tl.constexpr, JOIN: tl.constexpr,
    PARTS: tl.constexpr, BITS: tl.constexpr, PAIRED: tl.constexpr, ZERO: tl.constexpr, GROUPED: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Computes one tile of outputs; the runs are divided among `splits` programs, and the last to arrive adds up in order.

    `weight_ptr` holds int16 words, or bytes at 8 bits where not `PAIRED`. `MASKED`: outputs or inputs do not divide into blocks
    and runs. `PARTS`: groups in a run. `TOGETHER`: partial sums of how many programs are on their way at once. `JOIN`: where
    Hopper's tensor cores take the tile and a run has one group, it is multiplied in one go.
    """
    release_dependents(PDL)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    split = tl.program_id(2)
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    share = tl.cdiv(runs, splits)
    start, past = split * share, tl.minimum((split + 1) * share, runs)
    valid = column < columns
    rows_in = row < rows
    inputs = input_ptr + row.to(tl.int64)[None, :] * inner
    total = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), dtype=tl.float32)
    factor = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), dtype=tl.float32)
    groups = runs * PARTS if GROUPED else 1
    WIDTH: tl.constexpr = 32 if BITS == 4 else (64 if PAIRED else 128)
    length = runs * WIDTH if BITS == 4 or PAIRED else inner
    JOINED: tl.constexpr = JOIN and (PDL or not PACKED) and PARTS == 1 and not ZERO and (BITS == 4 or PAIRED)
    stretch = tl.arange(0, WIDTH)
    weights = weight_ptr + column.to(tl.int64)[:, None] * length + stretch[None, :]
    factors = weight_ptr + (column + columns).to(tl.int64)[:, None] * length + stretch[None, :]
    if PDL and PACKED and (BITS == 4 or PAIRED):
        begin = tl.minimum(start, runs - 1)
        end = tl.maximum(past, begin + 1)
        for half in tl.static_range(2 if GATED else 1):
            known = tl.minimum(column, columns - 1) + half * columns
            _prefetch(_lines(weight_ptr, known, length, begin * WIDTH, end * WIDTH, 4))
            if GROUPED:
                _prefetch(_lines(scale_ptr, known, groups, begin * PARTS, end * PARTS, 2))
            elif not JOINED:
                _prefetch(scale_ptr + known)
    if JOINED and not GROUPED:
        scale = _columns(scale_ptr + column, valid, MASKED)
        if GATED:
            factor_scale = _columns(scale_ptr + column + columns, valid, MASKED)
    wait_for_inputs(PDL)
    for run in range(start, past):
        at = run * 128 + (tl.arange(0, 128) if JOINED else stretch)
        first = _inputs(inputs, at, inner, rows_in[None, :], MASKED)
        if JOINED:
            words = _columns(weights + run * WIDTH, valid[:, None], MASKED)
            if GROUPED:
                scale = _columns(scale_ptr + column * groups + run, valid, MASKED)
            total = _add_joined(total, words, first, scale, BITS, PACKED)
            if GATED:
                words = _columns(factors + run * WIDTH, valid[:, None], MASKED)
                if GROUPED:
                    factor_scale = _columns(scale_ptr + (column + columns) * groups + run, valid, MASKED)
                factor = _add_joined(factor, words, first, factor_scale, BITS, PACKED)
        elif BITS == 4:
            second = _inputs(inputs, at + 32, inner, rows_in[None, :], MASKED)
            third = _inputs(inputs, at + 64, inner, rows_in[None, :], MASKED)
            fourth = _inputs(inputs, at + 96, inner, rows_in[None, :], MASKED)
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
            second = first
            within = valid[:, None]
            if PAIRED:
                second = _inputs(inputs, at + 64, inner, rows_in[None, :], MASKED)
            else:
                within = within & (at < inner)[None, :]
            words = _columns(weights + run * WIDTH, within, MASKED)
            total = _add_run8(total, words, first, second, PAIRED, PACKED)
            if GATED:
                words = _columns(factors + run * WIDTH, within, MASKED)
                factor = _add_run8(factor, words, first, second, PAIRED, PACKED)
    # From here on with an output's neighbours next to each other, as they are written.
    total = tl.trans(total)
    factor = tl.trans(factor)
    inside = rows_in[:, None] & valid[None, :]
    complete = True
    if DIVIDED:
        size: tl.constexpr = BLOCK_COLUMNS * BLOCK_ROWS
        width: tl.constexpr = size * (2 if GATED else 1)
        cell = tl.arange(0, BLOCK_ROWS)[:, None] * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
        mine = partial_ptr + (tile * splits + split) * width
        tl.store(mine + cell, total, mask=rows_in[:, None])
        if GATED:
            tl.store(mine + size + cell, factor, mask=rows_in[:, None])
        tl.debug_barrier()
        complete = tl.atomic_add(arrival_ptr + tile, 1, sem="acq_rel") == splits - 1
        if complete:
            tl.store(arrival_ptr + tile, 0)
            total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
            factor = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
            for other in tl.range(0, splits, loop_unroll_factor=TOGETHER):
                theirs = partial_ptr + (tile * splits + other) * width
                total += tl.load(theirs + cell, mask=rows_in[:, None], other=0.0, cache_modifier=".cg")
                if GATED:
                    factor += tl.load(
                        theirs + size + cell, mask=rows_in[:, None], other=0.0, cache_modifier=".cg"
                    )
    if complete:
        if not (GROUPED or JOINED):
            total *= tl.load(scale_ptr + column, mask=valid, other=0.0)[None, :]
            if GATED:
                factor *= tl.load(scale_ptr + column + columns, mask=valid, other=0.0)[None, :]
        if HAS_BIAS:
            total += tl.load(bias_ptr + column, mask=valid, other=0.0).to(tl.float32)[None, :]
        total = activate(total, ACTIVATION)
        if GATED:
            total = total * factor
        place = row.to(tl.int64)[:, None] * columns + column[None, :]
        if HAS_RESIDUAL:
            total += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(output_ptr + place, total.to(output_ptr.dtype.element_ty), mask=inside)
