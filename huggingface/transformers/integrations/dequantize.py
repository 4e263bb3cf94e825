"""Packed weights read back as dense ones, for the vendor's library to multiply many rows with: a prompt.

By plain operations that is a chain of passes over float32 copies; here it is one pass that reads the packed bytes and writes half
precision. Nothing is converted: a small number q put at the end of a float32's mantissa, under the exponent that makes its last
bit worth one, *is* 2^23 + q, and a subtraction, which is exact, leaves q less its zero point. One multiplication and one rounding
follow, as in `packing.dequantize`, so both give the same bits.

At 4 bits a thread takes 16 bytes, eight words. Each holds the same place of the four quarters of a run (`packing.py` draws it),
so these are four times eight consecutive inputs: four stores of 16 bytes.
"""

from __future__ import annotations

import torch

from ..quantizers.packing import RUN, WeightFormat, dequantize, runs
from .triton_support import (
    jit,
    overlaps_launches,
    release_dependents,
    tl,
    triton,
    unavailable,
    wait_for_inputs,
)

RUNS = 32
"""Runs of 128 weights that a program reads: 32 weights a thread, enough bytes in flight without many registers."""
WARPS = 4


def dense_reference(
    tensors: dict[str, torch.Tensor], kind: WeightFormat, inner: int, dtype: torch.dtype
) -> torch.Tensor:
    """Returns what :func:`dense` returns, by plain operations."""
    return dequantize(tensors, kind, inner, dtype)


def dense(
    tensors: dict[str, torch.Tensor], kind: WeightFormat, inner: int, dtype: torch.dtype
) -> torch.Tensor:
    """Returns the (out, in) weight that stored tensors stand for, bit for bit as `packing.dequantize` does.

    Args:
        tensors: `weight`, `weight_scale` and, with zero points, `weight_zero`; contiguous, of the format's shapes.
        kind: their format.
        inner: inputs, the filling of the last run left out. Stores are wide where 16 divides them.
        dtype: float32, bfloat16 or float16; others are computed by plain operations.
    """
    weight, scale = tensors["weight"], tensors["weight_scale"]
    known = dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not known or unavailable(weight.device) is not None:
        return dense_reference(tensors, kind, inner, dtype)
    outputs, stretches = len(weight), runs(inner)
    block = min(RUNS, stretches & -stretches)  # the largest power of two that divides them
    rows, blocks = RUNS // block, stretches // block
    output = torch.empty(outputs, inner, dtype=dtype, device=weight.device)
    pdl = overlaps_launches(weight.device)
    paired = kind.bits == 8 and inner % RUN == 0
    _dense_kernel[(triton.cdiv(outputs, rows) * blocks,)](
        weight.view(torch.int16 if paired or kind.bits == 4 else torch.uint8),
        scale,
        tensors.get("weight_zero", scale),
        output,
        outputs,
        inner,
        stretches,
        BLOCK_ROWS=rows,
        BLOCK_RUNS=block,
        BLOCKS=blocks,
        PARTS=RUN // kind.group_size if kind.group_size else 1,
        BITS=kind.bits,
        PAIRED=paired,
        GROUPED=kind.group_size is not None,
        ZERO=kind.zero_point,
        MASKED=outputs % rows != 0 or inner % RUN != 0,
        PDL=pdl,
        num_warps=WARPS,
        **({"launch_pdl": True} if pdl else {}),
    )
    return output


@jit
def _number(bits, zero):
    """Returns float32 q - zero of the number q in the lowest eight bits of int32, the others of which are 0."""
    return (bits ^ 0x4B000000).to(tl.float32, bitcast=True) - (zero + 8388608.0)


@jit
def _read(pointers, valid, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=valid, other=0)
    return tl.load(pointers)


@jit
def _write(pointers, value, valid, MASKED: tl.constexpr):
    value = value.to(pointers.dtype.element_ty)
    if MASKED:
        tl.store(pointers, value, mask=valid)
    else:
        tl.store(pointers, value)


@jit
def _dense_kernel(
    weight_ptr, scale_ptr, zero_ptr, output_ptr,
    outputs, inner, runs,
    BLOCK_ROWS: tl.constexpr, BLOCK_RUNS: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr,
    PAIRED: tl.constexpr, GROUPED: tl.constexpr, ZERO: tl.constexpr, MASKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Writes `BLOCK_RUNS` runs of `BLOCK_ROWS` outputs; `weight_ptr` holds int16 words, or bytes where 8 bits are not `PAIRED`.

    `BLOCKS` of them make up an output, a constant because a division would delay every read. `MASKED`: outputs or inputs do not
    divide into blocks and runs. `PARTS`: groups in a run.
    """
    release_dependents(PDL)
    row = tl.program_id(0) // BLOCKS * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None, None]
    run = tl.program_id(0) % BLOCKS * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)[None, :, None]
    inside = row < outputs
    target = output_ptr + row.to(tl.int64) * inner
    WIDTH: tl.constexpr = 32 if BITS == 4 else 64 if PAIRED else 128
    stretch = tl.arange(0, WIDTH)[None, None, :]
    at = run * 128 + stretch
    if not GROUPED:
        scale = _read(scale_ptr + row, inside, MASKED)
    if PAIRED:
        words = _read(weight_ptr + (row.to(tl.int64) * runs + run) * 64 + stretch, inside, MASKED).to(
            tl.int32
        )
        wait_for_inputs(PDL)  # what was in the output's place may still be read
        # With the sign bit turned over a signed byte is the number plus 128.
        for place in tl.static_range(2):
            number = _number(((words >> (8 * place)) & 255) ^ 128, 128.0)
            _write(target + at + 64 * place, number * scale, inside, MASKED)
    elif BITS == 8:
        within = inside & (at < inner)
        # As many bytes a thread as numbers that it stores at once; with more, threads would exchange them.
        source = tl.max_contiguous(weight_ptr + row.to(tl.int64) * inner + at, [1, 1, 8])
        bits = _read(source, within, MASKED)
        wait_for_inputs(PDL)
        _write(target + at, _number(bits.to(tl.int32) ^ 128, 128.0) * scale, within, MASKED)
    else:
        words = _read(weight_ptr + (row.to(tl.int64) * runs + run) * 32 + stretch, inside, MASKED).to(
            tl.int32
        )
        group = (row.to(tl.int64) * runs + run) * PARTS
        wait_for_inputs(PDL)
        zero = 8.0
        for place in tl.static_range(4):
            # The index of the group that a quarter belongs to changes with every 4 / PARTS quarters.
            if GROUPED and place % (4 // PARTS) == 0:
                scale = _read(scale_ptr + group + place * PARTS // 4, inside, MASKED).to(tl.float32)
                if ZERO:
                    zero = _read(zero_ptr + group + place * PARTS // 4, inside, MASKED).to(tl.float32)
            within = inside & (at + 32 * place < inner)
            number = _number((words >> (4 * place)) & 15, zero)
            _write(target + at + 32 * place, number * scale, within, MASKED)
