"""4-bit weights on a CPU for the few bfloat16 rows of a decode step: torch's own product, over a copy in its own layout.

Reading 4-bit weights back in front of each product costs a hundred times the product. torch multiplies them as they are, but
only in bfloat16 at a useful speed, and in a layout that depends on the processor, so it cannot be what a checkpoint holds:
`w = (q - 8) * scale + zero`, scales and zeros in bfloat16, one pair for each group of an output.

The copy costs the memory of the 4-bit weights once more, made at each layer's first use, and is refused above
:data:`COPY_LIMIT`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..quantizers.packing import GROUP_SIZES, MIDDLE_INT4, WeightFormat, unpack
from .quantized_linear import QuantizedLinear
from .tensor_version import nothing, place_and_version

COPY_LIMIT = 2**30
"""Bytes of 4-bit weights above which nothing is copied: a large model's could exhaust the memory."""
MOST_ROWS = 32
"""Rows up to which torch's product is used; its time grows with rows (measured: docs/quantisation.md)."""
OUTPUTS = 16
"""What torch wants to divide the number of outputs."""
VECTORISED = ("AVX2", "AVX512")
"""Processors on which that product is vectorised; on others it is slower than reading the weights back."""


def is_available() -> bool:
    """Returns whether this torch has the product, and this processor a fast one."""
    has = all(
        hasattr(torch, f"_{name}_for_cpu") for name in ("convert_weight_to_int4pack", "weight_int4pack_mm")
    )
    return has and torch.backends.cpu.get_cpu_capability() in VECTORISED


def copied_group(kind: WeightFormat, inner: int, outputs: int) -> int | None:
    """Returns the inputs of a group in torch's layout, or `None` for a weight that it cannot hold.

    Args:
        kind: the weight's format. One scale an output is repeated for groups of as many inputs as divide them.
        inner, outputs: its sizes.
    """
    if kind.bits != 4 or outputs % OUTPUTS:
        return None
    sizes = [kind.group_size] if kind.group_size else sorted(GROUP_SIZES, reverse=True)
    return next((size for size in sizes if inner % size == 0), None)


class _Copy:
    """A layer's weight in torch's layout, and what it was made from."""

    def __init__(self, layer: QuantizedLinear, size: int):
        self.sources = [(tensor, place_and_version(tensor)) for tensor in _stored(layer)]
        self.size, packed = size, layer.packed
        numbers = unpack(packed.weight)[:, : packed.inner].int()
        self.weight = torch._convert_weight_to_int4pack_for_cpu(numbers.contiguous(), 1)
        groups = packed.inner // size
        scale = packed.scale.float()
        zero = torch.zeros_like(scale) if packed.zero is None else (MIDDLE_INT4 - packed.zero.float()) * scale
        pairs = torch.stack([scale, zero], dim=2)[:, :groups].expand(-1, groups, -1)
        self.scales = pairs.transpose(0, 1).to(torch.bfloat16).contiguous()

    def holds(self, layer: QuantizedLinear) -> bool:
        """Returns whether nothing stored was replaced or written to since."""
        return all(
            now is then and place_and_version(now) == seen
            for now, (then, seen) in zip(_stored(layer), self.sources, strict=True)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the layer makes its own."""

    def __reduce__(self) -> tuple[Any, ...]:
        return nothing, ()

    def multiply(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        flat = rows.reshape(-1, rows.shape[-1])
        product = torch._weight_int4pack_mm_for_cpu(flat, self.weight, self.size, self.scales)
        product = product.view(*rows.shape[:-1], -1)
        return product if bias is None else product + bias


class RepackedLinear(QuantizedLinear):
    """A quantised layer that also keeps its 4-bit weight in torch's layout; made anew when the weight has changed."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns (..., out) from (..., in); torch's product for up to :data:`MOST_ROWS` bfloat16 rows on a CPU."""
        size = copied_group(self.kind, self.in_features, self.out_features)
        rows = input.numel() // input.shape[-1]
        fits = input.dtype == torch.bfloat16 and input.device.type == self.weight.device.type == "cpu"
        if size is None or not fits or not 0 < rows <= MOST_ROWS:
            return super().forward(input)
        copy = self.__dict__.get("_copy")
        if copy is None or not copy.holds(self):
            copy = self.__dict__["_copy"] = _Copy(self, size)
        return copy.multiply(input, self.bias)


def repack_linears(model: nn.Module) -> int:
    """Lets the 4-bit layers of a model on a CPU use torch's product; returns how many now do.

    Layers change class in place, names and weights stay. Nothing happens on another device, above :data:`COPY_LIMIT`, or where
    the product is missing or slow. The copy itself is left to each layer's first use, so a float32 model makes none.
    """
    found: list[Any] = [
        module
        for module in model.modules()
        if type(module) is QuantizedLinear
        and module.weight.device.type == "cpu"
        and copied_group(module.kind, module.in_features, module.out_features) is not None
    ]
    if not is_available() or sum(module.weight.nbytes for module in found) > COPY_LIMIT:
        return 0
    for module in found:
        module.__class__ = RepackedLinear
    return len(found)


def _stored(layer: QuantizedLinear) -> list[torch.Tensor]:
    return [layer._parameters[name] for name in ("weight", *layer.scale_names)]
