"""Rotary position embedding of the queries and keys of one step, in place in the product that made them.

Upstream's convention ("rotate half"): column i of a head turns together with column i + head_dim / 2. One program owns both
columns of a pair, reads them before it writes either, and so needs no second buffer.
"""

from __future__ import annotations

import torch

from huggingface.transformers.integrations.triton_support import (
    jit,
    overlaps_launches,
    release_dependents,
    tl,
    unavailable,
    wait_for_inputs,
)

PAIRS_PER_PROGRAM = 512
"""Four pairs for each of 128 threads: enough to hide the loads, and a single row still spreads over several programs."""


def apply_rotary_reference_(
    projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int
) -> None:
    """Does what `apply_rotary_` does, in plain PyTorch."""
    head_dim = cos.shape[-1]
    precise = torch.promote_types(projected.dtype, torch.float32)
    turned = projected[..., : (heads + kv_heads) * head_dim].unflatten(-1, (-1, head_dim))
    first, second = turned.to(precise).chunk(2, dim=-1)
    swapped = torch.cat([-second, first], dim=-1)
    cos, sin = cos.to(precise).unsqueeze(-2), sin.to(precise).unsqueeze(-2)
    turned.copy_(turned * cos + swapped * sin)


@jit
def _rotary_kernel(
    projected, cos, sin, rows, turned_heads, row_size, cos_batch_stride, cos_row_stride, sin_batch_stride, sin_row_stride,
    HALF: tl.constexpr, WIDTH: tl.constexpr, HEADS_PER_PROGRAM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Turns some heads of one row."""
    release_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_PER_PROGRAM + tl.arange(0, HEADS_PER_PROGRAM)
    pair = tl.arange(0, WIDTH)
    inside = (head < turned_heads)[:, None] & (pair < HALF)[None, :]
    first = projected + row * row_size + head[:, None] * (2 * HALF) + pair[None, :]
    cos += row // rows * cos_batch_stride + row % rows * cos_row_stride + pair
    sin += row // rows * sin_batch_stride + row % rows * sin_row_stride + pair
    wait_for_inputs(PDL)
    left = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(first + HALF, mask=inside, other=0.0).to(tl.float32)
    cos_left = tl.load(cos, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    cos_right = tl.load(cos + HALF, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    sin_left = tl.load(sin, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    sin_right = tl.load(sin + HALF, mask=pair < HALF, other=0.0).to(tl.float32)[None, :]
    kind = projected.dtype.element_ty
    tl.store(first, (left * cos_left - right * sin_left).to(kind), mask=inside)
    tl.store(first + HALF, (right * cos_right + left * sin_right).to(kind), mask=inside)


def apply_rotary_(
    projected: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int
) -> None:
    """Turns the queries and keys of a step in place; values stay as they are.

    A head (a, b) of two halves becomes (a, b) * cos + (-b, a) * sin, computed in float32.

    Args:
        projected: (batch, rows, (heads + 2 * kv_heads) * head_dim), query, key and value side by side, contiguous; float16,
            bfloat16 or float32. Modified in place.
        cos: (batch, rows, head_dim) of any floating dtype, as upstream's rotary embedding returns it; the last dimension
            contiguous, the batch may be 1 for all.
        sin: Likewise.
        heads: Query heads.
        kv_heads: Key heads.
    """
    batch, rows, row_size = projected.shape
    head_dim = cos.shape[-1]
    if row_size != (heads + 2 * kv_heads) * head_dim:
        raise ValueError(
            f"projected {tuple(projected.shape)} does not fit {heads} and {kv_heads} heads of {head_dim}; "
            "its last dimension must be (heads + 2 * kv_heads) * head_dim"
        )
    cos, sin = cos.expand(batch, rows, head_dim), sin.expand(batch, rows, head_dim)
    if unavailable(projected.device) is not None:
        apply_rotary_reference_(projected, cos, sin, heads, kv_heads)
        return
    half = head_dim // 2
    width = 1 << (half - 1).bit_length()
    heads_per_program = max(1, PAIRS_PER_PROGRAM // width)
    pdl = overlaps_launches(projected.device)
    _rotary_kernel[(batch * rows, -(-(heads + kv_heads) // heads_per_program))](
        projected, cos, sin, rows, heads + kv_heads, row_size, *cos.stride()[:2], *sin.stride()[:2],
        HALF=half, WIDTH=width, HEADS_PER_PROGRAM=heads_per_program, num_warps=4,
        PDL=pdl, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
