"""Products whose inner dimension is divided, and whose parts the next norm adds.

With some 33 to 200 rows (the layers with stream rows, short prompts) a product of few outputs leaves the vendor's library with
fewer tiles than the card has multiprocessors. Computed as a batch of products, each over its part of the inner dimension, it
fills the card, and the sum that is then missing costs nothing extra where a norm follows: `fused_norm.add_norm` reads what the
product adds to the residual stream anyway. So the parts stay float32 and unadded until then::

    rows (n, i), weight (o, i)  ->  parts (2, n, o)  ->  norm(hidden + (parts[0] + parts[1] + bias)), hidden + (...)

Rows and weights are read where they are, as views with strides. Written for this project.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FEWEST_ROWS, MOST_ROWS = 33, 192
FEWEST_COLUMNS, MOST_COLUMNS = 512, 2048
LEAST_INPUTS, DEEP_INPUTS = 2048, 8192
ALIGNED = 8
"""Inputs in 16 bytes, at a multiple of which every part has to start for the library's faster kernels."""


@dataclass(frozen=True)
class Parts:
    """An unfinished product.

    Attributes:
        parts: (count, ..., out) float32 products over consecutive parts of the inner dimension, contiguous.
        bias: (out,) to be added to their sum, or `None`.
    """

    parts: torch.Tensor
    bias: torch.Tensor | None = None

    def sum(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the product, (..., out): parts added in their order, then the bias, rounded once."""
        total = self.parts[0]
        for part in self.parts[1:]:
            total = total + part
        return (total if self.bias is None else total + self.bias.float()).to(dtype)


def choose_parts(rows: int, columns: int, inner: int) -> int | None:
    """Returns in how many parts a product (rows, inner) x (columns, inner) is best left, or `None` where it is not divided.

    Microseconds of the library's product with bias, and of 2 and 4 parts without adding them (H200, bfloat16, other weights in
    every call)::

        inputs  outputs        64 rows               80                    96                   128                   160
         2,048    2,048   6.52  5.51  5.59    6.69  5.64  5.92     6.72  5.70  6.05     6.91  5.86  6.37     6.90  6.12  6.79
         8,192    2,048  15.18 12.35 12.43   16.76 12.72 12.54    15.95 12.83 12.55    16.43 14.32 13.08    18.70 14.48 13.52

    Products of 2,048 inputs and 6,144 or 8,192 outputs lost from being divided. Not measured: other inputs and outputs, fewer
    than 64 rows or more than 160, float16 and other GPUs.
    """
    count = 4 if inner >= DEEP_INPUTS else 2
    gains = (
        FEWEST_ROWS <= rows <= MOST_ROWS
        and FEWEST_COLUMNS <= columns <= MOST_COLUMNS
        and inner >= LEAST_INPUTS
        and inner % (ALIGNED * count) == 0
    )
    return count if gains else None


def divided_linear_reference(
    rows: torch.Tensor, weight: torch.Tensor, count: int, bias: torch.Tensor | None = None
) -> Parts:
    """Returns what :func:`divided_linear` returns, by plain operations in float32."""
    pairs = zip(rows.float().chunk(count, dim=-1), weight.float().chunk(count, dim=-1), strict=True)
    return Parts(torch.stack([part @ columns.t() for part, columns in pairs]), bias)


def divided_linear(
    rows: torch.Tensor, weight: torch.Tensor, count: int, bias: torch.Tensor | None = None
) -> Parts:
    """Returns `rows @ weight.T + bias` in `count` parts, not yet added.

    Args:
        rows: (..., in), contiguous.
        weight: (out, in), contiguous, of the same dtype.
        count: parts of the inner dimension.
        bias: (out,), or `None`.

    Raises:
        ValueError: the inner dimension is no multiple of `count`.
    """
    columns, inner = weight.shape
    if inner % count:
        raise ValueError(f"{inner} inputs cannot be divided into {count} equal parts.")
    if rows.device.type != "cuda" or rows.dtype not in (torch.float16, torch.bfloat16):
        return divided_linear_reference(rows, weight, count, bias)
    parts = torch.bmm(
        rows.view(-1, count, inner // count).transpose(0, 1),
        weight.view(columns, count, inner // count).permute(1, 2, 0),
        out_dtype=torch.float32,
    )
    return Parts(parts.view(count, *rows.shape[:-1], columns), bias)
