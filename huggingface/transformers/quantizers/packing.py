"""Weights as small integers: how they are rounded, packed and read back.

8 bits: one scale an output, `w = q * scale` with q in -127 .. 127. 4 bits: one scale an output, or one for each group of
consecutive inputs, without a zero point (`w = (q - 8) * scale`) or with one (`w = (q - zero) * scale`); q in 0 .. 15.

Four 4-bit numbers share 16 bits. They are not neighbours: a run of 128 inputs is cut into quarters of 32, and 16-bit word h holds
input h of each, the first quarter in the lowest bits::

    bits of word h     0 .. 3     4 .. 7     8 .. 11    12 .. 15
    input of the run   h          32 + h     64 + h     96 + h

So a kernel takes consecutive inputs out of consecutive words, two at a time with one instruction, and never interleaves. An
output's last run is filled up with weights of zero, whose groups have scales like others. 8-bit numbers lie alike: word h of 64
holds inputs h and 64 + h of a run. Nothing is filled up there, and inputs that are not whole runs lie in order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

GROUP_SIZES = (32, 64, 128)
RUN = 128
"""Inputs that are packed together; groups divide it."""
LARGEST_INT8, LARGEST_INT4, MIDDLE_INT4 = 127, 7, 8


@dataclass(frozen=True)
class WeightFormat:
    """How weights are stored.

    Attributes:
        bits: 8 or 4.
        group_size: inputs that share a scale; `None` for one scale an output, the only choice at 8 bits.
        zero_point: whether a group's numbers start at its least weight instead of being centred at zero.
    """

    bits: int
    group_size: int | None = None
    zero_point: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"weights are packed in 4 or 8 bits, not {self.bits}.")
        if self.group_size is not None and (self.bits == 8 or self.group_size not in GROUP_SIZES):
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise ValueError(
                f"group size {self.group_size} with {self.bits} bits: groups go with 4 bits and hold {sizes} inputs."
            )
        if self.zero_point and self.group_size is None:
            raise ValueError("a zero point goes with groups; give a group size.")

    def shapes(self, outputs: int, inner: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of `weight`, `weight_scale` and, with zero points, `weight_zero`."""
        if self.bits == 8:
            return {"weight": (outputs, inner), "weight_scale": (outputs, 1)}
        padded = runs(inner) * RUN
        groups = padded // self.group_size if self.group_size else 1
        zeros: dict[str, tuple[int, ...]] = {"weight_zero": (outputs, groups)} if self.zero_point else {}
        return {"weight": (outputs, padded // 2), "weight_scale": (outputs, groups), **zeros}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtypes of the stored tensors: group scales are as many as a group's weights are few, so they take two bytes."""
        scale = torch.float16 if self.group_size else torch.float32
        weight = torch.int8 if self.bits == 8 else torch.uint8
        return {"weight": weight, "weight_scale": scale, "weight_zero": torch.uint8}


def runs(inner: int) -> int:
    """Returns the number of runs of `inner` inputs, the last one filled up."""
    return -(-inner // RUN)


def quantize(weight: torch.Tensor, kind: WeightFormat) -> dict[str, torch.Tensor]:
    """Returns a weight's stored tensors, with the shapes and dtypes that the format names.

    Args:
        weight: (out, in) floating point.
        kind: how to store it.

    Raises:
        ValueError: a weight that is not finite, or too large for its scale's dtype.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinite numbers; restore the checkpoint.")
    outputs, inner = weight.shape
    values = weight.float().contiguous()
    if kind.bits == 8:
        scale = values.abs().amax(1, keepdim=True) / LARGEST_INT8
        numbers = _divided(values, scale).round_().to(torch.int8)
        return {"weight": pair(numbers), "weight_scale": scale}
    padded = runs(inner) * RUN
    values = torch.nn.functional.pad(values, (0, padded - inner))
    groups = values.view(outputs, padded // kind.group_size if kind.group_size else 1, -1)
    lowest, highest = groups.amin(2), groups.amax(2)
    if kind.zero_point:
        lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)  # zero stays a weight: the filling is
        scale = (highest - lowest) / 15
    else:
        scale = torch.maximum(-lowest, highest) / LARGEST_INT4
    stored = scale.to(kind.dtypes["weight_scale"])
    if not torch.isfinite(stored).all():
        raise ValueError(f"a weight of {float(weight.abs().max()):.3g} is too large for scales in float16.")
    scale = stored.float()  # rounded with the scale that will be read
    zero = torch.full_like(scale, MIDDLE_INT4)
    if kind.zero_point:
        zero = _divided(-lowest, scale).round_().clamp_(0, 15)
    least = 0 if kind.zero_point else MIDDLE_INT4 - LARGEST_INT4
    numbers = _divided(groups, scale[..., None]).add_(zero[..., None]).round_().clamp_(least, 15)
    tensors = {"weight": pack(numbers.view(outputs, -1)), "weight_scale": stored}
    return tensors | ({"weight_zero": zero.to(torch.uint8)} if kind.zero_point else {})


def _divided(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns values / scale; zero where the scale is, as it is where all weights are zero."""
    return torch.where(scale > 0, values / scale.clamp(min=torch.finfo(torch.float32).tiny), 0.0)


def dequantize(
    tensors: dict[str, torch.Tensor], kind: WeightFormat, inner: int, dtype: torch.dtype
) -> torch.Tensor:
    """Returns the (out, inner) weight that stored tensors stand for, in a dtype.

    The arithmetic is in float32; half precision rounds once, at the end.
    """
    scale = tensors["weight_scale"].float()
    if kind.bits == 8:
        return (unpair(tensors["weight"]).float() * scale).to(dtype)
    numbers = unpack(tensors["weight"]).float()
    numbers = numbers.view(*scale.shape, -1)  # (out, groups, inputs of a group)
    zero = tensors["weight_zero"].float()[..., None] if kind.zero_point else MIDDLE_INT4
    return numbers.sub_(zero).mul_(scale[..., None]).flatten(1)[:, :inner].to(dtype).contiguous()


def pair(values: torch.Tensor) -> torch.Tensor:
    """Returns (..., in) values in the order in which 8-bit weights lie."""
    if values.shape[-1] % RUN:
        return values
    return values.unflatten(-1, (-1, 2, RUN // 2)).transpose(-1, -2).flatten(-3)


def unpair(values: torch.Tensor) -> torch.Tensor:
    """Returns what :func:`pair` put in order."""
    if values.shape[-1] % RUN:
        return values
    return values.unflatten(-1, (-1, RUN // 2, 2)).transpose(-1, -2).flatten(-3)


def pack(numbers: torch.Tensor) -> torch.Tensor:
    """Returns (out, in / 2) bytes of (out, in) numbers from 0 to 15; `RUN` divides the inputs."""
    quarters = numbers.to(torch.uint8).view(len(numbers), -1, 2, 2, RUN // 4)
    two = quarters[:, :, :, 0] | (quarters[:, :, :, 1] << 4)  # (out, runs, bytes of a word, words)
    return two.transpose(2, 3).reshape(len(numbers), -1)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Returns what :func:`pack` packed: (out, in) uint8 from (out, in / 2)."""
    two = packed.view(len(packed), -1, RUN // 4, 2).transpose(2, 3)
    return torch.stack([two & 15, two >> 4], dim=3).reshape(len(packed), -1)
