"""Normalisation with the residual addition in front of it, in one pass over the rows.

A decoder adds a block's output to the residual stream and normalises the sum for the next block. Apart, that is three passes and
two launches for a few kilobytes. Where that output is a product in parts (`divided_linear.py`), the parts are added here as well.
"""

from __future__ import annotations

import torch
from torch import nn

from .divided_linear import Parts
from .triton_support import (
    jit,
    overlaps_launches,
    release_dependents,
    tl,
    triton,
    unavailable,
    wait_for_inputs,
)


def settle(hidden: torch.Tensor, update: torch.Tensor | Parts | None) -> torch.Tensor:
    """Returns the residual stream with the update in it, both as :func:`add_norm` takes them."""
    if isinstance(update, Parts):
        update = update.sum(hidden.dtype)
    return hidden if update is None else hidden + update


def add_norm_reference(
    hidden: torch.Tensor, update: torch.Tensor | Parts | None, norm: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what :func:`add_norm` returns, by plain operations."""
    total = settle(hidden, update)
    return norm(total), total


def is_known(norm: nn.Module) -> bool:
    """Returns whether a normalisation layer is one that the kernel computes: LayerNorm, or RMSNorm as Llama has it."""
    if isinstance(norm, nn.LayerNorm):
        return norm.elementwise_affine and norm.bias is not None
    return type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon")


def add_norm(
    hidden: torch.Tensor, update: torch.Tensor | Parts | None, norm: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the normalised sum of residual stream and update, and the sum itself.

    Args:
        hidden: (..., features) residual stream, contiguous.
        update: (..., features) what the block before adds to it, or `None`; of a product in parts, their sum is rounded to the
            dtype of `hidden` before it is added, as a stored product is.
        norm: a layer for which :func:`is_known` holds.
    """
    if hidden.dtype == torch.float64 or unavailable(hidden.device) is not None:
        return add_norm_reference(hidden, update, norm)
    features = hidden.shape[-1]
    divided = update if isinstance(update, Parts) else None
    added = hidden if update is None else update if divided is None else divided.parts
    product_bias = None if divided is None else divided.bias
    normed = torch.empty_like(hidden)
    total = hidden if update is None else torch.empty_like(hidden)
    centred = isinstance(norm, nn.LayerNorm)
    pdl = overlaps_launches(hidden.device)
    block = triton.next_power_of_2(features)
    _add_norm_kernel[(hidden.numel() // features,)](
        hidden,
        added,
        norm.weight if product_bias is None else product_bias,
        norm.weight,
        norm.bias if centred else norm.weight,
        normed,
        total,
        features,
        norm.eps if centred else norm.variance_epsilon,
        BLOCK=block,
        CENTRED=centred,
        HAS_UPDATE=update is not None,
        PARTS=0 if divided is None else len(divided.parts),
        HAS_PRODUCT_BIAS=product_bias is not None,
        PDL=pdl,
        num_warps=max(1, min(8, block // 512)),
        **({"launch_pdl": True} if pdl else {}),
    )
    return normed, total


@jit
def _add_norm_kernel(
    hidden_ptr,
    update_ptr,
    product_bias_ptr,
    weight_ptr,
    bias_ptr,
    normed_ptr,
    total_ptr,
    features,
    epsilon,
    BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_PRODUCT_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    release_dependents(PDL)
    column = tl.arange(0, BLOCK)
    inside = column < features
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    bias = weight
    if CENTRED:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    product_bias = weight
    if HAS_PRODUCT_BIAS:
        product_bias = tl.load(product_bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    at = tl.program_id(0).to(tl.int64) * features + column
    wait_for_inputs(PDL)
    value = tl.load(hidden_ptr + at, mask=inside, other=0.0)
    if HAS_UPDATE:
        update = tl.load(update_ptr + at, mask=inside, other=0.0)
        if PARTS > 0:
            part_size = tl.num_programs(0).to(tl.int64) * features
            for part in tl.static_range(1, PARTS):
                update += tl.load(update_ptr + part * part_size + at, mask=inside, other=0.0)
            if HAS_PRODUCT_BIAS:
                update += product_bias
            update = update.to(total_ptr.dtype.element_ty)
        # Rounded as the addition of two stored tensors is.
        value = (value.to(tl.float32) + update.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, value, mask=inside)
    value = value.to(tl.float32)
    if CENTRED:
        value = tl.where(inside, value - tl.sum(value, 0) / features, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / features + epsilon)
    value = value * scale
    if CENTRED:  # noqa: SIM108 - Triton compiles the branch that is taken
        value = value * weight + bias
    else:
        # Llama's own rounding: to the stored dtype before the weight.
        value = value.to(normed_ptr.dtype.element_ty).to(tl.float32) * weight
    tl.store(normed_ptr + at, value.to(normed_ptr.dtype.element_ty), mask=inside)
