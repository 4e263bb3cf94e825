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

FEWEST_ROWS, MOST_ROWS, MOST_WIDE_ROWS = 33, 192, 128
FEWEST_COLUMNS, NARROW_COLUMNS, WIDE_COLUMNS, MOST_COLUMNS = 512, 1024, 2049, 2560
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

        inputs  outputs        49 rows               80                    112                   160
         2,048    2,048                     6.69  5.64  5.92     6.9   5.9   6.4     6.90  6.12  6.79
         8,192    2,048                    16.76 12.72 12.54    16.4  14.3  13.1    18.70 14.48 13.52
         3,072      768   7.4   5.4   4.7    8.2   5.7   5.1     8.4   5.8   5.2     8.5   6.0   5.3
         2,560    2,560   7.5   6.8   7.0    7.8   7.0   7.7     8.1   7.0   7.6     8.6   8.7   8.8
        10,240    2,560  19.7  18.3  17.1   20.3  17.9  18.4    21.2  18.1  18.7    23.8  24.1  21.0
         4,096    4,096  12.7  12.4  12.6   12.8  12.6  13.2    13.0  12.9  14.0    15.9  13.4  14.9

    (2,048 outputs under 112: 128 rows.) Products of 2,048 inputs and 6,144 or 8,192 outputs lost from being divided. Not
    measured: other sizes, more than 160 rows, float16 and other GPUs.
    """
    wide = columns >= WIDE_COLUMNS
    count = 4 if not wide and (columns <= NARROW_COLUMNS or inner >= DEEP_INPUTS) else 2
    gains = (
        FEWEST_ROWS <= rows <= (MOST_WIDE_ROWS if wide else MOST_ROWS)
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
