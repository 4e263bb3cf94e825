"""Experiment: one row times 4-bit weights in groups of 128 on the tensor cores, straight from registers.

A lane holds 16 bytes (a piece) of each of four outputs, and the inputs of these. A tensor core's product of 16 rows, 8 columns and
16 in depth gives, for lanes 4 g + t, row g, g + 8 and column n, the sum over t of lane 4 g + t's weights times lane 4 n + t's inputs.
Its diagonal, n = g, is what is wanted: four neighbouring lanes' weights (of two outputs) times their own inputs, and these lanes share a
group. So weights lie as they lie in memory, inputs are not prepared at all, and a weight takes less than one instruction of the
slow kind (64 a cycle and multiprocessor) where float32 arithmetic takes one and a half.
"""

from __future__ import annotations

from huggingface.transformers.integrations.gemv import activate
from huggingface.transformers.integrations.triton_support import jit, release_dependents, tl, wait_for_inputs


def _asm(brain: bool) -> str:
    """Outputs 0-3: totals; 4-19: words of four outputs; 20-35: inputs of four quarters; 36-39 offset; 40-43 and 44-47 scales
    of two outputs each, held by lanes from 48-51 on; 52-55 totals."""
    kind = "bf16" if brain else "f16"
    lines = [
        "{ .reg .b32 a<8>; .reg .f32 c<8>, k<5>, s<4>; .reg .pred odd; .reg .u32 lane, from, w<2>; .reg .b16 h<4>;"
    ]
    lines += [f"mov.f32 c{i}, 0f00000000;" for i in range(8)]
    for j in (0, 2):  # two neighbouring words, whose inputs are neighbouring registers
        for p in range(4):
            for pair in range(2):
                regs = []
                for f in range(2):
                    for side in range(2):
                        word = f"${4 + 4 * (2 * pair + side) + j + f}"
                        r = f"a{4 * pair + 2 * f + side}"
                        if brain:  # 128 + q
                            if p:
                                lines.append(f"shr.u32 {r}, {word}, {4 * p};")
                            lines.append(f"lop3.b32 {r}, {r if p else word}, 0x000F000F, 0x43004300, 0xEA;")
                        else:  # 1 + q / 16
                            move = (
                                f"shl.b32 {r}, {word}, {6 - 4 * p};"
                                if p < 2
                                else f"shr.u32 {r}, {word}, {4 * p - 6};"
                            )
                            lines.append(move)
                            lines.append(f"lop3.b32 {r}, {r}, 0x03C003C0, 0x3C003C00, 0xEA;")
                        regs.append(r)
                acc = ", ".join(f"c{4 * pair + i}" for i in range(4))
                x0, x1 = (f"${20 + 4 * p + j + f}" for f in range(2))
                lines.append(
                    f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{{acc}}}, {{{', '.join(regs)}}}, {{{x0}, {x1}}}, {{{acc}}};"
                )
    lines.append(
        "mov.u32 lane, %laneid; shr.u32 from, lane, 2; add.u32 from, from, $48; shfl.sync.idx.b32 w0, $40, from, 31, -1;"
    )
    lines.append("shfl.sync.idx.b32 w1, $44, from, 31, -1; mov.b32 {h0, h1}, w0; mov.b32 {h2, h3}, w1;")
    lines += [f"cvt.f32.f16 s{i}, h{i};" for i in range(4)]
    lines.append("and.b32 lane, lane, 4; setp.ne.u32 odd, lane, 0; selp.f32 k4, $37, $36, odd;")
    for column in range(4):
        at = 4 * (column // 2) + 2 * (column % 2)
        lines.append(f"selp.f32 k{column}, c{at + 1}, c{at}, odd; add.f32 k{column}, k{column}, k4;")
        lines.append(f"fma.rn.f32 ${column}, k{column}, s{column}, ${52 + column};")
    return " ".join(lines) + " }"


def _bytes_asm(brain: bool) -> str:
    """Outputs 0-3: totals; 4-19: words of four outputs; 20-27: inputs of two halves; 28-31 totals. Bytes become whole numbers."""
    kind = "bf16" if brain else "f16"
    lines = ["{ .reg .b32 a<8>, t, one; .reg .f32 c<8>, k<4>; .reg .pred odd; .reg .u32 lane;"]
    lines += [f"mov.f32 c{i}, 0f00000000;" for i in range(8)]
    lines.append("mov.b32 one, 0xBF80BF80;" if brain else "mov.b32 one, 0x64806480;")
    for j in (0, 2):
        for p in range(2):
            for pair in range(2):
                regs = []
                for f in range(2):
                    for side in range(2):
                        word = f"${4 + 4 * (2 * pair + side) + j + f}"
                        r = f"a{4 * pair + 2 * f + side}"
                        if p:
                            lines.append(f"shr.u32 {r}, {word}, 8;")
                        source = r if p else word
                        if brain:  # seven bits and 128, minus 128 or 256
                            lines.append(f"lop3.b32 t, {source}, 0x00800080, 0x43004300, 0xEA;")
                            lines.append(f"lop3.b32 {r}, {source}, 0x007F007F, 0x43004300, 0xEA;")
                            lines.append(f"fma.rn.bf16x2 {r}, t, one, {r};")
                        else:
                            lines.append(
                                f"lop3.b32 {r}, {source}, 0x00FF00FF, 0x64806480, 0x6A; sub.f16x2 {r}, {r}, one;"
                            )
                        regs.append(r)
                acc = ", ".join(f"c{4 * pair + i}" for i in range(4))
                x0, x1 = (f"${20 + 4 * p + j + f}" for f in range(2))
                lines.append(
                    f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{{acc}}}, {{{', '.join(regs)}}}, {{{x0}, {x1}}}, {{{acc}}};"
                )
    lines.append("mov.u32 lane, %laneid; and.b32 lane, lane, 4; setp.ne.u32 odd, lane, 0;")
    for column in range(4):
        at = 4 * (column // 2) + 2 * (column % 2)
        lines.append(
            f"selp.f32 k{column}, c{at + 1}, c{at}, odd; add.f32 ${column}, k{column}, ${28 + column};"
        )
    return " ".join(lines) + " }"


def _offset_asm(brain: bool) -> str:
    kind = "bf16" if brain else "f16"
    constant = "0xC308C308" if brain else "0xBE00BE00"
    zeros = " ".join(f"mov.f32 c{i}, 0f00000000;" for i in range(8))
    lines = ["{ .reg .b32 a; .reg .f32 c<8>; mov.b32 a, " + constant + ";" + zeros]
    for j in range(2):
        for p in range(4):
            x0, x1 = (f"${4 + 4 * p + 2 * j + f}" for f in range(2))
            acc = ", ".join(f"c{4 * j + i}" for i in range(4))
            lines.append(
                f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{{acc}}}, {{a, a, a, a}}, {{{x0}, {x1}}}, {{{acc}}};"
            )
    lines += [f"add.f32 ${i}, c{i}, c{i + 4};" for i in range(4)]
    return " ".join(lines) + " }"


def _reduce_asm() -> str:
    lines = [
        "{ .reg .u32 lane, m, n; .reg .pred d, p, q; .reg .f32 s<4>, a, b, u, v; mov.u32 lane, %laneid;"
        "shr.u32 m, lane, 3; and.b32 n, lane, 3; setp.eq.u32 d, m, n;"
    ]
    lines += [f"selp.f32 s{i}, ${4 + i}, 0f00000000, d;" for i in range(4)]
    lines.append("and.b32 m, lane, 1; setp.ne.u32 p, m, 0; and.b32 m, lane, 2; setp.ne.u32 q, m, 0;")
    lines.append(
        "selp.f32 a, s2, s0, p; selp.f32 b, s3, s1, p; selp.f32 u, s0, s2, p; selp.f32 v, s1, s3, p;"
    )
    lines.append(
        "shfl.sync.bfly.b32 u, u, 1, 31, -1; shfl.sync.bfly.b32 v, v, 1, 31, -1; add.f32 a, a, u; add.f32 b, b, v;"
    )
    lines.append(
        "selp.f32 u, a, b, q; selp.f32 a, b, a, q; shfl.sync.bfly.b32 u, u, 2, 31, -1; add.f32 a, a, u;"
    )
    lines += [f"shfl.sync.bfly.b32 u, a, {step}, 31, -1; add.f32 a, a, u;" for step in (4, 8, 16)]
    lines.append("mov.f32 $0, a; mov.f32 $1, 0f00000000; mov.f32 $2, 0f00000000; mov.f32 $3, 0f00000000;")
    return " ".join(lines) + " }"


REDUCE_ASM = tl.constexpr(_reduce_asm())
BRAIN_ASM, HALF_ASM = tl.constexpr(_asm(True)), tl.constexpr(_asm(False))
BRAIN_OFFSET, HALF_OFFSET = tl.constexpr(_offset_asm(True)), tl.constexpr(_offset_asm(False))
BRAIN_BYTES, HALF_BYTES = tl.constexpr(_bytes_asm(True)), tl.constexpr(_bytes_asm(False))
BYTES_OPERANDS = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 24 + ["f"] * 4))
PRODUCT_OPERANDS = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 32 + ["f"] * 4 + ["r"] * 12 + ["f"] * 4))
OFFSET_OPERANDS = tl.constexpr(",".join(["=f"] * 4 + ["r"] * 16))


@jit
def _halves(words, BRAIN: tl.constexpr):
    if BRAIN:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@jit
def _plain(words, x, BRAIN: tl.constexpr):
    """Returns (pieces, 1) sums of q - 8 times inputs."""
    total = tl.zeros((words.shape[0], 4), tl.float32)
    for p in tl.static_range(4):
        low, high = _halves(x[p], BRAIN)
        total += (((words >> (4 * p)) & 15) - 8).to(tl.float32) * low
        total += (((words >> (4 * p + 16)) & 15) - 8).to(tl.float32) * high
    return tl.sum(total, 1)[:, None]


@jit
def _words(pointers, start, valid, STRIDE: tl.constexpr, MASKED: tl.constexpr):
    """Returns four outputs' (pieces, 4) words."""
    if MASKED:
        a = tl.load(pointers + start, mask=valid, other=0, eviction_policy="evict_first")
        b = tl.load(pointers + (start + STRIDE), mask=valid, other=0, eviction_policy="evict_first")
        c = tl.load(pointers + (start + 2 * STRIDE), mask=valid, other=0, eviction_policy="evict_first")
        d = tl.load(pointers + (start + 3 * STRIDE), mask=valid, other=0, eviction_policy="evict_first")
    else:
        a = tl.load(pointers + start, eviction_policy="evict_first")
        b = tl.load(pointers + (start + STRIDE), eviction_policy="evict_first")
        c = tl.load(pointers + (start + 2 * STRIDE), eviction_policy="evict_first")
        d = tl.load(pointers + (start + 3 * STRIDE), eviction_policy="evict_first")
    return a, b, c, d


@jit
def _scale(pointers, valid, COLUMN: tl.constexpr, GROUPS: tl.constexpr):
    """Returns an output's scales as the bits of int32."""
    loaded = tl.load(pointers + COLUMN * GROUPS, mask=valid, other=0.0)
    return loaded.to(tl.int16, bitcast=True).to(tl.int32)


@jit
def _scales(
    pointers, piece, NUMBER: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, PACKED: tl.constexpr
):
    """Returns scales of four outputs, two in an int32.

    PACKED: of four chunks from number `4 * NUMBER` on, lane 8 n + g of a warp holding group g of the warp's part of the n-th; else
    of chunk `NUMBER`.
    """
    GROUPS: tl.constexpr = PIECES // 4
    if PACKED:
        group = (4 * NUMBER + piece % 32 // 8) * (BLOCK // 4) + piece // 32 * 8 + piece % 8
    else:
        group = NUMBER * (BLOCK // 4) + piece // 4
    valid = (group < GROUPS)[:, None]
    at = pointers + group[:, None]
    first = (_scale(at, valid, 0, GROUPS) & 65535) | (_scale(at, valid, 1, GROUPS) << 16)
    return first, (_scale(at, valid, 2, GROUPS) & 65535) | (_scale(at, valid, 3, GROUPS) << 16)


@jit
def _inputs(pointers, start, valid, BITS: tl.constexpr, MASKED: tl.constexpr):
    """Returns a piece's inputs: of four quarters of a run, or of two halves."""
    APART: tl.constexpr = 16 if BITS == 4 else 32
    if MASKED:
        a = tl.load(pointers + start, mask=valid, other=0)
        b = tl.load(pointers + (start + APART), mask=valid, other=0)
    else:
        a = tl.load(pointers + start)
        b = tl.load(pointers + (start + APART))
    if BITS == 8:
        return a, b
    elif MASKED:
        return (
            a,
            b,
            tl.load(pointers + (start + 32), mask=valid, other=0),
            tl.load(pointers + (start + 48), mask=valid, other=0),
        )
    else:
        return a, b, tl.load(pointers + (start + 32)), tl.load(pointers + (start + 48))


@jit
def _chunk(
    near, far, piece, NUMBER: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, SETS: tl.constexpr
):
    """Returns the words of a chunk of four outputs, and of four others where SETS is 2."""
    MASKED: tl.constexpr = (NUMBER + 1) * BLOCK > PIECES
    valid = (piece + NUMBER * BLOCK < PIECES)[:, None]
    words = _words(near, NUMBER * BLOCK * 4, valid, PIECES * 4, MASKED)
    if SETS == 2:
        return words, _words(far, NUMBER * BLOCK * 4, valid, PIECES * 4, MASKED)
    else:
        return words, words


@jit
def _plain_bytes(words, x, BRAIN: tl.constexpr):
    total = tl.zeros((words.shape[0], 4), tl.float32)
    for p in tl.static_range(2):
        low, high = _halves(x[p], BRAIN)
        total += ((((words >> (8 * p)) & 255) ^ 128) - 128).to(tl.float32) * low
        total += ((((words >> (8 * p + 16)) & 255) ^ 128) - 128).to(tl.float32) * high
    return tl.sum(total, 1)[:, None]


@jit
def _add_bytes(total, words, x, BRAIN: tl.constexpr, PACKED: tl.constexpr):
    """Returns (pieces, 4) totals of four outputs with a chunk of bytes added."""
    if PACKED:
        total = tl.inline_asm_elementwise(
            BRAIN_BYTES if BRAIN else HALF_BYTES,
            BYTES_OPERANDS,
            [words[0], words[1], words[2], words[3], x[0], x[1], total],
            dtype=tl.float32,
            is_pure=False,
            pack=4,
        )
    else:
        column = tl.arange(0, 4)[None, :]
        total += tl.where(column == 0, _plain_bytes(words[0], x, BRAIN), 0.0)
        total += tl.where(column == 1, _plain_bytes(words[1], x, BRAIN), 0.0)
        total += tl.where(column == 2, _plain_bytes(words[2], x, BRAIN), 0.0)
        total += tl.where(column == 3, _plain_bytes(words[3], x, BRAIN), 0.0)
    return total


@jit
def _offset(x, BRAIN: tl.constexpr, PACKED: tl.constexpr):
    """Returns what a product's sums start from: inputs times what the fields have too much."""
    if PACKED:
        return tl.inline_asm_elementwise(
            BRAIN_OFFSET if BRAIN else HALF_OFFSET,
            OFFSET_OPERANDS,
            [x[0], x[1], x[2], x[3]],
            dtype=tl.float32,
            is_pure=False,
            pack=4,
        )
    return tl.zeros((x[0].shape[0], 4), tl.float32)


@jit
def _half(bits):
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@jit
def _add(total, words, scales, x, offset, NUMBER: tl.constexpr, BRAIN: tl.constexpr, PACKED: tl.constexpr):
    """Returns (pieces, 4) totals of four outputs with chunk `NUMBER` added; only lanes of the diagonal hold sums."""
    if PACKED:
        shape: tl.constexpr = [total.shape[0], 4]
        total = tl.inline_asm_elementwise(
            BRAIN_ASM if BRAIN else HALF_ASM,
            PRODUCT_OPERANDS,
            [
                words[0],
                words[1],
                words[2],
                words[3],
                x[0],
                x[1],
                x[2],
                x[3],
                offset,
                tl.broadcast_to(scales[0], shape),
                tl.broadcast_to(scales[1], shape),
                tl.full(shape, NUMBER % 4 * 8, tl.int32),
                total,
            ],
            dtype=tl.float32,
            is_pure=False,
            pack=4,
        )
    else:
        column = tl.arange(0, 4)[None, :]
        unit: tl.constexpr = 1.0 if BRAIN else 0.0625
        total += tl.where(column == 0, _plain(words[0], x, BRAIN) * _half(scales[0]), 0.0) * unit
        total += tl.where(column == 1, _plain(words[1], x, BRAIN) * _half(scales[0] >> 16), 0.0) * unit
        total += tl.where(column == 2, _plain(words[2], x, BRAIN) * _half(scales[1]), 0.0) * unit
        total += tl.where(column == 3, _plain(words[3], x, BRAIN) * _half(scales[1] >> 16), 0.0) * unit
    return total


@jit
def _reduced(total, PACKED: tl.constexpr):
    """Returns sums over the pieces of (pieces, 4) totals: (32,), in `_columns`' order; without asm (4,).

    Only lanes of the diagonal count. A lane and its neighbour keep two outputs each, then one: six exchanges instead of twenty.
    """
    if PACKED:
        total = tl.inline_asm_elementwise(
            REDUCE_ASM, "=&f,=&f,=&f,=&f,f,f,f,f", [total], dtype=tl.float32, is_pure=False, pack=4
        )
        total = tl.reshape(tl.sum(total, 1), (total.shape[0] // 32, 32))
    return tl.sum(total, 0)


@jit
def _columns(first, PACKED: tl.constexpr):
    """Returns the outputs that `_reduced` finds, and which of its elements hold one."""
    if PACKED:
        lane = tl.arange(0, 32)
        return first + (lane & 1) * 2 + (lane >> 1 & 1), lane < 4
    else:
        column = tl.arange(0, 4)
        return first + column, column < 4


@jit
def _extra(pointer, column, inside, GIVEN: tl.constexpr):
    """Returns the bias or residual of outputs, or 0; asked for early."""
    if GIVEN:
        return tl.load(pointer + column, mask=inside, other=0.0).to(tl.float32)
    else:
        return 0.0


@jit
def _bulk(pointer, BYTES: tl.constexpr):
    """Asks for a stretch of memory to be brought to the second-level cache; one thread does."""
    tl.inline_asm_elementwise(
        "{ .reg .u32 t; .reg .pred p; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2;"
        "mov.u32 $0, 0; }",
        "=r,l,r",
        [pointer.to(tl.int64, bitcast=True), BYTES],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@jit
def diagonal_row_kernel(
    row_ptr, weight_ptr, scale_ptr, zero_ptr, bias_ptr, residual_ptr, output_ptr, columns,
    BITS: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr, QUADS: tl.constexpr, DEPTH: tl.constexpr, PREFETCH: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Computes 4 * QUADS outputs (QUADS is 1 where gated). BLOCK: pieces read at a time, 32 a warp. DEPTH: chunks in flight."""
    release_dependents(PDL)
    BRAIN: tl.constexpr = output_ptr.dtype.element_ty == tl.bfloat16
    CHUNKS: tl.constexpr = (PIECES + BLOCK - 1) // BLOCK
    STRIDE: tl.constexpr = PIECES * 4
    GROUPS: tl.constexpr = PIECES // 4
    SETS: tl.constexpr = 2 if GATED else QUADS
    RUN: tl.constexpr = BITS  # pieces among 128 inputs
    first = tl.program_id(0) * 4 * QUADS
    piece = tl.arange(0, BLOCK)
    at = piece[:, None] * 4 + tl.arange(0, 4)[None, :]
    weights = weight_ptr + first.to(tl.int64) * STRIDE
    scaling = scale_ptr + first * GROUPS
    # Where the second four outputs lie: behind the first, or in the other half.
    further = weights + 4 * STRIDE
    further_scaling = scaling + 4 * GROUPS
    if GATED:
        further = weights + columns.to(tl.int64) * STRIDE
        further_scaling = scaling + columns * GROUPS
    near = weights + at
    far = further + at
    x_at = row_ptr + (piece // RUN * 64 + piece % RUN * 4)[:, None] + tl.arange(0, 4)[None, :]
    held = ()
    for chunk in tl.static_range(DEPTH):
        held = held + (_chunk(near, far, piece, chunk, BLOCK, PIECES, SETS),)
    scales = ()
    for number in tl.static_range(0 if BITS == 8 else (CHUNKS + 3) // 4 if PACKED else CHUNKS):
        scales = scales + (_scales(scaling, piece, number, BLOCK, PIECES, PACKED),)
        if SETS == 2:
            scales = scales + (_scales(further_scaling, piece, number, BLOCK, PIECES, PACKED),)
    if PREFETCH and PDL and PACKED and DEPTH < CHUNKS:
        _bulk(weights, 4 * QUADS * PIECES * 16)
        if GATED:
            _bulk(further, 4 * PIECES * 16)
    column, inside = _columns(first, PACKED)
    unit: tl.constexpr = 1.0 if BRAIN or BITS == 8 else 16.0
    scale = _extra(scale_ptr, column, inside, BITS == 8)
    other_scale = _extra(scale_ptr, column + (columns if GATED else 4), inside, BITS == 8 and SETS == 2)
    bias = _extra(bias_ptr, column, inside, HAS_BIAS)
    other_bias = _extra(bias_ptr, column + 4, inside, HAS_BIAS and SETS == 2)
    wait_for_inputs(PDL)
    residual = _extra(residual_ptr, column, inside, HAS_RESIDUAL)
    other_residual = _extra(residual_ptr, column + 4, inside, HAS_RESIDUAL and SETS == 2 and not GATED)
    total = tl.zeros((BLOCK, 4), tl.float32)
    other = tl.zeros((BLOCK, 4), tl.float32)
    x = _inputs(x_at, 0, (piece < PIECES)[:, None], BITS, BLOCK > PIECES)
    for chunk in tl.static_range(CHUNKS):
        if chunk + DEPTH < CHUNKS:
            held = held + (_chunk(near, far, piece, chunk + DEPTH, BLOCK, PIECES, SETS),)
        next_x = x
        if chunk + 1 < CHUNKS:
            next_x = _inputs(
                x_at,
                (chunk + 1) * BLOCK * (64 // BITS),
                (piece + (chunk + 1) * BLOCK < PIECES)[:, None],
                BITS,
                (chunk + 2) * BLOCK > PIECES,
            )
        if BITS == 8:
            total = _add_bytes(total, held[chunk][0], x, BRAIN, PACKED)
            if SETS == 2:
                other = _add_bytes(other, held[chunk][1], x, BRAIN, PACKED)
        else:
            offset = _offset(x, BRAIN, PACKED)
            total = _add(
                total,
                held[chunk][0],
                scales[(chunk // 4 if PACKED else chunk) * SETS],
                x,
                offset,
                chunk,
                BRAIN,
                PACKED,
            )
            if SETS == 2:
                other = _add(
                    other,
                    held[chunk][1],
                    scales[(chunk // 4 if PACKED else chunk) * SETS + 1],
                    x,
                    offset,
                    chunk,
                    BRAIN,
                    PACKED,
                )
        x = next_x
    result = _reduced(total, PACKED) * (scale if BITS == 8 else unit)
    result = activate(result + bias, ACTIVATION)
    if SETS == 2:
        second = _reduced(other, PACKED) * (other_scale if BITS == 8 else unit)
    if GATED:
        result *= second
    tl.store(output_ptr + column, (result + residual).to(output_ptr.dtype.element_ty), mask=inside)
    if SETS == 2 and not GATED:
        second = activate(second + other_bias, ACTIVATION) + other_residual
        tl.store(output_ptr + column + 4, second.to(output_ptr.dtype.element_ty), mask=inside)
