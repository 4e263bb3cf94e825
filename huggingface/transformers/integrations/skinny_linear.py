"""Linear layers for the few rows of a decode step: two to thirty-two, more for small models; one of them in `gemv.py`.

Here are the dispatcher, :func:`linear`, and the kernel for any size. Sizes that `fragment_linear.py` or `staged_linear.py`
computes faster go there.

Such a product reads every weight once and computes next to nothing, so it lives from bytes in flight. The weight tile is the
*left* operand of the matrix product (its many rows fill the tensor core's long side, the step's few rows the short one), the
inner dimension is split among programs until the card is full, and the last program to arrive adds the partial sums in a fixed
order, so results do not depend on who was first. Bias, activation, gate and residual are applied where the sum is complete.

Where launches overlap (see `triton_support`), a program asks for its weights to be brought to the second-level cache before it
waits for its input: the memory keeps streaming across the boundary of two kernels.

Lineage: split-K with an arrival counter as in Stream-K (arXiv 2301.03598); small-M products with swapped operands as in Marlin
(arXiv 2408.11743). Written for this project.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from .divided_linear import choose_parts
from .fragment_linear import choose_fragment_tile, launch_fragment
from .fused_norm import add_norm
from .gemv import WIDEST_NORM, activate, gemv
from .gluon_support import gluon_unavailable
from .staged_linear import choose_staged_splits, launch_staged
from .triton_support import (
    jit,
    overlaps_launches,
    prefetch,
    release_dependents,
    tl,
    triton,
    unavailable,
    wait_for_inputs,
)

ROW_BLOCK = 32
"""Rows that one program computes; more are divided among programs."""
SMALL_INPUTS, SMALL_ROWS = 1024, 192
"""Products of so few inputs run here for up to so many rows: a step of GPT-Neo-125M's shape with 160 stream rows is 3 % faster
than with the vendor's library, which is as fast or faster for more inputs."""
MOST_INPUTS = 8192
"""Deeper products of several rows are the vendor's: 14,336 inputs were slower here by 8 % at 7 rows, 74 % at 32 (H200)."""
ACTIVATIONS = {None: 0, "gelu_tanh": 1, "silu": 2}
DTYPES = (torch.float16, torch.bfloat16)
"""Float32 stays with the vendor's library, whose products are as exact as the dtype."""
PROGRAMS = 90
"""Programs that keep an H200's 132 multiprocessors busy; more of them read less each and finish less evenly."""
PREFETCH = 2
"""Weight tiles that a program asks for before its input is there."""
SHARED_BYTES = 100 * 1024
"""Shared memory of one program: what an RTX 3090 has, and what lets two programs share a multiprocessor of an H200."""


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of one product.

    Attributes:
        columns: outputs a program computes.
        inner: inputs a program reads at a time.
        splits: programs that share one output tile.
        warps, stages: warps of a program, and tiles in flight.
    """

    columns: int
    inner: int
    splits: int
    warps: int
    stages: int


def linear_reference(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    norm: nn.Module | None = None,
) -> torch.Tensor:
    """Returns what :func:`linear` returns, by plain operations."""
    rows = rows if norm is None else norm(rows)
    return finish(F.linear(rows, weight, bias), activation, gated, residual)


def finish(
    product: torch.Tensor,
    activation: str | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns what :func:`linear` makes of a plain product (..., out), or (..., 2 * out) where gated."""
    gate, factor = product.chunk(2, dim=-1) if gated else (product, None)
    if activation == "gelu_tanh":
        gate = F.gelu(gate, approximate="tanh")
    elif activation == "silu":
        gate = F.silu(gate)
    product = gate if factor is None else gate * factor
    return product if residual is None else product + residual


def linear(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    norm: nn.Module | None = None,
) -> torch.Tensor:
    """Returns `activation(norm(rows) @ weight.T + bias) + residual`, (..., out) from (..., in).

    Args:
        rows: (..., in), contiguous.
        weight: (out, in), contiguous; where `gated`, (2 * out, in): the activated half, then the half it is multiplied with.
        bias: (out,), or `None`; not with `gated`.
        activation: `gelu_tanh`, `silu` or `None`.
        gated: multiply the activated half with the other.
        residual: (..., out), added last.
        norm: LayerNorm or RMSNorm applied to the rows first, or `None`.

    Raises:
        ValueError: an unknown activation, or a gated product with a bias.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; use one of {list(ACTIVATIONS)}.")
    if gated and bias is not None:
        raise ValueError("a gated product takes no bias.")
    count = rows.numel() // rows.shape[-1]
    if rows.dtype not in DTYPES or unavailable(rows.device) is not None:
        return linear_reference(rows, weight, bias, activation, gated, residual, norm)
    columns = weight.shape[0] // (2 if gated else 1)
    inner = weight.shape[1]
    # A program that normalises holds the whole row at once. Several rows would have to be read twice: slower by a third.
    single = count == 1 and (norm is None or inner <= WIDEST_NORM)
    if norm is not None and not single:
        rows, _ = add_norm(rows, None, norm)
        norm, single = None, count == 1
    with_layouts = not gated and gluon_unavailable() is None
    tile = choose_fragment_tile(count, columns, inner) if with_layouts else None
    aligned = rows.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    splits = (
        choose_staged_splits(count, columns, inner) if with_layouts and aligned and tile is None else None
    )
    here = single or (runs_here(count, inner) and inner <= MOST_INPUTS)
    if tile is None and splits is None and not here:
        return _library_linear(rows, weight, bias, activation, gated, residual)
    output = rows.new_empty(*rows.shape[:-1], columns)
    if single:
        gemv(rows, weight, bias, ACTIVATIONS[activation], gated, residual, norm, output)
    elif tile is not None:
        launch_fragment(tile, rows, weight, bias, ACTIVATIONS[activation], residual, output)
    elif splits is not None:
        launch_staged(
            splits, rows, weight, bias, ACTIVATIONS[activation], residual, output, arrivals(rows.device)
        )
    else:
        _launch(rows, weight, bias, activation, gated, residual, output)
    return output


def runs_here(rows: int, inner: int) -> bool:
    """Returns whether a product of so many rows and inputs runs on our kernels, which add a residual at no cost.

    Depending on the outputs, some of more rows do as well (`fragment_linear.py`); some of over :data:`MOST_INPUTS` inputs do not.
    """
    return rows <= ROW_BLOCK or (inner <= SMALL_INPUTS and rows <= SMALL_ROWS)


def parts_for(rows: torch.Tensor, weight: torch.Tensor) -> int | None:
    """Returns in how many parts a plain product is better left to the next norm (`divided_linear.py`), `None` for :func:`linear`.

    Args:
        rows: (..., in).
        weight: (out, in).
    """
    columns, inner = weight.shape
    count = rows.numel() // inner
    if rows.dtype not in DTYPES or unavailable(rows.device) is not None or runs_here(count, inner):
        return None
    if gluon_unavailable() is None and choose_fragment_tile(count, columns, inner) is not None:
        return None
    return choose_parts(count, columns, inner)


def _library_linear(rows, weight, bias, activation, gated, residual) -> torch.Tensor:
    """Returns the vendor's product; it knows bias and GELU as an epilogue, which saves a pass over the MLP's widest tensor."""
    if activation == "gelu_tanh" and bias is not None and not gated and residual is None:
        flat = rows.reshape(-1, rows.shape[-1])
        product = torch._addmm_activation(bias, flat, weight.t(), use_gelu=True)
        return product.view(*rows.shape[:-1], -1)
    return linear_reference(rows, weight, bias, activation, gated, residual)


def choose_tiles(rows: int, columns: int, inner: int, gated: bool) -> Tiles:
    """Returns tile sizes for a product.

    From a sweep of some eighty settings a product (H200, shapes of GPT-Neo-125M and 1.3B, 32 rows): wide tiles as long as there
    are programs enough without dividing the inner dimension; a small model then takes narrow tiles before a division, a large one
    a division before narrow tiles. Holding a small model's weights in registers, as `gemv.py` does, was slower: the conversion to
    the tensor core's layout goes through shared memory anyway. `fragment_linear.py` loads them in that layout.
    """
    parts, widths = ((1, 4), (64, 32)) if inner >= 2048 else ((1, 2, 4), (64, 32, 16))
    row_blocks = triton.cdiv(rows, ROW_BLOCK)
    wide, splits = next(
        (
            (width, count)
            for count in parts
            for width in widths
            if triton.cdiv(columns, width) * count * row_blocks >= PROGRAMS
        ),
        (16, 4),
    )
    deep = 64 if wide == 16 else 128
    stage = 2 * deep * (wide * (2 if gated else 1) + _padded(rows))
    stages = min(8, SHARED_BYTES // stage, triton.cdiv(inner, deep * splits) + 1)
    return Tiles(wide, deep, splits, 4 if wide == 64 else 2, max(2, stages))


def _padded(rows: int) -> int:
    return min(ROW_BLOCK, max(16, triton.next_power_of_2(rows)))


@lru_cache
def arrivals(device: torch.device) -> torch.Tensor:
    """Returns the arrival counters of a device. Launches follow each other, and each leaves them at zero."""
    return torch.zeros(2**16, dtype=torch.int32, device=device)


def _launch(rows, weight, bias, activation, gated, residual, output) -> None:
    inner, columns = weight.shape[1], output.shape[-1]
    count = rows.numel() // inner
    tiles = choose_tiles(count, columns, inner, gated)
    blocks = triton.cdiv(columns, tiles.columns)
    padded = _padded(count)
    row_blocks = triton.cdiv(count, padded)
    partials = rows
    if tiles.splits > 1:
        cells = blocks * row_blocks * tiles.splits * tiles.columns * padded * (2 if gated else 1)
        partials = torch.empty(cells, dtype=torch.float32, device=rows.device)
    pdl = overlaps_launches(rows.device)
    _linear_kernel[(blocks, tiles.splits, row_blocks)](
        rows,
        weight,
        rows if bias is None else bias,
        rows if residual is None else residual,
        output,
        partials,
        arrivals(rows.device),
        count,
        columns,
        inner,
        BLOCK_ROWS=padded,
        BLOCK_COLUMNS=tiles.columns,
        BLOCK_INNER=tiles.inner,
        SPLITS=tiles.splits,
        STEPS=triton.cdiv(inner, tiles.inner * tiles.splits),
        ACTIVATION=ACTIVATIONS[activation],
        GATED=gated,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        EVEN=columns % tiles.columns == 0 and inner % (tiles.inner * tiles.splits) == 0,
        PREFETCH=min(PREFETCH, 1 << (triton.cdiv(inner, tiles.inner * tiles.splits).bit_length() - 1)),
        PDL=pdl,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **({"launch_pdl": True} if pdl else {}),
    )


@jit
def _linear_kernel(  # noqa: C901 - one kernel; its branches are compile-time
    input_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    output_ptr,
    partial_ptr,
    arrival_ptr,
    rows,
    columns,
    inner,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    SPLITS: tl.constexpr,
    STEPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    release_dependents(PDL)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    column = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cell_block = tl.program_id(2) * tl.num_programs(0) + tile
    start = split * STEPS * BLOCK_INNER
    weight_rows = weight_ptr + column.to(tl.int64)[:, None] * inner
    factor_rows = weight_ptr + (column + columns).to(tl.int64)[:, None] * inner
    column_in = column[:, None] < columns
    row_in = row[None, :] < rows
    if PREFETCH > 0 and PDL:
        LINES: tl.constexpr = (PREFETCH * BLOCK_INNER + 63) // 64
        # Clamped instead of masked: the instruction takes no mask.
        line = tl.minimum(start + tl.arange(0, LINES) * 64, inner - 1)
        inside = tl.minimum(column, columns - 1).to(tl.int64)
        prefetch(weight_ptr + inside[:, None] * inner + line[None, :])
        if GATED:
            prefetch(weight_ptr + (inside[:, None] + columns) * inner + line[None, :])
    wait_for_inputs(PDL)
    total = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), dtype=tl.float32)
    gate = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), dtype=tl.float32)
    for step in range(STEPS):
        at = start + step * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
        value = tl.load(
            input_ptr + row[None, :] * inner + at[:, None], mask=row_in & (at[:, None] < inner), other=0.0
        )
        if EVEN:
            weight = tl.load(weight_rows + at[None, :], eviction_policy="evict_first")
        else:
            weight = tl.load(weight_rows + at[None, :], mask=column_in & (at[None, :] < inner), other=0.0)
        total = tl.dot(weight, value, total)
        if GATED:
            if EVEN:
                weight = tl.load(factor_rows + at[None, :], eviction_policy="evict_first")
            else:
                weight = tl.load(factor_rows + at[None, :], mask=column_in & (at[None, :] < inner), other=0.0)
            gate = tl.dot(weight, value, gate)
    complete = True
    if SPLITS > 1:
        size: tl.constexpr = BLOCK_COLUMNS * BLOCK_ROWS
        width: tl.constexpr = size * (2 if GATED else 1)
        cell = tl.arange(0, BLOCK_COLUMNS)[:, None] * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
        mine = partial_ptr + (cell_block * SPLITS + split) * width
        tl.store(mine + cell, total, mask=row_in)
        if GATED:
            tl.store(mine + size + cell, gate, mask=row_in)
        tl.debug_barrier()
        complete = tl.atomic_add(arrival_ptr + cell_block, 1, sem="acq_rel") == SPLITS - 1
        if complete:
            tl.store(arrival_ptr + cell_block, 0)
            total = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), dtype=tl.float32)
            gate = tl.zeros((BLOCK_COLUMNS, BLOCK_ROWS), dtype=tl.float32)
            for other in range(SPLITS):
                theirs = partial_ptr + (cell_block * SPLITS + other) * width
                total += tl.load(theirs + cell, mask=row_in, other=0.0, cache_modifier=".cg")
                if GATED:
                    gate += tl.load(theirs + size + cell, mask=row_in, other=0.0, cache_modifier=".cg")
    if complete:
        if HAS_BIAS:
            total += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[:, None]
        total = activate(total, ACTIVATION)
        if GATED:
            total = total * gate
        place = row[None, :] * columns + column[:, None]
        if HAS_RESIDUAL:
            total += tl.load(residual_ptr + place, mask=row_in & column_in, other=0.0).to(tl.float32)
        tl.store(output_ptr + place, total.to(output_ptr.dtype.element_ty), mask=row_in & column_in)
