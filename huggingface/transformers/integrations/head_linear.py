"""The language-model head's product for the rows of a step.

Up to 32 rows it is a product like others (`skinny_linear.py`). More are the vendor's library's, which is fast where outputs are a
multiple of 8, that is 16 bytes, and their rows begin at such multiples. GPT-2's 50,257 tokens are none: 64 rows took 248 us,
160 rows 490 (H200, bfloat16, 2,048 inputs); the first 50,256 of them, with a gap behind each row, take 57 and 65.
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
    rest = vocab % ALIGNED
    if not rest:
        return F.linear(rows, weight, bias)
    flat = rows.flatten(0, 1)
    logits = flat.new_empty(len(flat), vocab - rest + ALIGNED)[:, :vocab]
    for part in (slice(0, vocab - rest), slice(vocab - rest, vocab)):
        if bias is None:
            torch.mm(flat, weight[part].t(), out=logits[:, part])
        else:
            torch.addmm(bias[part], flat, weight[part].t(), out=logits[:, part])
    return logits.unflatten(0, rows.shape[:2])
