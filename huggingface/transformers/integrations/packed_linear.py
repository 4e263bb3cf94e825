"""Linear layers on a CPU for the few rows of a draft tree.

`F.linear` in float32 is a matrix-vector product for one row and a general matrix product for more; at 4 to 40 rows the general
one is several times slower than the arithmetic needs. oneDNN's product over a weight that was laid out for it once is not. For
one row of a small weight the plain product stays ahead, so rows decide.

The packed weight is a copy: packing costs the memory of the packed layers once more, and is refused above :data:`PACK_LIMIT`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from .tensor_version import nothing, place_and_version

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


def outputs_first(layer: nn.Linear | Conv1D) -> torch.Tensor:
    """Returns a view of a layer's weight as (out, in), without its gradient; GPT-2's `Conv1D` keeps it as (in, out)."""
    weight = layer.weight.detach()
    return weight.t() if isinstance(layer, Conv1D) else weight


class _Packed:
    """Packed copies of the weights of some layers, side by side, and what they were made from.

    A weight that is written to through its `.data` does not tell; what is written there is not seen.
    """

    def __init__(self, layers: tuple[nn.Linear | Conv1D, ...]):
        self.sources = [(layer.weight, *place_and_version(layer.weight)) for layer in layers]
        weights = [outputs_first(layer) for layer in layers]
        weight = weights[0].contiguous() if len(layers) == 1 else torch.cat(weights)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.widths = [len(weight) for weight in weights]

    def holds(self, layers: tuple[nn.Linear | Conv1D, ...]) -> bool:
        """Returns whether no weight was replaced or written to since."""
        # Asked before every product: no calls that can be left out.
        for layer, (weight, place, version) in zip(layers, self.sources, strict=True):
            if layer._parameters["weight"] is not weight or weight.data_ptr() != place:
                return False
            if not weight.is_inference() and weight._version != version:
                return False
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the layer packs its own weight; torch cannot copy a packed one."""

    def __reduce__(self) -> tuple[Any, ...]:
        return nothing, ()

    def multiply(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(rows, self.weight, bias, "none", [], "")


class PackedLinear(nn.Linear):
    """A linear layer that also keeps its weight packed; the packed copy is made anew when the weight has changed."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns (batch, rows, out) from (batch, rows, in); plain where gradients are on or the weight is not float32."""
        weight: Any = self._parameters["weight"]
        if not _pays(weight, input):
            return F.linear(input, weight, self.bias)
        return _packed(self, "_own", (self,)).multiply(input, self.bias)


class PackedConv1D(Conv1D):
    """The same for GPT-2's linear layer, whose weight is (in, out)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (batch, rows, out) from (batch, rows, in); plain where :class:`PackedLinear` would be."""
        weight: Any = self._parameters["weight"]
        if not _pays(weight, x):
            return super().forward(x)
        return _packed(self, "_own", (self,)).multiply(x, self.bias)


PACKED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: PackedLinear, Conv1D: PackedConv1D}
"""Linear layers that can be packed, and what they become."""


def _pays(weight: torch.Tensor, rows: torch.Tensor) -> bool:
    count = rows.shape[-2] if rows.dim() > 1 else 1
    return (count > 1 or weight.numel() >= LARGE_WEIGHT) and _packable(weight, rows)


def _packable(weight: torch.Tensor, rows: torch.Tensor) -> bool:
    return (
        weight.dtype == rows.dtype == torch.float32
        and weight.device.type == "cpu"
        and not torch.is_grad_enabled()
    )


def _packed(owner: nn.Linear | Conv1D, name: str, layers: tuple[nn.Linear | Conv1D, ...]) -> _Packed:
    kept = owner.__dict__.get(name)
    if kept is None or not kept.holds(layers):
        kept = owner.__dict__[name] = _Packed(layers)
    return kept


def project_together(layers: tuple[nn.Linear, ...], rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns what each layer makes of the same rows; one product for all where they are packed.

    Args:
        layers: linear layers without bias, of equal input size.
        rows: (batch, rows, in).
    """
    first = layers[0]
    together = (
        rows.shape[-2] > 1
        and all(type(layer) is PackedLinear and layer.bias is None for layer in layers)
        and not any(layer._forward_hooks for layer in layers)
        and _packable(first.weight, rows)
    )
    if not together:
        return tuple(layer(rows) for layer in layers)
    packed = _packed(first, "_together", layers)
    return packed.multiply(rows, None).split(packed.widths, dim=-1)


def pack_linears(model: nn.Module) -> int:
    """Lets every plain linear layer of a float32 model on a CPU use packed weights; returns how many now do.

    Layers change class in place, names and weights stay. Nothing happens elsewhere: on another device, in another dtype, above
    :data:`PACK_LIMIT`, or where torch lacks the product. Packing itself is left to each layer's first use.
    """
    linears: list[Any] = [module for module in model.modules() if type(module) in PACKED]
    eligible = [m for m in linears if m.weight.device.type == "cpu" and m.weight.dtype == torch.float32]
    if not is_available() or sum(module.weight.nbytes for module in eligible) > PACK_LIMIT:
        return 0
    for module in eligible:
        module.__class__ = PACKED[type(module)]
    return len(eligible)
