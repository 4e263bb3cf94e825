"""Linear layers of a single row: plain decoding at batch size 1.

One row leaves the tensor cores nothing to do. Each program owns a few outputs and asks for all of their weights at once, in
registers, before it waits for its input; so the memory streams on while the kernel in front finishes, and nothing is staged in
shared memory. Every program also normalises the row itself: reading a few kilobytes again costs less than a launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .triton_support import jit, overlaps_launches, release_dependents, tl, triton, wait_for_inputs

PROGRAMS = 700
"""Programs wanted of a product: on an H200 the best of twenty settings lay between 500 and 1,000 from 768 to 8,192 outputs."""
ELEMENTS = 16384
"""Most weights a program holds at a time; four warps keep them in registers."""
WARPS = 4
LARGEST_WHOLE = 2048
"""Up to this power of two a row is one chunk, with idle lanes if it is shorter; a longer one is a chunk and a tail."""
WIDEST_NORM = 4096
"""Inputs a program can normalise: it must hold the whole row."""


@dataclass(frozen=True)
class Blocks:
    """How a product is divided.

    Attributes:
        columns: outputs a program computes.
        inner: inputs it reads at a time, a power of two.
        chunks: how often it does so.
        tail: a power of two that covers what is left of the inputs, 0 for nothing. 2,560 inputs are 2,048 and 512, not 4,096.
    """

    columns: int
    inner: int
    chunks: int
    tail: int


def choose_blocks(columns: int, inner: int, gated: bool) -> Blocks:
    """Returns how a product of `columns` outputs and `inner` inputs is divided."""
    widest = triton.next_power_of_2(inner)
    width = min(WIDEST_NORM, widest if widest <= LARGEST_WHOLE else 1 << (inner.bit_length() - 1))
    rest = inner % width if inner > width else 0
    tail = triton.next_power_of_2(rest) if rest else 0
    if tail == width < WIDEST_NORM:  # twice the width covers both
        width, tail = 2 * width, 0
    most = max(1, ELEMENTS // ((width + tail) * (2 if gated else 1)))
    most = 1 << (most.bit_length() - 1)
    wanted = max(1, columns // PROGRAMS)
    return Blocks(min(most, 8, 1 << (wanted.bit_length() - 1)), width, max(1, inner // width), tail)


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
    blocks = choose_blocks(columns, inner, gated)
    centred = isinstance(norm, nn.LayerNorm)
    scale: Any = row if norm is None else norm.weight
    shift: Any = norm.bias if norm is not None and centred else scale
    epsilon: Any = 0.0 if norm is None else norm.eps if centred else norm.variance_epsilon
    pdl = overlaps_launches(row.device)
    gemv_kernel[(triton.cdiv(columns, blocks.columns),)](
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
        BLOCK_COLUMNS=blocks.columns,
        BLOCK_INNER=blocks.inner,
        CHUNKS=blocks.chunks,
        TAIL=blocks.tail,
        NORM=0 if norm is None else 1 if centred else 2,
        ACTIVATION=activation,
        GATED=gated,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        EVEN=columns % blocks.columns == 0 and inner == blocks.inner * blocks.chunks + blocks.tail,
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
def _load(pointers, valid, EVEN: tl.constexpr):
    return tl.load(pointers) if EVEN else tl.load(pointers, mask=valid, other=0.0)


@jit
def _scaled(value, row_ptr, scale_ptr, shift_ptr, at, inside, spread, NORM: tl.constexpr):
    """Returns (centred) inputs in float32, normalised and rounded as a norm layer's output is."""
    scale = tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value = value / spread
    if NORM == 1:
        value = value * scale + tl.load(shift_ptr + at, mask=inside, other=0.0).to(tl.float32)
    else:
        # Llama's own rounding: to the stored dtype before the weight.
        value = value.to(row_ptr.dtype.element_ty).to(tl.float32) * scale
    return value.to(row_ptr.dtype.element_ty).to(tl.float32)


@jit
def gemv_kernel(  # noqa: C901 - one kernel; its branches are compile-time
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
    TAIL: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Computes `BLOCK_COLUMNS` outputs; a norm needs the whole row in one chunk and the tail."""
    release_dependents(PDL)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    at = tl.arange(0, BLOCK_INNER)
    weights = weight_ptr + column.to(tl.int64)[:, None] * inner
    factors = weight_ptr + (column + columns).to(tl.int64)[:, None] * inner
    inside = column < columns
    within = at < inner
    valid = inside[:, None] & within[None, :]
    weight = _load(weights + at[None, :], valid, EVEN)
    if GATED:
        factor = _load(factors + at[None, :], valid, EVEN)
    if TAIL > 0:
        last = CHUNKS * BLOCK_INNER + tl.arange(0, TAIL)
        left = last < inner
        valid = inside[:, None] & left[None, :]
        last_weight = _load(weights + last[None, :], valid, EVEN)
        if GATED:
            last_factor = _load(factors + last[None, :], valid, EVEN)
    wait_for_inputs(PDL)
    value = tl.load(row_ptr + at, mask=within, other=0.0).to(tl.float32)
    if TAIL > 0:
        last_value = tl.load(row_ptr + last, mask=left, other=0.0).to(tl.float32)
    if NORM == 1:
        mean = tl.sum(value, 0)
        if TAIL > 0:
            mean += tl.sum(last_value, 0)
        mean /= inner
        value = tl.where(within, value - mean, 0.0)
        if TAIL > 0:
            last_value = tl.where(left, last_value - mean, 0.0)
    if NORM > 0:
        spread = tl.sum(value * value, 0)
        if TAIL > 0:
            spread += tl.sum(last_value * last_value, 0)
        spread = tl.sqrt(spread / inner + epsilon)
        value = _scaled(value, row_ptr, scale_ptr, shift_ptr, at, within, spread, NORM)
        if TAIL > 0:
            last_value = _scaled(last_value, row_ptr, scale_ptr, shift_ptr, last, left, spread, NORM)
    total = tl.sum(weight.to(tl.float32) * value[None, :], 1)
    if GATED:
        second = tl.sum(factor.to(tl.float32) * value[None, :], 1)
    if TAIL > 0:
        total += tl.sum(last_weight.to(tl.float32) * last_value[None, :], 1)
        if GATED:
            second += tl.sum(last_factor.to(tl.float32) * last_value[None, :], 1)
    for chunk in tl.static_range(1, CHUNKS):
        further = chunk * BLOCK_INNER + at
        value = tl.load(row_ptr + further).to(tl.float32)
        weight = _load(weights + further[None, :], inside[:, None], EVEN)
        total += tl.sum(weight.to(tl.float32) * value[None, :], 1)
        if GATED:
            factor = _load(factors + further[None, :], inside[:, None], EVEN)
            second += tl.sum(factor.to(tl.float32) * value[None, :], 1)
    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    total = activate(total, ACTIVATION)
    if GATED:
        total = total * second
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(output_ptr + column, total.to(output_ptr.dtype.element_ty), mask=inside)
