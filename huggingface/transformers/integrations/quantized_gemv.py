"""The kernel behind `quantized_linear.py` for one row in the formats and sizes that `quantized_row_mma.py` does not take.

Converting an integer to a float is four times as slow as adding two of them, and at 4 bits the arithmetic takes as long as the
memory: the loop has 4.7, 3.8 or 3.4 instructions a weight with two, four or eight outputs a program (groups of 128, compiled for
sm_90). So nothing is converted. A field of k bits put at the top of a
float32's mantissa, under the exponent of one, *is* the number 1 + q / 2^k: a shift, one logical instruction, and the number is
multiplied with its input. What that adds to the sum, the sum of the inputs, is taken off once for each 16 bytes of weights::

    sum (q - zero) x  =  2^k (sum (1 + q / 2^k) x  -  sum x)  -  zero sum x

At 4 bits two neighbouring fields share a shift; the lower one is then q / 256, so its inputs are multiplied with 16 beforehand.
Rounding stays far below half precision's: the mantissa has 24 bits, and a sum loses at most 8 of them.

A thread reads weights 16 bytes at a time (a *piece*: 32 inputs at 4 bits, 16 at 8) of several outputs, so that inputs are
prepared once for all of them. The first pieces are asked for before the kernel in front has finished.
"""

from __future__ import annotations

from .gemv import activate
from .triton_support import jit, release_dependents, tl, wait_for_inputs


@jit
def _field(words, LEFT: tl.constexpr, MASK: tl.constexpr, one):
    """Returns the float32 that a field of words becomes in a mantissa; LEFT below 0 shifts right."""
    moved = words << LEFT if LEFT >= 0 else words >> -LEFT
    return ((moved & MASK) ^ one).to(tl.float32, bitcast=True)


@jit
def half_pair(words, BRAIN: tl.constexpr):
    """Returns the float32 values of the two half-precision numbers in each int32, the lower one first."""
    if BRAIN:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@jit
def _load(pointers, valid, other, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=valid, other=other)
    return tl.load(pointers)


@jit
def _weights(weight_ptr, place, valid, MASKED: tl.constexpr):
    """Returns (pieces, columns, 4) int32 weights."""
    at = place[:, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    if MASKED:
        return tl.load(weight_ptr + at, mask=valid[:, :, None], other=0, eviction_policy="evict_first")
    return tl.load(weight_ptr + at, eviction_policy="evict_first")


@jit
def _inputs(row_ptr, piece, known, BITS: tl.constexpr, BRAIN: tl.constexpr, MASKED: tl.constexpr):
    """Returns the (pieces, 1, 4) float32 inputs of each field of a piece's words, in the order of the fields' places.

    An element of `row_ptr` holds two inputs. What shares 16 bits lies 32 inputs apart at 4 bits, 64 at 8.
    """
    word = tl.arange(0, 4)[None, None, :]
    if BITS == 8:
        at = row_ptr + (piece // 8 * 64 + piece % 8 * 4)[:, None, None] + word
        first, third = half_pair(_load(at, known[:, None, None], 0, MASKED), BRAIN)
        second, fourth = half_pair(_load(at + 32, known[:, None, None], 0, MASKED), BRAIN)
        found = (first, second, third, fourth)
    else:
        at = row_ptr + (piece // 4 * 64 + piece % 4 * 4)[:, None, None] + word
        low0, high0 = half_pair(_load(at, known[:, None, None], 0, MASKED), BRAIN)
        low1, high1 = half_pair(_load(at + 16, known[:, None, None], 0, MASKED), BRAIN)
        low2, high2 = half_pair(_load(at + 32, known[:, None, None], 0, MASKED), BRAIN)
        low3, high3 = half_pair(_load(at + 48, known[:, None, None], 0, MASKED), BRAIN)
        found = (low0, low1, low2, low3, high0, high1, high2, high3)
    return found


@jit
def _scaled_inputs(inputs, BITS: tl.constexpr):
    """Returns the inputs as the fields meet them: those of the lower of two fields that share a shift times 16."""
    scaled = inputs
    if BITS == 4:
        scaled = (
            inputs[0] * 16.0, inputs[1], inputs[2] * 16.0, inputs[3],
            inputs[4] * 16.0, inputs[5], inputs[6] * 16.0, inputs[7],
        )  # fmt: skip
    return scaled


@jit
def _quarters(words, x, one, PART: tl.constexpr, PARTS: tl.constexpr):
    """Returns (pieces, columns) sums over a part of the four quarters of a run, of 4-bit fields times inputs."""
    LOW: tl.constexpr = 0x00078000
    HIGH: tl.constexpr = 0x00780000
    if PARTS == 4:
        if PART == 0:
            total = _field(words, 15, LOW, one) * x[0] + _field(words, -1, LOW, one) * x[4]
        elif PART == 1:
            total = _field(words, 15, HIGH, one) * x[1] + _field(words, -1, HIGH, one) * x[5]
        elif PART == 2:
            total = _field(words, 7, LOW, one) * x[2] + _field(words, -9, LOW, one) * x[6]
        else:
            total = _field(words, 7, HIGH, one) * x[3] + _field(words, -9, HIGH, one) * x[7]
    else:
        if PARTS == 1 or PART == 0:
            total = _field(words, 15, LOW, one) * x[0]
            total += _field(words, 15, HIGH, one) * x[1]
            total += _field(words, -1, LOW, one) * x[4]
            total += _field(words, -1, HIGH, one) * x[5]
        else:
            total = _field(words, 7, LOW, one) * x[2]
            total += _field(words, 7, HIGH, one) * x[3]
            total += _field(words, -9, LOW, one) * x[6]
            total += _field(words, -9, HIGH, one) * x[7]
        if PARTS == 1:
            total += _field(words, 7, LOW, one) * x[2]
            total += _field(words, 7, HIGH, one) * x[3]
            total += _field(words, -9, LOW, one) * x[6]
            total += _field(words, -9, HIGH, one) * x[7]
    return tl.sum(total, 2)


@jit
def _bytes(words, x, one):
    """Returns (pieces, columns) sums of signed bytes, each with 128 added, times inputs."""
    MASK: tl.constexpr = 0x007F8000
    one = one ^ 0x00400000  # turns the sign of a byte over
    total = _field(words, 15, MASK, one) * x[0]
    total += _field(words, 7, MASK, one) * x[1]
    total += _field(words, -1, MASK, one) * x[2]
    total += _field(words, -9, MASK, one) * x[3]
    return tl.sum(total, 2)


@jit
def _part_sums(x, PART: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr):
    """Returns (pieces, 1) sums of a part's inputs: of those times 16, of the others (4 bits), or of all (8 bits) and 0."""
    if BITS == 8:
        even = (x[0] + x[1]) + (x[2] + x[3])
        odd = x[0] * 0.0
    elif PARTS == 4:
        even = (x[PART] + x[PART + 4]) * (1 - PART % 2)
        odd = (x[PART] + x[PART + 4]) * (PART % 2)
    elif PARTS == 2:
        even = x[2 * PART] + x[2 * PART + 4]
        odd = x[2 * PART + 1] + x[2 * PART + 5]
    else:
        even = (x[0] + x[2]) + (x[4] + x[6])
        odd = (x[1] + x[3]) + (x[5] + x[7])
    return tl.sum(even, 2), tl.sum(odd, 2)


@jit
def _products(
    words, first_scale, raw, scaled, one, scale_ptr, zero_ptr, group, valid,
    PARTS: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, GROUPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Returns (pieces, columns) products of a chunk, multiplied with its scales where it is grouped, over 2^k."""
    total = tl.zeros_like(first_scale)
    for part in tl.static_range(PARTS):
        even, odd = _part_sums(raw, part, PARTS, BITS)
        if BITS == 8:
            partial = _bytes(words, scaled, one) - 1.5 * even
        else:
            partial = _quarters(words, scaled, one, part, PARTS)
            if ZERO:
                zero = _load(zero_ptr + group + part, valid, 0, MASKED).to(tl.float32)
                partial = partial - (16.0 * even + odd) - zero * (0.0625 * (even + odd))
            else:
                partial = partial - (16.5 * even + 1.5 * odd)
        if GROUPED:
            scale = first_scale
            if part > 0:
                scale = _load(scale_ptr + group + part, valid, 0.0, MASKED).to(tl.float32)
            total += partial * scale
        else:
            total += partial
    return total


@jit
def quantized_row_kernel(  # noqa: C901 - one kernel; its branches are compile-time
    row_ptr, weight_ptr, scale_ptr, zero_ptr, bias_ptr, residual_ptr, output_ptr,
    columns, pieces, one,
    BLOCK_COLUMNS: tl.constexpr, BLOCK_PIECES: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr,
    GROUPED: tl.constexpr, MASKED: tl.constexpr, AHEAD: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Computes `BLOCK_COLUMNS` outputs of one row.

    `row_ptr` holds two inputs an element, `weight_ptr` int32 words, `pieces` of four words an output.
    `MASKED`: outputs or pieces do not divide into blocks. `PARTS`: groups among 128 inputs. `AHEAD`: a chunk is loaded while the
    one before it is computed. `one`: the bits of 1.0, an argument because a constant would take the instruction's only place for
    one, the mask's.
    """
    release_dependents(PDL)
    BRAIN: tl.constexpr = output_ptr.dtype.element_ty == tl.bfloat16
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < columns
    piece = tl.arange(0, BLOCK_PIECES)
    known = piece < pieces
    valid = known[:, None] & inside[None, :]
    place = column.to(tl.int64)[None, :] * pieces
    groups = pieces // 4 * PARTS
    group = (piece // 4 * PARTS)[:, None] + column[None, :] * groups
    words = _weights(weight_ptr, place + piece[:, None], valid, MASKED)
    scale = tl.full((BLOCK_PIECES, BLOCK_COLUMNS), 1.0, tl.float32)
    if GROUPED:
        scale = _load(scale_ptr + group, valid, 0.0, MASKED).to(tl.float32)
    factor_words, factor_scale = words, scale
    if GATED:
        factors = (column + columns).to(tl.int64)[None, :] * pieces
        factor_group = group + columns * groups
        factor_words = _weights(weight_ptr, factors + piece[:, None], valid, MASKED)
        if GROUPED:
            factor_scale = _load(scale_ptr + factor_group, valid, 0.0, MASKED).to(tl.float32)
    wait_for_inputs(PDL)
    total = tl.zeros((BLOCK_PIECES, BLOCK_COLUMNS), dtype=tl.float32)
    factor = tl.zeros((BLOCK_PIECES, BLOCK_COLUMNS), dtype=tl.float32)
    for start in range(0, pieces, BLOCK_PIECES):
        here = start + piece
        known = here < pieces
        valid = known[:, None] & inside[None, :]
        now = group + start // 4 * PARTS
        raw = _inputs(row_ptr, here, known, BITS, BRAIN, MASKED)
        if AHEAD:
            # The next chunk is on its way while this one is computed.
            then = here + BLOCK_PIECES
            there = (then < pieces)[:, None] & inside[None, :]
            next_words = _weights(weight_ptr, place + then[:, None], there, True)
            next_scale = scale
            if GROUPED:
                next_scale = _load(scale_ptr + now + BLOCK_PIECES // 4 * PARTS, there, 0.0, True).to(
                    tl.float32
                )
            if GATED:
                next_factor_words = _weights(weight_ptr, factors + then[:, None], there, True)
                next_factor_scale = factor_scale
                if GROUPED:
                    beyond = factor_group + (start + BLOCK_PIECES) // 4 * PARTS
                    next_factor_scale = _load(scale_ptr + beyond, there, 0.0, True).to(tl.float32)
        elif start > 0:
            words = _weights(weight_ptr, place + here[:, None], valid, MASKED)
            if GROUPED:
                scale = _load(scale_ptr + now, valid, 0.0, MASKED).to(tl.float32)
            if GATED:
                factor_words = _weights(weight_ptr, factors + here[:, None], valid, MASKED)
                if GROUPED:
                    factor_scale = _load(
                        scale_ptr + factor_group + start // 4 * PARTS, valid, 0.0, MASKED
                    ).to(tl.float32)
        scaled = _scaled_inputs(raw, BITS)
        total += _products(
            words,
            scale,
            raw,
            scaled,
            one,
            scale_ptr,
            zero_ptr,
            now,
            valid,
            PARTS,
            BITS,
            ZERO,
            GROUPED,
            MASKED,
        )
        if GATED:
            factor += _products(
                factor_words, factor_scale, raw, scaled, one, scale_ptr, zero_ptr,
                factor_group + start // 4 * PARTS, valid, PARTS, BITS, ZERO, GROUPED, MASKED,
            )  # fmt: skip
        if AHEAD:
            words, scale = next_words, next_scale
            if GATED:
                factor_words, factor_scale = next_factor_words, next_factor_scale
    UNIT: tl.constexpr = 256.0 if BITS == 8 else 16.0
    result = tl.sum(total, 0) * UNIT
    if not GROUPED:
        result *= tl.load(scale_ptr + column, mask=inside, other=0.0)
    if HAS_BIAS:
        result += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    result = activate(result, ACTIVATION)
    if GATED:
        other = tl.sum(factor, 0) * UNIT
        if not GROUPED:
            other *= tl.load(scale_ptr + column + columns, mask=inside, other=0.0)
        result *= other
    if HAS_RESIDUAL:
        result += tl.load(residual_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(output_ptr + column, result.to(output_ptr.dtype.element_ty), mask=inside)
