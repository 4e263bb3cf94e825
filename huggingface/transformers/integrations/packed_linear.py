"""Linear layers on a CPU for the few rows of a draft tree.

`F.linear` in float32 is a matrix-vector product for one row and a general matrix product for more; at 4 to 40 rows the general
one is several times slower than the arithmetic needs. oneDNN's product over a weight that was laid out for it once is not. For
one row of a small weight the plain product stays ahead, so rows decide.

The packed weight is a copy: packing costs the memory of the packed layers once more, and is refused above :data:`PACK_LIMIT`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

PACK_LIMIT = 2**30
"""Bytes of weights above which nothing is packed: a copy of a large model could exhaust the memory."""
LARGE_WEIGHT = 2**20
"""Elements from which the packed product wins at one row too (measured on a 2-core server CPU: equal near 0.8 million)."""


def packed_linear_reference(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Returns `rows @ weight.T + bias`, (..., out) from (..., in); what the packed product must equal."""
    return F.linear(rows, weight, bias)


def is_available() -> bool:
    """Returns whether this torch has oneDNN's product over packed weights."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class PackedLinear(nn.Linear):
    """A linear layer that also keeps its weight packed; the packed copy is made anew when the weight has changed."""

    _packed: torch.Tensor | None = None
    _packed_from: tuple[int, int] | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns (batch, rows, out) from (batch, rows, in); plain where gradients are on or the weight is not float32."""
        weight = self.weight
        rows = input.shape[-2] if input.dim() > 1 else 1
        if (rows == 1 and weight.numel() < LARGE_WEIGHT) or torch.is_grad_enabled():
            return F.linear(input, weight, self.bias)
        if weight.dtype != torch.float32 or weight.device.type != "cpu" or input.dtype != torch.float32:
            return F.linear(input, weight, self.bias)
        source = (weight.data_ptr(), weight._version)
        if self._packed_from != source:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
            self._packed_from = source
        return torch.ops.mkldnn._linear_pointwise(input, self._packed, self.bias, "none", [], "")


def pack_linears(model: nn.Module) -> int:
    """Lets every plain linear layer of a float32 model on a CPU use packed weights; returns how many now do.

    Layers change class in place, names and weights stay. Nothing happens elsewhere: on another device, in another dtype, above
    :data:`PACK_LIMIT`, or where torch lacks the product. Packing itself is left to each layer's first use.
    """
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    eligible = [m for m in linears if m.weight.device.type == "cpu" and m.weight.dtype == torch.float32]
    if not is_available() or sum(module.weight.nbytes for module in eligible) > PACK_LIMIT:
        return 0
    for module in eligible:
        module.__class__ = PackedLinear
    return len(eligible)
