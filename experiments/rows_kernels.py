"""Rows times packed weights without shared memory: weights pass from memory through registers to the tensor core.

The tensor core's left operand wants, of each weight row, 8 consecutive inputs in a thread where the inner dimension is ordered by
`DotOperandLayout(k_width=8)`; four threads hold 32. Packed words lie just so: 16 bytes of a thread are 8 words, whose nibbles p are
inputs 32 p + 8 t to 32 p + 8 t + 7 of a run. So nothing moves between threads. The inputs' layout is the same, 16 bytes a thread.

Each warp has its own slice of the inner dimension (the batch dimension of the product); the slices are added at the end.
"""

from __future__ import annotations

from experiments.layouts import gl, layout_jit, mma_v2, tl, word_layout


@layout_jit
def _fields(words, PLACE: tl.constexpr, BITS: tl.constexpr, BRAIN: tl.constexpr, PACKED: tl.constexpr):
    if not PACKED:
        if BITS == 4:
            numbers = (((words >> (4 * PLACE)) & 15) - 8).to(gl.float32)
        else:
            numbers = (((words >> (8 * PLACE)) & 255) ^ 128).to(gl.float32) - 128.0
        result = numbers.to(gl.bfloat16 if BRAIN else gl.float16)
    else:
        AT: tl.constexpr = PLACE * BITS
        SHIFT: tl.constexpr = (
            "mov.b32 t, $1;" if AT == 0 else
            "shr.u32 t, $1, 4;" if AT == 4 else
            "shr.u32 t, $1, 8;" if AT == 8 else
            "shr.u32 t, $1, 12;"
        )  # fmt: skip
        END: tl.constexpr = (
            (
                "lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA; mov.b32 u, 0x3F803F80; mov.b32 v, 0xC308C308;"
                "fma.rn.bf16x2 $0, t, u, v; }" if BRAIN else
                "lop3.b32 t, t, 0x000F000F, 0x64006400, 0xEA; mov.b32 u, 0x64086408; sub.f16x2 $0, t, u; }"
            ) if BITS == 4 else (
                "lop3.b32 u, t, 0x007F007F, 0x43004300, 0xEA; lop3.b32 t, t, 0x00800080, 0x43004300, 0xEA;"
                "mov.b32 v, 0xBF80BF80; fma.rn.bf16x2 $0, t, v, u; }" if BRAIN else
                "lop3.b32 t, t, 0x00FF00FF, 0x64806480, 0x6A; mov.b32 u, 0x64806480; sub.f16x2 $0, t, u; }"
            )
        )  # fmt: skip
        asm: tl.constexpr = "{ .reg .b32 t, u, v;" + SHIFT + END
        result = gl.inline_asm_elementwise(
            asm, "=r,r", [words], dtype=gl.bfloat16 if BRAIN else gl.float16, is_pure=True, pack=2
        )
    return result


@layout_jit
def _operand(
    words, FIRST: tl.constexpr, BITS: tl.constexpr, BRAIN: tl.constexpr, PACKED: tl.constexpr, layout: tl.constexpr
):
    """Returns (slices, columns, 64) numbers, the left operand, of two fields of (slices, columns, 32) words."""
    low = _fields(words, FIRST, BITS, BRAIN, PACKED)
    high = _fields(words, FIRST + 1, BITS, BRAIN, PACKED)
    both = gl.permute(gl.join(low, high), (0, 1, 3, 2))
    both = gl.reshape(both, [words.shape[0], words.shape[1], 64])
    return gl.convert_layout(both, layout, assert_trivial=True)


@layout_jit
def _asked_words(weight_ptr, at, on, R: tl.constexpr, BITS: tl.constexpr, MASKED: tl.constexpr):
    """Returns a tuple of the words of R runs of each slice: one tensor a run at 4 bits, two at 8."""
    found = ()
    for r in gl.static_range(R * BITS // 4):
        if MASKED:
            found = found + (gl.load(weight_ptr + at + r * 32, mask=on, other=0, eviction_policy="evict_first"),)
        else:
            found = found + (gl.load(weight_ptr + at + r * 32, eviction_policy="evict_first"),)
    return found


@layout_jit
def _asked_scales(scale_ptr, at, on, R: tl.constexpr, GROUPED: tl.constexpr, MASKED: tl.constexpr):
    found = ()
    for r in gl.static_range(R if GROUPED else 0):
        if MASKED:
            found = found + (gl.load(scale_ptr + at + r, mask=on, other=0.0),)
        else:
            found = found + (gl.load(scale_ptr + at + r),)
    return found


@layout_jit
def _asked_inputs(input_ptr, at, BITS: tl.constexpr):
    """Returns the two right operands of a run of each slice."""
    first = gl.load(input_ptr + at)
    second = gl.load(input_ptr + at + (64 if BITS == 4 else 32))
    return first, second


@layout_jit
def _operands(words, second_words, BITS: tl.constexpr, BRAIN: tl.constexpr, PACKED: tl.constexpr, a_layout: tl.constexpr):
    """Returns the two left operands of a run of each slice."""
    first = _operand(words, 0, BITS, BRAIN, PACKED, a_layout)
    if BITS == 4:
        second = _operand(words, 2, BITS, BRAIN, PACKED, a_layout)
    else:
        second = _operand(second_words, 0, BITS, BRAIN, PACKED, a_layout)
    return first, second


@layout_jit
def _add_run(total, numbers, more_numbers, scale, first, second, GROUPED: tl.constexpr, mma: tl.constexpr):
    part = total
    if GROUPED:
        part = gl.zeros([total.shape[0], total.shape[1], total.shape[2]], gl.float32, mma)
    part = mma_v2(numbers, first, part)
    part = mma_v2(more_numbers, second, part)
    if GROUPED:
        part = total + part * gl.expand_dims(scale.to(gl.float32), 2)
    return part


@layout_jit
def _activate(value, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        value = 0.5 * value * (2.0 - 2.0 / (1.0 + gl.exp(2.0 * inner)))
    if ACTIVATION == 2:
        value = value / (1.0 + gl.exp(-value))
    return value


@layout_jit(do_not_specialize=["rows", "splits", "steps"])
def fragment_kernel(  # noqa: C901
    input_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr, output_ptr, partial_ptr, arrival_ptr,
    rows, columns, runs, splits, steps,
    N: tl.constexpr, B: tl.constexpr, M: tl.constexpr, S: tl.constexpr, WM: tl.constexpr, R: tl.constexpr,
    AHEAD: tl.constexpr, MORE: tl.constexpr, BITS: tl.constexpr, GROUPED: tl.constexpr, DIVIDED: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    PACKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """B blocks of N rows and M columns; S slices of the inner dimension, each of R runs at a time, by S * WM warps.

    `MORE`: steps > 1. `AHEAD`: blocks of inputs, of a row block and a run, that are asked for before they are needed.
    Rows and columns that are none are computed like the last one and not written.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    BRAIN: tl.constexpr = output_ptr.dtype.element_ty == gl.bfloat16
    mma: tl.constexpr = gl.NVMMADistributedLayout([2, 0], [S, WM, 1], [1, 16, 8])
    a_layout: tl.constexpr = gl.DotOperandLayout(0, mma, 8)
    b_layout: tl.constexpr = gl.DotOperandLayout(1, mma, 8)
    w_layout: tl.constexpr = word_layout(S, M, WM)
    s_layout: tl.constexpr = gl.SliceLayout(2, mma)
    W: tl.constexpr = 32 if BITS == 4 else 64
    tile = gl.program_id(1) * gl.num_programs(0) + gl.program_id(0)
    split = gl.program_id(2)
    begin = split * steps * (S * R)  # a program's runs; those of a step: slice by slice
    length = runs * W

    slice_w = gl.arange(0, S, gl.SliceLayout(1, gl.SliceLayout(2, w_layout)))[:, None, None]
    column_w = gl.program_id(1) * M + gl.arange(0, M, gl.SliceLayout(0, gl.SliceLayout(2, w_layout)))[None, :, None]
    word_w = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, w_layout)))[None, None, :]
    at_w = gl.minimum(column_w, columns - 1) * length + (begin + slice_w * R) * W + word_w
    slice_s = gl.arange(0, S, gl.SliceLayout(1, s_layout))[:, None]
    column_s = gl.program_id(1) * M + gl.arange(0, M, gl.SliceLayout(0, s_layout))[None, :]
    at_s = gl.minimum(column_s, columns - 1) * runs + begin + slice_s * R
    other_w = at_w + columns * length
    other_s = at_s + columns * runs

    words = _asked_words(weight_ptr, at_w, True, R, BITS, False)
    factor_words = words
    if GATED:
        factor_words = _asked_words(weight_ptr, other_w, True, R, BITS, False)
    scales = _asked_scales(scale_ptr, at_s, True, R, GROUPED, False)
    factor_scales = scales
    if GATED:
        factor_scales = _asked_scales(scale_ptr, other_s, True, R, GROUPED, False)

    slice_b = gl.arange(0, S, gl.SliceLayout(1, gl.SliceLayout(2, b_layout)))[:, None, None]
    inner_b = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(2, b_layout)))[None, :, None]
    row_b = gl.program_id(0) * (N * B) + gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(1, b_layout)))[None, None, :]
    if BITS == 8:
        inner_b = inner_b // 32 * 64 + inner_b % 32
    inner_b = (begin + slice_b * R) * 128 + inner_b
    at_b = ()
    totals = ()
    factors = ()
    for b in gl.static_range(B):
        at_b = at_b + (gl.minimum(row_b + b * N, rows - 1) * (runs * 128) + inner_b,)
        totals = totals + (gl.zeros([S, M, N], gl.float32, mma),)
        factors = factors + (gl.zeros([S, M, N], gl.float32, mma),)
    if PDL:
        tl.extra.cuda.gdc_wait()
    PER: tl.constexpr = BITS // 4
    moved = 0
    for step in range(steps if MORE else 1):
        inputs = ()
        for i in gl.static_range(AHEAD):
            inputs = inputs + (_asked_inputs(input_ptr, at_b[i % B] + (i // B * 128 + moved), BITS),)
        next_words = words
        next_scales = scales
        next_factor_words = factor_words
        next_factor_scales = factor_scales
        if MORE:
            at_w += S * R * W
            at_s += S * R
            on = step + 1 < steps
            next_words = _asked_words(weight_ptr, at_w, on, R, BITS, True)
            next_scales = _asked_scales(scale_ptr, at_s, on, R, GROUPED, True)
            if GATED:
                other_w += S * R * W
                other_s += S * R
                next_factor_words = _asked_words(weight_ptr, other_w, on, R, BITS, True)
                next_factor_scales = _asked_scales(scale_ptr, other_s, on, R, GROUPED, True)
        for r in gl.static_range(R):
            numbers, more_numbers = _operands(
                words[r * PER], words[r * PER + PER - 1], BITS, BRAIN, PACKED, a_layout
            )
            if GATED:
                factor_numbers, more_factor_numbers = _operands(
                    factor_words[r * PER], factor_words[r * PER + PER - 1], BITS, BRAIN, PACKED, a_layout
                )
            new_totals = ()
            new_factors = ()
            for b in gl.static_range(B):
                if r * B + b + AHEAD < R * B:
                    inputs = inputs + (
                        _asked_inputs(
                            input_ptr, at_b[(b + AHEAD) % B] + (((r * B + b + AHEAD) // B) * 128 + moved), BITS
                        ),
                    )
                first, second = inputs[r * B + b]
                new_totals = new_totals + (
                    _add_run(
                        totals[b], numbers, more_numbers, scales[r] if GROUPED else 1.0, first, second, GROUPED, mma
                    ),
                )
                if GATED:
                    new_factors = new_factors + (
                        _add_run(
                            factors[b], factor_numbers, more_factor_numbers, factor_scales[r] if GROUPED else 1.0,
                            first, second, GROUPED, mma,
                        ),
                    )  # fmt: skip
                else:
                    new_factors = new_factors + (factors[b],)
            totals = new_totals
            factors = new_factors
        moved += S * R * 128
        words = next_words
        scales = next_scales
        factor_words = next_factor_words
        factor_scales = next_factor_scales

    # Slices are added, then an output's neighbours lie next to each other, as they are written.
    all_layout: tl.constexpr = gl.BlockedLayout([S, M // 16 if M < 64 else 4, 1], [1, 16, 2], [1, 1, S * WM], [1, 2, 0])
    o_layout: tl.constexpr = gl.SliceLayout(0, all_layout)
    local = gl.arange(0, M, gl.SliceLayout(1, o_layout))
    local_row = gl.arange(0, N, gl.SliceLayout(0, o_layout))
    column = gl.program_id(1) * M + local
    valid = column < columns
    cell = local[:, None] + local_row[None, :] * M
    AREA: tl.constexpr = M * N
    WIDTH: tl.constexpr = AREA * B * (2 if GATED else 1)
    results = ()
    gates = ()
    for b in gl.static_range(B):
        results = results + (gl.sum(gl.convert_layout(totals[b], all_layout), 0),)
        if GATED:
            gates = gates + (gl.sum(gl.convert_layout(factors[b], all_layout), 0),)
    complete = True
    if DIVIDED:
        mine = partial_ptr + (tile * splits + split) * WIDTH
        for b in gl.static_range(B):
            inside = valid[:, None] & (gl.program_id(0) * (N * B) + b * N + local_row < rows)[None, :]
            gl.store(mine + b * AREA + cell, results[b], mask=inside)
            if GATED:
                gl.store(mine + (B + b) * AREA + cell, gates[b], mask=inside)
        gl.thread_barrier()
        complete = gl.atomic_add(arrival_ptr + tile, 1, sem="acq_rel") == splits - 1
        if complete:
            gl.store(arrival_ptr + tile, 0)
    if complete:
        for b in gl.static_range(B):
            row = gl.program_id(0) * (N * B) + b * N + local_row
            inside = valid[:, None] & (row < rows)[None, :]
            result = results[b]
            if GATED:
                gate = gates[b]
            if DIVIDED:
                result = gl.zeros([M, N], gl.float32, o_layout)
                if GATED:
                    gate = gl.zeros([M, N], gl.float32, o_layout)
                for other in range(splits):
                    theirs = partial_ptr + (tile * splits + other) * WIDTH + b * AREA
                    result += gl.load(theirs + cell, mask=inside, other=0.0, cache_modifier=".cg")
                    if GATED:
                        gate += gl.load(theirs + B * AREA + cell, mask=inside, other=0.0, cache_modifier=".cg")
            if not GROUPED:
                result *= gl.load(scale_ptr + column, mask=valid, other=0.0)[:, None]
                if GATED:
                    gate *= gl.load(scale_ptr + column + columns, mask=valid, other=0.0)[:, None]
            if HAS_BIAS:
                result += gl.load(bias_ptr + column, mask=valid, other=0.0).to(gl.float32)[:, None]
            result = _activate(result, ACTIVATION)
            if GATED:
                result = result * gate
            place = row[None, :] * columns + column[:, None]
            if HAS_RESIDUAL:
                result += gl.load(residual_ptr + place, mask=inside, other=0.0).to(gl.float32)
            gl.store(output_ptr + place, result.to(output_ptr.dtype.element_ty), mask=inside)
