"""One row times packed weights on the tensor cores, straight from registers: INT8, and INT4 in groups of 128.

A tensor core multiplies matrices and a row is none. What helps is where `mma.sync.m16n8k16` wants its operands: lane 4 g + t
holds a part of row g of the left one and of column g of the right one. So every lane hands over what it has loaded, its weights
to the left and the inputs of these to the right. With w(g) the weights of lanes 4 g to 4 g + 3 side by side, x(g) their inputs::

                column 0       1            2           ..  7
    row 0       [w(0) x(0)]    w(0) x(1)    w(0) x(2)           The diagonal is what is wanted: a lane's weights times the
        1        w(1) x(0)    [w(1) x(1)]   w(1) x(2)           same lane's inputs, summed over four neighbours. The rest
        2        w(2) x(0)     w(2) x(1)   [w(2) x(2)]          pairs weights with inputs of others and is thrown away;
       ..                                               ..      tensor cores have nothing else to do.

Rows 8 to 15 hold a second output's weights. Four lanes read 64 bytes of an output, at 4 bits a group of 128: an element of the
diagonal is a group's sum and multiplied with its scale once. Weights lie in registers as in memory, inputs are neither prepared
nor converted: at 4 bits a whole program has some 1.6 instructions a weight, where float32 arithmetic (`quantized_gemv.py`) has
3.4 to 4.7.

Integers become half precision as in `quantized_linear_kernels.py`, but at 4 bits what a field has too much is not taken off it:
inputs times that constant, the same for all outputs, are what the sums start from.

Lanes keep their sums until the end. Row r of the diagonal is in lane 4 r + r / 2, so eight of 32 hold one, four outputs each; six
exchanges leave an output's sum in each of lanes 0 to 3. The assembly relies on lane = piece % 32 and a lane's four words side by
side, which is what the compiler chooses for loads of 16 bytes; the tests look at what it chose.
"""

from __future__ import annotations

from .gemv import activate
from .quantized_gemv import half_pair
from .triton_support import constant, jit, release_dependents, tl, wait_for_inputs


def _mma(brain: bool, first: int, left: list[str], right: list[str]) -> str:
    kind = "bf16" if brain else "f16"
    total = ", ".join(f"c{first + i}" for i in range(4))
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{{total}}}, {{{', '.join(left)}}}, {{{', '.join(right)}}}, "
        f"{{{total}}};"
    )


def _nibbles(to: str, word: str, place: int, brain: bool) -> list[str]:
    """Returns what makes two half-precision numbers of a word's nibbles: 128 + q in bfloat16, 1 + q / 16 in float16."""
    if brain:
        shift = [f"shr.u32 {to}, {word}, {4 * place};"] if place else []
        return [*shift, f"lop3.b32 {to}, {to if place else word}, 0x000F000F, 0x43004300, 0xEA;"]
    left = 6 - 4 * place
    return [
        f"shl.b32 {to}, {word}, {left};" if left > 0 else f"shr.u32 {to}, {word}, {-left};",
        f"lop3.b32 {to}, {to}, 0x03C003C0, 0x3C003C00, 0xEA;",
    ]


def _bytes(to: str, word: str, place: int, brain: bool) -> list[str]:
    """Returns what makes two half-precision numbers of a word's signed bytes."""
    shift = [f"shr.u32 {to}, {word}, 8;"] if place else []
    word = to if place else word
    if brain:  # the lower seven bits and 128, minus 128 or, where the sign bit raises the exponent, 256
        return [
            *shift, f"lop3.b32 t, {word}, 0x00800080, 0x43004300, 0xEA;",
            f"lop3.b32 {to}, {word}, 0x007F007F, 0x43004300, 0xEA;", f"fma.rn.bf16x2 {to}, t, one, {to};",
        ]  # fmt: skip
    return [
        *shift,
        f"lop3.b32 {to}, {word}, 0x00FF00FF, 0x64806480, 0x6A;",
        f"sub.f16x2 {to}, {to}, one;",
    ]


def _product(bits: int, brain: bool) -> str:
    """Returns what adds a piece of four outputs to their totals.

    Operands 0 to 3: the new totals. From 4: four words of each output; from 20: four inputs' words of each place in the words.
    At 4 bits then four offsets, scales of two outputs and of the other two (four copies each), the lane of the first (four
    copies). Last: the four totals.
    """
    lines = [
        "{ .reg .b32 a<8>, t, one; .reg .f32 c<8>, k<5>, s<4>; .reg .pred odd; .reg .u32 lane, from, w<2>;"
    ]
    lines += [".reg .b16 h<4>;"] + [f"mov.f32 c{i}, 0f00000000;" for i in range(8)]
    if bits == 8:
        lines.append(f"mov.b32 one, {'0xBF80BF80' if brain else '0x64806480'};")
    for word in (0, 2):  # two words at a time, whose inputs lie in neighbouring registers
        for place in range(16 // bits):
            inputs = [f"${20 + 4 * place + word + i}" for i in range(2)]
            for pair in range(2):
                numbers = [f"a{4 * pair + i}" for i in range(4)]
                for i, number in enumerate(numbers):
                    source = f"${4 + 4 * (2 * pair + i % 2) + word + i // 2}"
                    lines += (_nibbles if bits == 4 else _bytes)(number, source, place, brain)
                lines.append(_mma(brain, 4 * pair, numbers, inputs))
    return " ".join(lines + (_scaled_sums() if bits == 4 else _sums(28)) + ["}"])


def _sums(totals: int) -> list[str]:
    """Returns what adds the diagonal to operands from `totals` on; other lanes' totals mean nothing."""
    lines = ["mov.u32 lane, %laneid; and.b32 lane, lane, 4; setp.ne.u32 odd, lane, 0;"]
    for column in range(4):
        lines.append(f"selp.f32 k{column}, c{2 * column + 1}, c{2 * column}, odd;")
        lines.append(f"add.f32 ${column}, k{column}, ${totals + column};")
    return lines


def _scaled_sums() -> list[str]:
    """Returns what adds offsets to the diagonal, multiplies with the scales that other lanes hold and adds to the totals."""
    lines = [
        "mov.u32 lane, %laneid; shr.u32 from, lane, 2; add.u32 from, from, $48;",
        "shfl.sync.idx.b32 w0, $40, from, 31, -1; shfl.sync.idx.b32 w1, $44, from, 31, -1;",
        "mov.b32 {h0, h1}, w0; mov.b32 {h2, h3}, w1;",
        *(f"cvt.f32.f16 s{i}, h{i};" for i in range(4)),
        "and.b32 lane, lane, 4; setp.ne.u32 odd, lane, 0; selp.f32 k4, $37, $36, odd;",
    ]
    for column in range(4):
        lines.append(f"selp.f32 k{column}, c{2 * column + 1}, c{2 * column}, odd;")
        lines.append(f"add.f32 k{column}, k{column}, k4;")
        lines.append(f"fma.rn.f32 ${column}, k{column}, s{column}, ${52 + column};")
    return lines


def _offsets(brain: bool) -> str:
    """Returns what multiplies a piece's inputs, operands 4 to 19, with -136 in bfloat16, -1.5 in float16."""
    lines = ["{ .reg .b32 a; .reg .f32 c<8>;", f"mov.b32 a, {'0xC308C308' if brain else '0xBE00BE00'};"]
    lines += [f"mov.f32 c{i}, 0f00000000;" for i in range(8)]
    for half in range(2):  # two sums, so that products need not wait for each other
        for place in range(4):
            inputs = [f"${4 + 4 * place + 2 * half + i}" for i in range(2)]
            lines.append(_mma(brain, 4 * half, ["a"] * 4, inputs))
    return " ".join([*lines, *(f"add.f32 ${i}, c{i}, c{i + 4};" for i in range(4)), "}"])


def _sum_of_lanes() -> str:
    """Returns what leaves the sums of the diagonal's lanes in lanes 0 to 3: of outputs 0, 2, 1 and 3."""
    lines = [
        "{ .reg .u32 lane, m, n; .reg .pred d, p, q; .reg .f32 s<4>, a, b, u, v; mov.u32 lane, %laneid;",
        "shr.u32 m, lane, 3; and.b32 n, lane, 3; setp.eq.u32 d, m, n;",
        *(f"selp.f32 s{i}, ${4 + i}, 0f00000000, d;" for i in range(4)),
        "and.b32 m, lane, 1; setp.ne.u32 p, m, 0; and.b32 m, lane, 2; setp.ne.u32 q, m, 0;",
        # A lane and its neighbour keep two outputs each, then one.
        "selp.f32 a, s2, s0, p; selp.f32 b, s3, s1, p; selp.f32 u, s0, s2, p; selp.f32 v, s1, s3, p;",
        "shfl.sync.bfly.b32 u, u, 1, 31, -1; shfl.sync.bfly.b32 v, v, 1, 31, -1;",
        "add.f32 a, a, u; add.f32 b, b, v; selp.f32 u, a, b, q; selp.f32 a, b, a, q;",
        *(f"shfl.sync.bfly.b32 u, {'u' if step == 2 else 'a'}, {step}, 31, -1; add.f32 a, a, u;" for step in (2, 4, 8, 16)),
        "mov.f32 $0, a; mov.f32 $1, 0f00000000; mov.f32 $2, 0f00000000; mov.f32 $3, 0f00000000; }",
    ]  # fmt: skip
    return " ".join(lines)


BRAIN_NIBBLES, HALF_NIBBLES = constant(_product(4, True)), constant(_product(4, False))
BRAIN_BYTES, HALF_BYTES = constant(_product(8, True)), constant(_product(8, False))
BRAIN_OFFSETS, HALF_OFFSETS = constant(_offsets(True)), constant(_offsets(False))
SUM_OF_LANES = constant(_sum_of_lanes())
NIBBLES_OPERANDS = constant(",".join(["=&f"] * 4 + ["r"] * 32 + ["f"] * 4 + ["r"] * 12 + ["f"] * 4))
BYTES_OPERANDS = constant(",".join(["=&f"] * 4 + ["r"] * 24 + ["f"] * 4))
OFFSETS_OPERANDS = constant(",".join(["=f"] * 4 + ["r"] * 16))
SUM_OPERANDS = constant(",".join(["=&f"] * 4 + ["f"] * 4))


@jit
def _words(pointers, piece, NUMBER: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    """Returns the (pieces, 4) words of chunk `NUMBER` of four outputs."""
    found = ()
    for column in tl.static_range(4):
        at = pointers + (NUMBER * BLOCK * 4 + column * PIECES * 4)
        if (NUMBER + 1) * BLOCK > PIECES:
            known = (piece + NUMBER * BLOCK < PIECES)[:, None]
            found = found + (tl.load(at, mask=known, other=0, eviction_policy="evict_first"),)
        else:
            found = found + (tl.load(at, eviction_policy="evict_first"),)
    return found


@jit
def _inputs(
    pointers, piece, NUMBER: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, BITS: tl.constexpr
):
    """Returns the inputs of chunk `NUMBER`, two an element: (pieces, 4) of each quarter of a run, or half at 8 bits."""
    found = ()
    for place in tl.static_range(16 // BITS):
        at = pointers + (NUMBER * BLOCK * (64 // BITS) + place * 4 * BITS)
        if (NUMBER + 1) * BLOCK > PIECES:
            found = found + (tl.load(at, mask=(piece + NUMBER * BLOCK < PIECES)[:, None], other=0),)
        else:
            found = found + (tl.load(at),)
    return found


@jit
def _scale(pointers, valid):
    """Returns scales as the lower bits of int32."""
    loaded = tl.load(pointers, mask=valid, other=0.0).to(tl.float16)
    return loaded.to(tl.int16, bitcast=True).to(tl.int32)


@jit
def _scales(
    pointers, piece, NUMBER: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, PACKED: tl.constexpr
):
    """Returns (pieces, 1) scales of outputs 0 and 1 in one int32, and of 2 and 3.

    PACKED: of four chunks from chunk `4 * NUMBER` on, so that no lane reads what another has: lane 8 n + g has group g of its
    warp's part of the n-th. Else of chunk `NUMBER`.
    """
    GROUPS: tl.constexpr = PIECES // 4
    if PACKED:
        group = (4 * NUMBER + piece % 32 // 8) * (BLOCK // 4) + piece // 32 * 8 + piece % 8
    else:
        group = NUMBER * (BLOCK // 4) + piece // 4
    valid = (group < GROUPS)[:, None]
    at = pointers + group[:, None]
    first = (_scale(at, valid) & 65535) | (_scale(at + GROUPS, valid) << 16)
    return first, (_scale(at + 2 * GROUPS, valid) & 65535) | (_scale(at + 3 * GROUPS, valid) << 16)


@jit
def _plain(words, x, BITS: tl.constexpr, BRAIN: tl.constexpr):
    """Returns (pieces, 1) sums of numbers times inputs, by operations that Triton's interpreter knows."""
    MIDDLE: tl.constexpr = 8 if BITS == 4 else 128
    TURNED: tl.constexpr = 0 if BITS == 4 else 128  # of bytes the sign is turned over
    total = tl.zeros((words.shape[0], 4), tl.float32)
    for place in tl.static_range(16 // BITS):
        low, high = half_pair(x[place], BRAIN)
        total += (((words >> BITS * place & 2 * MIDDLE - 1) ^ TURNED) - MIDDLE).to(tl.float32) * low
        total += (((words >> BITS * place + 16 & 2 * MIDDLE - 1) ^ TURNED) - MIDDLE).to(tl.float32) * high
    return tl.sum(total, 1)[:, None]


@jit
def _add_bytes(total, words, x, BRAIN: tl.constexpr, PACKED: tl.constexpr):
    """Returns (pieces, 4) totals of four outputs with a chunk of bytes added."""
    if PACKED:
        total = tl.inline_asm_elementwise(
            BRAIN_BYTES if BRAIN else HALF_BYTES, BYTES_OPERANDS,
            [words[0], words[1], words[2], words[3], x[0], x[1], total], dtype=tl.float32, is_pure=False, pack=4,
        )  # fmt: skip
    else:
        for column in tl.static_range(4):
            total += tl.where(tl.arange(0, 4)[None, :] == column, _plain(words[column], x, 8, BRAIN), 0.0)
    return total


@jit
def _offset(x, BRAIN: tl.constexpr, PACKED: tl.constexpr):
    """Returns the (pieces, 4) inputs times what the fields of 4 bits have too much."""
    if PACKED:
        return tl.inline_asm_elementwise(
            BRAIN_OFFSETS if BRAIN else HALF_OFFSETS, OFFSETS_OPERANDS,
            [x[0], x[1], x[2], x[3]], dtype=tl.float32, is_pure=False, pack=4,
        )  # fmt: skip
    return tl.zeros((x[0].shape[0], 4), tl.float32)


@jit
def _add_nibbles(
    total, words, scales, x, offset, NUMBER: tl.constexpr, BRAIN: tl.constexpr, PACKED: tl.constexpr
):
    """Returns (pieces, 4) totals of four outputs with chunk `NUMBER` added; `PACKED` only lanes of the diagonal hold them."""
    if PACKED:
        shape: tl.constexpr = [total.shape[0], 4]
        total = tl.inline_asm_elementwise(
            BRAIN_NIBBLES if BRAIN else HALF_NIBBLES, NIBBLES_OPERANDS,
            [
                words[0], words[1], words[2], words[3], x[0], x[1], x[2], x[3], offset,
                tl.broadcast_to(scales[0], shape), tl.broadcast_to(scales[1], shape),
                tl.full(shape, NUMBER % 4 * 8, tl.int32), total,
            ],
            dtype=tl.float32, is_pure=False, pack=4,
        )  # fmt: skip
    else:
        UNIT: tl.constexpr = 1.0 if BRAIN else 0.0625
        for column in tl.static_range(4):
            bits = (scales[column // 2] >> 16 * (column % 2)).to(tl.int16)
            product = _plain(words[column], x, 4, BRAIN) * bits.to(tl.float16, bitcast=True).to(tl.float32)
            total += tl.where(tl.arange(0, 4)[None, :] == column, product, 0.0) * UNIT
    return total


@jit
def _reduced(total, PACKED: tl.constexpr):
    """Returns the sums over the pieces of (pieces, 4) totals: (4,), or (32,) of which the first four are outputs 0, 2, 1, 3."""
    if PACKED:
        total = tl.inline_asm_elementwise(
            SUM_OF_LANES, SUM_OPERANDS, [total], dtype=tl.float32, is_pure=False, pack=4
        )
        total = tl.reshape(tl.sum(total, 1), (total.shape[0] // 32, 32))
    return tl.sum(total, 0)


@jit
def _extra(pointer, column, inside, GIVEN: tl.constexpr):
    """Returns the scale, bias or residual of outputs; 0 where there is none."""
    found = 0.0
    if GIVEN:
        found = tl.load(pointer + column, mask=inside, other=0.0).to(tl.float32)
    return found


@jit
def quantized_row_mma_kernel(  # noqa: C901 - one kernel; its branches are compile-time
    row_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr, output_ptr, columns,
    PIECES: tl.constexpr, BLOCK_PIECES: tl.constexpr, FOURS: tl.constexpr, DEPTH: tl.constexpr, BITS: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Computes four outputs of one row, `FOURS` times; `GATED` four of each half, and `FOURS` is 1.

    `row_ptr` holds two inputs an element and `weight_ptr` int32 words, `PIECES` of four words an output; both start at multiples
    of 16 bytes. A program has a warp for each 32 of `BLOCK_PIECES`. `DEPTH`: chunks in flight, asked for before the inputs are
    there. `PACKED`: the assembly; otherwise operations that the interpreter knows.
    """
    release_dependents(PDL)
    BRAIN: tl.constexpr = output_ptr.dtype.element_ty == tl.bfloat16
    CHUNKS: tl.constexpr = (PIECES + BLOCK_PIECES - 1) // BLOCK_PIECES
    SCALES: tl.constexpr = 0 if BITS == 8 else (CHUNKS + 3) // 4 if PACKED else CHUNKS
    SETS: tl.constexpr = 2 if GATED else FOURS
    first = tl.program_id(0) * 4 * FOURS
    apart = columns.to(tl.int64) if GATED else 4
    piece = tl.arange(0, BLOCK_PIECES)
    word = tl.arange(0, 4)[None, :]
    weights = weight_ptr + first.to(tl.int64) * (PIECES * 4) + (piece[:, None] * 4 + word)
    scaling = scale_ptr + first * (PIECES // 4)
    # 128 inputs are as many pieces as a weight has bits.
    inputs = row_ptr + (piece // BITS * 64 + piece % BITS * 4)[:, None] + word
    held = ()
    for chunk in tl.static_range(DEPTH):
        for four in tl.static_range(SETS):
            held = held + (_words(weights + four * apart * (PIECES * 4), piece, chunk, BLOCK_PIECES, PIECES),)
    scales = ()
    for number in tl.static_range(SCALES):
        for four in tl.static_range(SETS):
            at = scaling + four * apart * (PIECES // 4)
            scales = scales + (_scales(at, piece, number, BLOCK_PIECES, PIECES, PACKED),)
    lane = tl.arange(0, 32 if PACKED else 4)
    inside = lane < 4
    column = first + ((lane & 1) * 2 + (lane >> 1 & 1) if PACKED else lane)
    factors, biases, residuals, totals = (), (), (), ()
    for four in tl.static_range(SETS):
        factors = factors + (_extra(scale_ptr, column + four * apart, inside, BITS == 8),)
        biases = biases + (_extra(bias_ptr, column + four * apart, inside, HAS_BIAS),)
        totals = totals + (tl.zeros((BLOCK_PIECES, 4), tl.float32),)
    wait_for_inputs(PDL)
    for four in tl.static_range(FOURS):
        residuals = residuals + (_extra(residual_ptr, column + 4 * four, inside, HAS_RESIDUAL),)
    x = _inputs(inputs, piece, 0, BLOCK_PIECES, PIECES, BITS)
    for chunk in tl.static_range(CHUNKS):
        if chunk + DEPTH < CHUNKS:
            for four in tl.static_range(SETS):
                at = weights + four * apart * (PIECES * 4)
                held = held + (_words(at, piece, chunk + DEPTH, BLOCK_PIECES, PIECES),)
        next_x = x
        if chunk + 1 < CHUNKS:
            next_x = _inputs(inputs, piece, chunk + 1, BLOCK_PIECES, PIECES, BITS)
        sums = ()
        if BITS == 8:
            for four in tl.static_range(SETS):
                sums = sums + (_add_bytes(totals[four], held[chunk * SETS + four], x, BRAIN, PACKED),)
        else:
            offset = _offset(x, BRAIN, PACKED)
            for four in tl.static_range(SETS):
                sums = sums + (_add_nibbles(
                    totals[four], held[chunk * SETS + four], scales[(chunk // 4 if PACKED else chunk) * SETS + four],
                    x, offset, chunk, BRAIN, PACKED,
                ),)  # fmt: skip
        totals = sums
        x = next_x
    UNIT: tl.constexpr = 1.0 if BRAIN else 16.0
    for four in tl.static_range(FOURS):
        result = _reduced(totals[four], PACKED) * (factors[four] if BITS == 8 else UNIT)
        result = activate(result + biases[four], ACTIVATION)
        if GATED:
            result *= _reduced(totals[1], PACKED) * (factors[1] if BITS == 8 else UNIT)
        result += residuals[four]
        tl.store(output_ptr + column + 4 * four, result.to(output_ptr.dtype.element_ty), mask=inside)
