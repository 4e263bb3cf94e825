"""Linear layers of a single row: plain decoding at batch size 1.

One row leaves the tensor cores nothing to do. Each program owns a few outputs and asks for all of their weights at once, in
registers, before it waits for its input; so the memory streams on while the kernel in front finishes, and nothing is staged in
shared memory. Every program also normalises the row itself: reading a few kilobytes again costs less than a launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .triton_support import jit, overlaps_launches, release_dependents, tl, triton, wait_for_inputs

PROGRAMS = 700
"""Programs wanted of a product: on an H200 the best of twenty settings lay between 500 and 1,000 from 768 to 8,192 outputs."""
ELEMENTS = 16384
"""Most weights a program holds at a time; four warps keep them in registers."""
WARPS = 4
WIDEST_NORM = 4096
"""Inputs a program can normalise: it must hold the whole row."""


def choose_block(columns: int, inner: int, gated: bool) -> tuple[int, int]:
    """Returns how many outputs a program computes and how many inputs it holds at a time."""
    width = min(WIDEST_NORM, triton.next_power_of_2(inner))
    most = max(1, ELEMENTS // (width * (2 if gated else 1)))
    wanted = max(1, columns // PROGRAMS)
    return min(most, 8, 1 << (wanted.bit_length() - 1)), width


def gemv(
    row: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: int,
    gated: bool,
    residual: torch.Tensor | None,
    norm: nn.Module | None,
    output: torch.Tensor,
) -> None:
    """Writes what `skinny_linear.linear` returns for one row to `output`; its arguments are explained there.

    Args:
        row: (..., in), one row in all.
        weight: (out, in), or (2 * out, in) where gated.
        bias: (out,) or `None`.
        activation: number of the activation, see `skinny_linear.ACTIVATIONS`.
        gated: whether the activated half is multiplied with the other.
        residual: (..., out) or `None`.
        norm: LayerNorm or RMSNorm in front, or `None`.
        output: (..., out).
    """
    inner, columns = weight.shape[1], output.shape[-1]
    block, width = choose_block(columns, inner, gated)
    centred = isinstance(norm, nn.LayerNorm)
    scale: Any = row if norm is None else norm.weight
    shift: Any = norm.bias if norm is not None and centred else scale
    epsilon: Any = 0.0 if norm is None else norm.eps if centred else norm.variance_epsilon
    pdl = overlaps_launches(row.device)
    gemv_kernel[(triton.cdiv(columns, block),)](
        row,
        weight,
        row if bias is None else bias,
        row if residual is None else residual,
        scale,
        shift,
        output,
        columns,
        inner,
        epsilon,
        BLOCK_COLUMNS=block,
        BLOCK_INNER=width,
        CHUNKS=triton.cdiv(inner, width),
        NORM=0 if norm is None else 1 if centred else 2,
        ACTIVATION=activation,
        GATED=gated,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        EVEN=columns % block == 0 and inner % width == 0,
        PDL=pdl,
        num_warps=WARPS,
        **({"launch_pdl": True} if pdl else {}),
    )


@jit
def activate(value, ACTIVATION: tl.constexpr):
    """Returns an activation of float32 values by its number: 0 none, 1 GELU by tanh, 2 SiLU."""
    if ACTIVATION == 1:
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        # tanh by its exponential: the library function is slower and no more exact in half precision.
        value = 0.5 * value * (2.0 - 2.0 / (1.0 + tl.exp(2.0 * inner)))
    if ACTIVATION == 2:
        value = value / (1.0 + tl.exp(-value))
    return value


@jit
def _normalised(row_ptr, scale_ptr, shift_ptr, at, inside, features, epsilon, NORM: tl.constexpr):
    """Returns the whole row in float32, normalised and rounded as a norm layer's output is."""
    value = tl.load(row_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if NORM > 0:
        scale = tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if NORM == 1:
            shift = tl.load(shift_ptr + at, mask=inside, other=0.0).to(tl.float32)
            value = tl.where(inside, value - tl.sum(value, 0) / features, 0.0)
        value = value / tl.sqrt(tl.sum(value * value, 0) / features + epsilon)
        if NORM == 1:  # noqa: SIM108 - Triton compiles the branch that is taken
            value = value * scale + shift
        else:
            # Llama's own rounding: to the stored dtype before the weight.
            value = value.to(row_ptr.dtype.element_ty).to(tl.float32) * scale
        value = value.to(row_ptr.dtype.element_ty).to(tl.float32)
    return value


@jit
def gemv_kernel(
    row_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    scale_ptr,
    shift_ptr,
    output_ptr,
    columns,
    inner,
    epsilon,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    CHUNKS: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Computes `BLOCK_COLUMNS` outputs; a norm needs the whole row in one chunk."""
    release_dependents(PDL)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    at = tl.arange(0, BLOCK_INNER)
    weights = weight_ptr + column.to(tl.int64)[:, None] * inner + at[None, :]
    factors = weights + columns.to(tl.int64) * inner
    valid = (column[:, None] < columns) & (at[None, :] < inner)
    weight = tl.load(weights) if EVEN else tl.load(weights, mask=valid, other=0.0)
    if GATED:
        factor = tl.load(factors) if EVEN else tl.load(factors, mask=valid, other=0.0)
    wait_for_inputs(PDL)
    value = _normalised(row_ptr, scale_ptr, shift_ptr, at, at < inner, inner, epsilon, NORM)
    total = tl.sum(weight.to(tl.float32) * value[None, :], 1)
    if GATED:
        second = tl.sum(factor.to(tl.float32) * value[None, :], 1)
    for chunk in tl.static_range(1, CHUNKS):
        further = chunk * BLOCK_INNER
        left = at < inner - further
        value = tl.load(row_ptr + further + at, mask=left, other=0.0).to(tl.float32)
        valid = (column[:, None] < columns) & left[None, :]
        weight = tl.load(weights + further) if EVEN else tl.load(weights + further, mask=valid, other=0.0)
        total += tl.sum(weight.to(tl.float32) * value[None, :], 1)
        if GATED:
            factor = tl.load(factors + further) if EVEN else tl.load(factors + further, mask=valid, other=0.0)
            second += tl.sum(factor.to(tl.float32) * value[None, :], 1)
    inside = column < columns
    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    total = activate(total, ACTIVATION)
    if GATED:
        total = total * second
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(output_ptr + column, total.to(output_ptr.dtype.element_ty), mask=inside)
