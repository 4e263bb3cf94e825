"""Products of a few rows (2 to 40) whose weights never pass through shared memory, where that is faster than `skinny_linear.py`.

A tensor core wants its operands spread over a warp's threads. Triton's products get there by way of shared memory, and with few
rows that detour is what a product waits for. None is needed: a product does not mind in which order its inner dimension is added,
as long as both operands agree. Ordered so that a thread holds 8 consecutive inputs (`DotOperandLayout(k_width=8)`), the 16 bytes
that it loads are what it has to hold. A run of 64 inputs of one output's weights, by the thread that loads and keeps them::

    inputs      0..7   8..15  16..23  24..31 | 32..39  40..47  48..55  56..63
    thread       0      1       2       3    |   0       1       2       3        the next output: threads 4 to 7, ...

Each warp takes a slice of the inner dimension, as the batch dimension of a product of three dimensions, so that all warps have
weights in flight from the start, asked for before the program waits for its inputs; they meet once, when their sums are added.
The next step's weights are asked for as soon as a run is used, and where a program's fit in registers, one step is all.

The rule :func:`choose_fragment_tile` comes from an H200 (bfloat16; 7, 16, 32 and 40 rows; shapes of GPT-Neo-125M and 1.3B and of
Mistral-7B) and leaves to the other kernel or the vendor's library what they were faster at. Written for this project.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from .gemv import activate
from .gluon_support import gl, gluon_jit, mma_v2
from .triton_support import overlaps_launches, release_dependents, tl, triton, wait_for_inputs

RUN = 64
"""Inputs of one product of the tensor core here: 16 bytes twice from each of the threads of an output."""
ROW_BLOCKS = ((8, 1), (16, 1), (16, 2), (8, 5))
"""Rows of a block and blocks, by rows: few, so that few kernels are compiled. More than 40 rows were not measured."""
FEWEST_INPUTS, MOST_COLUMNS = 256, 8192
"""Less deep or wider products are the other kernel's. The least measured was 768 inputs; 28,672 columns were no faster here."""
SLOW_INPUTS = (2560, 10240)
"""Inputs of the products of GPT-Neo-2.7B's shape, whose forward pass took 2.57 ms with this kernel and 2.39 before there was it
(8 nodes; 16 nodes: 2.73 and 2.39). They are five times a power of two, so warps hold few at a time."""
MULTIPROCESSORS = 132
"""An H200's. A product of so many programs or fewer has a whole register file for each; in more, two share one."""
MOST_SHARING_INPUTS = 2048
"""Of a product of more programs: as far as such were measured and faster."""
LEAST_HELD = 512
"""Runs of an output (128 bytes) in a multiprocessor's registers at a time, where it loops; the fastest loops had no fewer."""
REGISTERS = 65536
"""Of a multiprocessor, for all threads of its programs; a thread has at most 255."""


@dataclass(frozen=True)
class FragmentTile:
    """What a program computes, and with how many warps.

    Attributes:
        rows, blocks: rows of a block and blocks; a program computes all of them.
        columns: outputs.
        slices: warps, each with a slice of the inner dimension.
        runs: runs of 64 inputs that a warp has in registers at a time.
        registers: most registers of a thread.
    """

    rows: int
    blocks: int
    columns: int
    slices: int
    runs: int
    registers: int

    @property
    def ahead(self) -> int:
        """Blocks of inputs, of a run and a block of rows, that a program asks for before it needs them."""
        return min(4 if self.rows * self.blocks == 8 else 2, self.runs * self.blocks)

    def steps(self, inner: int) -> int:
        """Returns how often the warps' registers are filled; `inner` is a multiple of what they hold."""
        return inner // (RUN * self.slices * self.runs)


@lru_cache
def choose_fragment_tile(rows: int, columns: int, inner: int) -> FragmentTile | None:
    """Returns the tile of a product (rows, inner) x (columns, inner), or `None` where it is computed elsewhere.

    Outputs are divided into tiles of 16 while a multiprocessor has one of them, else of 32. Warps then hold as much of the inner
    dimension as fits in registers. Above 8 rows a loop pays only for wide tiles; above 16 neither loops nor sharing a
    multiprocessor do.
    """
    blocks = next((pair for pair in ROW_BLOCKS if 1 < rows <= pair[0] * pair[1]), None)
    known = (
        inner >= FEWEST_INPUTS
        and inner % RUN == 0
        and inner not in SLOW_INPUTS
        and columns <= MOST_COLUMNS
        and columns * inner < 2**31
    )
    if blocks is None or not known:
        return None
    wide = 16 if triton.cdiv(columns, 16) <= MULTIPROCESSORS else 32
    alone = triton.cdiv(columns, wide) <= MULTIPROCESSORS
    slices, runs = _held(rows, wide, alone, inner // RUN)
    loops = inner > RUN * slices * runs
    sharing = 1 if alone else 2
    if loops and (wide * slices * runs * sharing < LEAST_HELD or rows > 16 or (rows > 8 and wide == 16)):
        return None
    if not alone and (rows > 16 or inner > MOST_SHARING_INPUTS):
        return None
    registers = REGISTERS // (32 * slices * sharing)
    return FragmentTile(*blocks, wide, slices, runs, min(255, registers))


def _held(rows: int, wide: int, alone: bool, count: int) -> tuple[int, int]:
    """Returns slices and their runs at a time, of an inner dimension of `count` runs: the most at a time, in the most slices.

    A run of 16 outputs takes 16 registers of each thread of its warp, twice in a loop. Within the limits nothing spilled, and the
    measured products' fastest tiles or nearly so are found.
    """
    most = 1024 if alone else 512 if rows <= 8 else 384  # runs of an output
    across = 256 if rows <= 8 or (alone and rows <= 16) else 128  # slices of an output
    pairs = [
        (slices, runs)
        for slices in (1, 2, 4, 8, 16)
        for runs in (1, 2, 3, 4, 6)
        if wide * slices * runs <= most and wide * slices <= across and wide * runs <= 128
        if slices < 16 or runs <= (4 if rows <= 8 else 3)
        if count % (slices * runs) == 0
    ]
    return max(pairs, key=lambda pair: (pair[0] * pair[1], pair[0]))


def launch_fragment(
    tile: FragmentTile,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: int,
    residual: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """Writes what `skinny_linear.linear` returns to `output`; its arguments are explained there.

    Args:
        tile: fits the product, see :func:`choose_fragment_tile`.
        rows: (..., in), contiguous, float16 or bfloat16.
        weight: (out, in), contiguous.
        bias: (out,), or `None`.
        activation: number of the activation, see `skinny_linear.ACTIVATIONS`.
        residual: (..., out), or `None`.
        output: (..., out).
    """
    columns, inner = weight.shape
    pdl = overlaps_launches(rows.device)
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    fragment_linear_kernel[(triton.cdiv(columns, tile.columns),)](
        rows,
        weight,
        rows if bias is None else bias,
        rows if residual is None else residual,
        output,
        rows.numel() // inner,
        columns,
        INNER=inner,
        BLOCK_ROWS=tile.rows,
        BLOCKS=tile.blocks,
        BLOCK_COLUMNS=tile.columns,
        SLICES=tile.slices,
        RUNS=tile.runs,
        STEPS=tile.steps(inner),
        AHEAD=tile.ahead,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        EVEN=columns % tile.columns == 0,
        PDL=pdl,
        num_warps=tile.slices,
        maxnreg=tile.registers,
        **options,
    )


@gluon_jit
def _slices(SLICES: tl.constexpr, layout: tl.constexpr):
    """Returns (slices, 1, 1) numbers of slices of an operand."""
    return gl.arange(0, SLICES, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]


@gluon_jit
def _middle(COUNT: tl.constexpr, layout: tl.constexpr):
    """Returns (1, count, 1) numbers along an operand's second dimension."""
    return gl.arange(0, COUNT, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]


@gluon_jit
def _last(COUNT: tl.constexpr, layout: tl.constexpr):
    """Returns (1, 1, count) numbers along an operand's third dimension."""
    return gl.arange(0, COUNT, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]


@gluon_jit
def _ask_inputs(input_ptr, at, PLACE: tl.constexpr, BLOCKS: tl.constexpr, MOVED: tl.constexpr):
    """Returns a right operand, (slices, 64, rows): number `PLACE` of a step's, which has all blocks of rows of a run in turn."""
    return tl.load(input_ptr + at[PLACE % BLOCKS] + (PLACE // BLOCKS * 64 + MOVED))


@gluon_jit
def _step(
    input_ptr, weight_ptr, words, inputs, totals, at_w, at_b,
    BLOCKS: tl.constexpr, RUNS: tl.constexpr, AHEAD: tl.constexpr, STRIDE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Adds `RUNS` runs of each slice; returns the next step's weights and first inputs (not of the last), and the totals."""
    COUNT: tl.constexpr = RUNS * BLOCKS
    next_words = ()
    next_inputs = ()
    for r in tl.static_range(RUNS):
        added = ()
        for b in tl.static_range(BLOCKS):
            if r * BLOCKS + b + AHEAD < COUNT:
                inputs = inputs + (_ask_inputs(input_ptr, at_b, r * BLOCKS + b + AHEAD, BLOCKS, 0),)
            elif not LAST:
                next_inputs = next_inputs + (
                    _ask_inputs(input_ptr, at_b, r * BLOCKS + b + AHEAD - COUNT, BLOCKS, STRIDE),
                )
            added = added + (mma_v2(words[r], inputs[r * BLOCKS + b], totals[b]),)
        totals = added
        if not LAST:
            next_words = next_words + (
                tl.load(weight_ptr + at_w + (STRIDE + r * 64), eviction_policy="evict_first"),
            )
    return next_words, next_inputs, totals


@gluon_jit(do_not_specialize=["rows"])
def fragment_linear_kernel(
    input_ptr, weight_ptr, bias_ptr, residual_ptr, output_ptr, rows, columns,
    INNER: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, SLICES: tl.constexpr,
    RUNS: tl.constexpr, STEPS: tl.constexpr, AHEAD: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of columns): all rows, in `BLOCKS` of `BLOCK_ROWS`, of `BLOCK_COLUMNS` outputs.

    Each of `SLICES` warps has `RUNS` runs at a time, in `STEPS`. Rows and columns that are none (`EVEN`: no column is) are
    computed like the last one and not written.

    Args:
        input_ptr: (rows, INNER) half precision.
        weight_ptr: (columns, INNER).
        bias_ptr: (columns,); any pointer without `HAS_BIAS`.
        residual_ptr: (rows, columns); any pointer without `HAS_RESIDUAL`.
        output_ptr: (rows, columns).
        rows, columns: sizes.
    """
    release_dependents(PDL)
    STRIDE: tl.constexpr = SLICES * RUNS * 64
    mma: tl.constexpr = gl.NVMMADistributedLayout([2, 0], [SLICES, 1, 1], [1, 16, 8])
    left: tl.constexpr = gl.DotOperandLayout(0, mma, 8)
    right: tl.constexpr = gl.DotOperandLayout(1, mma, 8)
    first_column = tl.program_id(0) * BLOCK_COLUMNS
    column_w = first_column + _middle(BLOCK_COLUMNS, left)
    if not EVEN:
        column_w = tl.minimum(column_w, columns - 1)
    at_w = column_w * INNER + _slices(SLICES, left) * (RUNS * 64) + _last(64, left)
    words = ()
    for r in tl.static_range(RUNS):
        words = words + (tl.load(weight_ptr + at_w + r * 64, eviction_policy="evict_first"),)

    inner_b = _slices(SLICES, right) * (RUNS * 64) + _middle(64, right)
    at_b = ()
    totals = ()
    for b in tl.static_range(BLOCKS):
        row_b = tl.minimum(_last(BLOCK_ROWS, right) + b * BLOCK_ROWS, rows - 1)
        at_b = at_b + (row_b * INNER + inner_b,)
        totals = totals + (gl.zeros([SLICES, BLOCK_COLUMNS, BLOCK_ROWS], tl.float32, mma),)
    wait_for_inputs(PDL)
    inputs = ()
    for i in tl.static_range(AHEAD):
        inputs = inputs + (_ask_inputs(input_ptr, at_b, i, BLOCKS, 0),)
    for step in tl.static_range(STEPS):
        words, inputs, totals = _step(
            input_ptr + step * STRIDE, weight_ptr + step * STRIDE, words, inputs, totals, at_w, at_b,
            BLOCKS, RUNS, AHEAD, STRIDE, step == STEPS - 1,
        )  # fmt: skip

    # Slices are added, then an output's neighbours lie next to each other, as they are written.
    joined: tl.constexpr = gl.BlockedLayout(
        [SLICES, BLOCK_COLUMNS // 16, 1], [1, 16, 2], [1, 1, SLICES], [1, 2, 0]
    )
    written: tl.constexpr = gl.SliceLayout(0, joined)
    column = first_column + gl.arange(0, BLOCK_COLUMNS, gl.SliceLayout(1, written))
    valid = column < columns
    for b in tl.static_range(BLOCKS):
        row = b * BLOCK_ROWS + gl.arange(0, BLOCK_ROWS, gl.SliceLayout(0, written))
        inside = valid[:, None] & (row < rows)[None, :]
        result = tl.sum(gl.convert_layout(totals[b], joined), 0)
        if HAS_BIAS:
            result += tl.load(bias_ptr + column, mask=valid, other=0.0).to(tl.float32)[:, None]
        result = activate(result, ACTIVATION)
        place = row[None, :] * columns + column[:, None]
        if HAS_RESIDUAL:
            result += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(output_ptr + place, result.to(output_ptr.dtype.element_ty), mask=inside)
