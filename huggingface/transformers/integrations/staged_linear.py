"""Products of 17 to 32 rows whose weights are on their way to shared memory before the inputs are there.

Between two products the memory idles: the first one's last programs still add up, and the second one's inputs are not there yet.
With up to 16 rows `fragment_linear.py` bridges that gap with weights in registers. More rows leave no registers for it, so here
weights and inputs take turns in a ring of stages in shared memory, copied there without passing through a thread. A program that
starts early fills the ring with weights, waits for its inputs, and then goes round::

    weights   0 1 2 | .  .  3  4  5 ...
    inputs          | 0  1  2  3  4 ...
    products        |    0  1  2  3 ...
                    the kernel in front is done

Two programs share a multiprocessor, so that the ring of the next product fills while this one still computes. The inner dimension
is split among programs until there is one for each multiprocessor; the last one to arrive adds the parts in their order.

Times are an H200's (bfloat16, 32 rows): at GPT-Neo-1.3B's shape four products a layer took 2.9 us less of 42. With 64 rows every
program would read 64 rows of inputs beside its 64 of weights, and the vendor's library was faster. Written for this project.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from .fragment_linear import MULTIPROCESSORS
from .gemv import activate
from .gluon_support import async_copy, gl, gluon_jit, mma_v2
from .triton_support import overlaps_launches, release_dependents, tl, triton, wait_for_inputs

FEWEST_ROWS, BLOCK_ROWS = 17, 32
"""Rows of a product; a program computes all of them, and as many as the latter."""
BLOCK_COLUMNS, BLOCK_INNER, STAGES, WARPS = 64, 128, 4, 4
"""Outputs of a program, inputs of a stage, stages of the ring and warps: the best of some twelve settings for each of three
products, or within 1 % of it. The ring takes 96 KB; an RTX 3090 has 99 for a program."""
LEAST_INPUTS, MOST_INPUTS, MOST_COLUMNS = 2048, 8192, 8192
"""Sizes as far as they were measured. At 768 and 3,072 inputs of a small model this was slower than `fragment_linear.py`."""
FEWEST_STEPS = 2
"""Stages of a program's inputs; a loop that is none does not compile."""


@lru_cache
def choose_staged_splits(rows: int, columns: int, inner: int) -> int | None:
    """Returns how many programs share a tile's inner dimension, or `None` where a product is computed elsewhere."""
    known = (
        FEWEST_ROWS <= rows <= BLOCK_ROWS
        and LEAST_INPUTS <= inner <= MOST_INPUTS
        and columns <= MOST_COLUMNS
        and inner % BLOCK_INNER == 0
    )
    if not known:
        return None
    splits = 2
    while triton.cdiv(columns, BLOCK_COLUMNS) * splits < MULTIPROCESSORS:
        splits *= 2
    steps, rest = divmod(inner, BLOCK_INNER * splits)
    return splits if steps >= FEWEST_STEPS and rest == 0 else None


def launch_staged(
    splits: int,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: int,
    residual: torch.Tensor | None,
    output: torch.Tensor,
    arrivals: torch.Tensor,
) -> None:
    """Writes what `skinny_linear.linear` returns to `output`; its arguments are explained there.

    Args:
        splits: of :func:`choose_staged_splits`.
        rows: (..., in), contiguous, float16 or bfloat16, at a multiple of 16 bytes.
        weight: (out, in), likewise.
        bias: (out,), or `None`.
        activation: number of the activation, see `skinny_linear.ACTIVATIONS`.
        residual: (..., out), or `None`.
        output: (..., out).
        arrivals: int32 counters, zero, one for each tile of outputs.
    """
    columns, inner = weight.shape
    blocks = triton.cdiv(columns, BLOCK_COLUMNS)
    cells = blocks * splits * BLOCK_COLUMNS * BLOCK_ROWS
    partials = torch.empty(cells, dtype=torch.float32, device=rows.device)
    pdl = overlaps_launches(rows.device)
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    staged_linear_kernel[(blocks, splits)](
        rows,
        weight,
        rows if bias is None else bias,
        rows if residual is None else residual,
        output,
        partials,
        arrivals,
        rows.numel() // inner,
        columns,
        INNER=inner,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        BLOCK_INNER=BLOCK_INNER,
        STAGES=STAGES,
        SPLITS=splits,
        STEPS=inner // (BLOCK_INNER * splits),
        WARPS=WARPS,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        EVEN=columns % BLOCK_COLUMNS == 0,
        PDL=pdl,
        num_warps=WARPS,
        **options,
    )


@gluon_jit
def _fill(place, from_ptr, at, STEP: tl.constexpr, STEPS: tl.constexpr):
    """Starts to copy a stage's numbers to a place of the ring, if there are as many stages."""
    if STEP < STEPS:
        async_copy.async_copy_global_to_shared(place, from_ptr + at)
    async_copy.commit_group()


@gluon_jit
def _sums(
    weights, inputs, weight_ptr, input_ptr, weight_at, input_at, mma: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr, STAGES: tl.constexpr, STEPS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Returns (columns, rows) float32 sums over the inputs of `STEPS` stages, which go through the ring."""
    left: tl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: tl.constexpr = gl.DotOperandLayout(1, mma, 2)
    for stage in tl.static_range(STAGES - 1):
        _fill(weights.index(stage), weight_ptr + stage * BLOCK_INNER, weight_at, stage, STEPS)
    wait_for_inputs(PDL)
    for stage in tl.static_range(STAGES - 1):
        _fill(inputs.index(stage), input_ptr + stage * BLOCK_INNER, input_at, stage, STEPS)
    total = gl.zeros([BLOCK_COLUMNS, BLOCK_ROWS], tl.float32, mma)
    for step in range(STEPS):
        # So many groups are behind this step's inputs: the other inputs of the first round, or the steps asked for since.
        async_copy.wait_group(STAGES - 2)
        weight = weights.index(step % STAGES).load(left)
        value = inputs.index(step % STAGES).permute([1, 0]).load(right)
        later = step + (STAGES - 1)
        if later < STEPS:
            place = later % STAGES
            async_copy.async_copy_global_to_shared(
                weights.index(place), weight_ptr + later * BLOCK_INNER + weight_at
            )
            async_copy.async_copy_global_to_shared(
                inputs.index(place), input_ptr + later * BLOCK_INNER + input_at
            )
        async_copy.commit_group()
        total = mma_v2(weight, value, total)
    return total


@gluon_jit
def _add_parts(result, parts, arrived, split, cell, SIZE: tl.constexpr, SPLITS: tl.constexpr):
    """Returns whether this is the last program of its tile, and then the sum of all of them."""
    tl.store(parts + split * SIZE + cell, result)
    tl.debug_barrier()
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == SPLITS - 1
    if last:
        tl.store(arrived, 0)
        result = tl.load(parts + cell, cache_modifier=".cg")
        for other in tl.static_range(1, SPLITS):
            result += tl.load(parts + other * SIZE + cell, cache_modifier=".cg")
    return last, result


@gluon_jit(do_not_specialize=["rows"])
def staged_linear_kernel(
    input_ptr, weight_ptr, bias_ptr, residual_ptr, output_ptr, partial_ptr, arrival_ptr, rows, columns,
    INNER: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    STAGES: tl.constexpr, SPLITS: tl.constexpr, STEPS: tl.constexpr, WARPS: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of columns, split): all rows of `BLOCK_COLUMNS` outputs over the inputs of `STEPS` stages.

    Rows and columns that are none (`EVEN`: no column is) are computed like the last one and not written.

    Args:
        input_ptr: (rows, INNER) half precision.
        weight_ptr: (columns, INNER).
        bias_ptr: (columns,); any pointer without `HAS_BIAS`.
        residual_ptr: (rows, columns); any pointer without `HAS_RESIDUAL`.
        output_ptr: (rows, columns).
        partial_ptr: float32, (tiles, splits, rows, columns of a tile).
        arrival_ptr: (tiles,) int32, zero between launches.
        rows, columns: sizes.
    """
    release_dependents(PDL)
    mma: tl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    # Sixteen bytes a thread, a stage's inputs of one output beside each other.
    copied: tl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // BLOCK_INNER, BLOCK_INNER // 8], [WARPS, 1], [1, 0]
    )
    swizzled: tl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    kind: tl.constexpr = weight_ptr.dtype.element_ty
    weights = gl.allocate_shared_memory(kind, [STAGES, BLOCK_COLUMNS, BLOCK_INNER], swizzled)
    inputs = gl.allocate_shared_memory(kind, [STAGES, BLOCK_ROWS, BLOCK_INNER], swizzled)
    block = tl.program_id(0)
    split = tl.program_id(1)
    at = split * (STEPS * BLOCK_INNER) + gl.arange(0, BLOCK_INNER, gl.SliceLayout(0, copied))
    column = block * BLOCK_COLUMNS + gl.arange(0, BLOCK_COLUMNS, gl.SliceLayout(1, copied))
    if not EVEN:
        column = tl.minimum(column, columns - 1)
    row = tl.minimum(gl.arange(0, BLOCK_ROWS, gl.SliceLayout(1, copied)), rows - 1)
    total = _sums(
        weights, inputs, weight_ptr, input_ptr, column[:, None] * INNER + at[None, :], row[:, None] * INNER + at[None, :], mma,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, STAGES, STEPS, PDL,
    )  # fmt: skip

    # An output's neighbours lie next to each other, as they are written.
    written: tl.constexpr = gl.BlockedLayout(
        [4, 1], [BLOCK_COLUMNS // 4, 128 // BLOCK_COLUMNS], [1, WARPS], [0, 1]
    )
    result = gl.convert_layout(total, written)
    local = gl.arange(0, BLOCK_COLUMNS, gl.SliceLayout(1, written))
    row = gl.arange(0, BLOCK_ROWS, gl.SliceLayout(0, written))
    column = block * BLOCK_COLUMNS + local
    SIZE: tl.constexpr = BLOCK_COLUMNS * BLOCK_ROWS
    cell = row[None, :] * BLOCK_COLUMNS + local[:, None]
    parts = partial_ptr + block * (SPLITS * SIZE)
    complete, result = _add_parts(result, parts, arrival_ptr + block, split, cell, SIZE, SPLITS)
    if complete:
        valid = column < columns
        if HAS_BIAS:
            result += tl.load(bias_ptr + column, mask=valid, other=0.0).to(tl.float32)[:, None]
        result = activate(result, ACTIVATION)
        place = row[None, :] * columns + column[:, None]
        inside = valid[:, None] & (row < rows)[None, :]
        if HAS_RESIDUAL:
            result += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(output_ptr + place, result.to(output_ptr.dtype.element_ty), mask=inside)
