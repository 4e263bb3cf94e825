"""The language-model head's product for the rows of a step.

Up to 32 rows it is a product like others (`skinny_linear.py`). More are the vendor's library's, which wants rows of its output to
begin at multiples of 16 bytes: with GPT-2's 50,257 tokens they do not, and 64 rows took 243 us instead of some 55 (H200, 2,048
inputs). So they are written with a gap behind each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .skinny_linear import ROW_BLOCK, linear

ALIGNED = 8
"""Numbers of half precision in 16 bytes."""


def head_linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns `rows @ weight.T + bias`, (batch, rows, vocab) with a last dimension that is contiguous; rows may lie apart.

    Args:
        rows: (batch, rows, in), contiguous.
        weight: (vocab, in), contiguous.
        bias: (vocab,), or `None`.
    """
    vocab = len(weight)
    if rows.shape[0] * rows.shape[1] <= ROW_BLOCK:
        return linear(rows, weight, bias)
    if vocab % ALIGNED == 0:
        return F.linear(rows, weight, bias)
    flat = rows.flatten(0, 1)
    logits = flat.new_empty(len(flat), vocab + -vocab % ALIGNED)[:, :vocab]
    if bias is None:
        torch.mm(flat, weight.t(), out=logits)
    else:
        torch.addmm(bias, flat, weight.t(), out=logits)
    return logits.unflatten(0, rows.shape[:2])
