"""Linear layers over weights of 8 or 4 bits: the module that holds them, and their products.

Four kernels: one row on the tensor cores (`quantized_row_mma.py`) or, in formats and sizes that do not go there, in float32
(`quantized_gemv.py`); few rows of most formats (`quantized_fragment.py`); and what remains of up to :data:`MANY_ROWS` rows
(`quantized_linear_kernels.py`). Above that, as in a prompt, reading weights is no longer what a product costs; they are turned
into the inputs' dtype (`dequantize.py`) and the vendor's library multiplies. The same happens on a CPU and in float32, where the
kernels would gain nothing, except that torch's own product of 8-bit weights is used where it is faster: one row in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..quantizers.packing import RUN, WeightFormat, dequantize, pair, quantize, runs
from .dequantize import dense
from .fused_norm import add_norm
from .quantized_fragment import fragment_kernel
from .quantized_gemv import quantized_row_kernel
from .quantized_linear_kernels import quantized_rows_kernel
from .quantized_linear_tiles import FragmentTile, MatrixRowTile, Product, RowsTile, RowTile, Tile, choose_tile
from .quantized_row_mma import quantized_row_mma_kernel
from .skinny_linear import ACTIVATIONS, DTYPES, arrivals, finish
from .triton_support import interpreting, overlaps_launches, triton, unavailable

MANY_ROWS = 256
"""Rows above which the weights are read back and the vendor's library multiplies."""
ONE = 0x3F800000
"""The bits of 1.0 in float32."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A stored weight and how to read it.

    Attributes:
        kind: its format.
        inner: inputs, the filling of the last run left out.
        weight: packed integers, (out, in) int8 or (out, bytes) uint8.
        scale: (out, groups) floating point.
        zero: (out, groups) uint8 where the format has zero points.
    """

    kind: WeightFormat
    inner: int
    weight: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None

    @classmethod
    def of(cls, weight: torch.Tensor, kind: WeightFormat) -> QuantizedWeight:
        """Returns a (out, in) floating-point weight in a format. Raises ValueError as `packing.quantize` does."""
        stored = quantize(weight, kind)
        return cls(kind, weight.shape[1], stored["weight"], stored["weight_scale"], stored.get("weight_zero"))

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return len(self.weight)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the stored tensors by the names that checkpoints give them."""
        tensors = {"weight": self.weight, "weight_scale": self.scale}
        return tensors | ({} if self.zero is None else {"weight_zero": self.zero})

    def some(self, outputs: slice) -> QuantizedWeight:
        """Returns the weight of some outputs."""
        zero = None if self.zero is None else self.zero[outputs]
        return replace(self, weight=self.weight[outputs], scale=self.scale[outputs], zero=zero)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the (out, in) weight in a floating-point dtype."""
        return dequantize(self.tensors(), self.kind, self.inner, dtype)

    def side_by_side(self, others: list[QuantizedWeight]) -> QuantizedWeight:
        """Returns one weight with the outputs of this and others, all of one format and of the same inputs."""
        together = [self, *others]
        zeros = [one.zero for one in together if one.zero is not None]
        return replace(
            self,
            weight=torch.cat([one.weight for one in together]),
            scale=torch.cat([one.scale for one in together]),
            zero=torch.cat(zeros) if zeros else None,
        )


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is stored in 8 or 4 bits; the bias stays as it was.

    Parameters are named as checkpoints hold them: `weight`, `weight_scale`, `weight_zero`, `bias`.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool, kind: WeightFormat, dtype: torch.dtype
    ):
        super().__init__()
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        self.transposed = False  # whether a checkpoint holds the weight as (in, out)
        for name, shape in kind.shapes(out_features, in_features).items():
            stored = torch.zeros(shape, dtype=kind.dtypes[name])
            self.register_parameter(name, nn.Parameter(stored, requires_grad=False))
        self.bias = (
            nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None
        )

    @property
    def scale_names(self) -> list[str]:
        """Names of the parameters that say what the integers mean."""
        return [name for name in self.kind.shapes(1, 1) if name != "weight"]

    def read(self, stored: dict[str, Any]) -> QuantizedWeight:
        """Returns stored tensors, by parameter name, as a weight of this layer's format."""
        weight, scale = stored["weight"], stored["weight_scale"]
        return QuantizedWeight(self.kind, self.in_features, weight, scale, stored.get("weight_zero"))

    @property
    def packed(self) -> QuantizedWeight:
        """The stored weight."""
        return self.read({name: getattr(self, name) for name in ("weight", *self.scale_names)})

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns (..., out) from (..., in)."""
        return quantized_linear(input, self.packed, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}"


def quantized_linear_reference(
    rows: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    norm: nn.Module | None = None,
) -> torch.Tensor:
    """Returns what :func:`quantized_linear` returns, by plain operations on the weight read back."""
    rows = rows if norm is None else norm(rows)
    return finish(F.linear(rows, weight.dense(rows.dtype), bias), activation, gated, residual)


def quantized_linear(
    rows: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    norm: nn.Module | None = None,
) -> torch.Tensor:
    """Returns `activation(norm(rows) @ weight.T + bias) + residual`; arguments as those of `skinny_linear.linear`.

    Raises:
        ValueError: an unknown activation, or a gated product with a bias.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; use one of {list(ACTIVATIONS)}.")
    if gated and bias is not None:
        raise ValueError("a gated product takes no bias.")
    count = rows.numel() // rows.shape[-1]
    if rows.dtype not in DTYPES or unavailable(rows.device) is not None:
        rows = rows if norm is None else norm(rows)
        return finish(_plain_product(rows, weight, bias), activation, gated, residual)
    if norm is not None:
        rows, _ = add_norm(rows, None, norm)
    if count > MANY_ROWS:
        read_back = dense(weight.tensors(), weight.kind, weight.inner, rows.dtype)
        return finish(F.linear(rows, read_back, bias), activation, gated, residual)
    tile = choose_tile(rows.device, Product(weight.kind, count, weight.outputs, weight.inner, gated))
    output = rows.new_empty(*rows.shape[:-1], weight.outputs // (2 if gated else 1))
    launch(tile, rows.contiguous(), weight, bias, ACTIVATIONS[activation], gated, residual, output)
    return output


def launch(
    tile: Tile,
    rows: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None,
    activation: int,
    gated: bool,
    residual: torch.Tensor | None,
    output: torch.Tensor,
) -> None:
    """Writes a product to `output`, on a kernel and in blocks that a tile names; other arguments as `quantized_linear`'s."""
    given = (rows, weight, bias, activation, gated, residual, output)
    if isinstance(tile, RowTile):
        _launch_row(tile, *given)
    elif isinstance(tile, MatrixRowTile):
        _launch_matrix_row(tile, *given)
    elif isinstance(tile, FragmentTile):
        _launch_fragment(tile, *given)
    else:
        _launch_rows(tile, *given)


def _plain_product(rows: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    one = rows.numel() == rows.shape[-1]
    if weight.kind.bits == 8 and one and rows.device.type == "cpu" and rows.dtype == torch.bfloat16:
        flat = pair(rows.reshape(1, -1))
        product = torch._weight_int8pack_mm(flat, weight.weight, weight.scale[:, 0].to(rows.dtype))
        product = product.view(*rows.shape[:-1], -1)
        return product if bias is None else product + bias
    if weight.kind.bits == 8 and rows.dtype not in DTYPES:
        # Scales are fewer than weights: they multiply the outputs.
        product = F.linear(pair(rows), weight.weight.to(rows.dtype)) * weight.scale[:, 0].to(rows.dtype)
        return product if bias is None else product + bias
    return F.linear(rows, weight.dense(rows.dtype), bias)


def _shared(weight: QuantizedWeight, bias, activation: int, gated: bool, residual) -> dict[str, object]:
    """Returns the launch options that all kernels take."""
    pdl = overlaps_launches(weight.weight.device)
    options: dict[str, object] = {
        "BITS": weight.kind.bits, "ACTIVATION": activation, "GATED": gated, "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None, "PDL": pdl,
    }  # fmt: skip
    return options | ({"launch_pdl": True} if pdl else {})


def _grouping(kind: WeightFormat) -> dict[str, object]:
    """Returns the launch options of the kernels that take every format."""
    parts = RUN // kind.group_size if kind.group_size else 1
    return {"PARTS": parts, "ZERO": kind.zero_point, "GROUPED": kind.group_size is not None}


def _epilogue(rows, weight: QuantizedWeight, bias, residual, output) -> tuple[torch.Tensor, ...]:
    """Returns the kernels' pointers from the scales on; what is not there is never read."""
    zero = weight.scale if weight.zero is None else weight.zero
    bias, residual = (rows if one is None else one for one in (bias, residual))
    return weight.scale, zero, bias, residual, output


def _launch_row(
    tile: RowTile, rows, weight: QuantizedWeight, bias, activation, gated, residual, output
) -> None:
    columns = output.shape[-1]
    words = weight.weight.view(torch.int32)
    pieces = words.shape[1] // 4
    quantized_row_kernel[(triton.cdiv(columns, tile.columns),)](
        _aligned(rows).view(torch.int32),
        words,
        *_epilogue(rows, weight, bias, residual, output),
        columns,
        pieces,
        ONE,
        BLOCK_COLUMNS=tile.columns,
        BLOCK_PIECES=tile.pieces,
        MASKED=columns % tile.columns != 0 or pieces % tile.pieces != 0,
        AHEAD=tile.ahead,
        num_warps=tile.warps,
        **_grouping(weight.kind),
        **_shared(weight, bias, activation, gated, residual),
    )


def _launch_matrix_row(
    tile: MatrixRowTile, rows, weight: QuantizedWeight, bias, activation, gated, residual, output
) -> None:
    columns = output.shape[-1]
    words = _aligned(weight.weight).view(torch.int32)
    scale, _, *others = _epilogue(rows, weight, bias, residual, output)
    quantized_row_mma_kernel[(columns // (4 * tile.fours),)](
        _aligned(rows).view(torch.int32),
        words,
        scale,
        *others,
        columns,
        PIECES=words.shape[1] // 4,
        BLOCK_PIECES=tile.pieces,
        FOURS=tile.fours,
        DEPTH=tile.depth,
        PACKED=not interpreting(),
        num_warps=tile.warps,
        **_shared(weight, bias, activation, gated, residual),
    )


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor, copied where it does not start at a multiple of 16 bytes."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _launch_rows(
    tile: RowsTile, rows, weight: QuantizedWeight, bias, activation, gated, residual, output
) -> None:
    columns = output.shape[-1]
    count = rows.numel() // weight.inner
    # Programs of one column tile follow each other: they share its weights.
    grid = (triton.cdiv(count, tile.rows), triton.cdiv(columns, tile.columns), tile.splits)
    paired = weight.kind.bits == 8 and weight.inner % RUN == 0
    partials = rows
    cells = tile.rows * tile.columns * (2 if gated else 1)
    if tile.splits > 1:
        partials = torch.empty(grid[0] * grid[1] * grid[2] * cells, dtype=torch.float32, device=rows.device)
    quantized_rows_kernel[grid](
        rows,
        weight.weight.view(torch.int16) if paired or weight.kind.bits == 4 else weight.weight,
        *_epilogue(rows, weight, bias, residual, output),
        partials,
        arrivals(rows.device),
        count,
        columns,
        weight.inner,
        runs(weight.inner),
        tile.splits,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        DIVIDED=tile.splits > 1,
        TOGETHER=4 if cells <= 1024 * tile.warps else 1,
        JOIN=tile.warps % 4 == 0 and tile.columns % 64 == 0,
        PAIRED=paired,
        MASKED=columns % tile.columns != 0 or weight.inner % RUN != 0,
        PACKED=not interpreting(),
        num_warps=tile.warps,
        num_stages=tile.stages,
        **_grouping(weight.kind),
        **_shared(weight, bias, activation, gated, residual),
    )


def _launch_fragment(
    tile: FragmentTile, rows, weight: QuantizedWeight, bias, activation, gated, residual, output
) -> None:
    columns = output.shape[-1]
    count = rows.numel() // weight.inner
    grid = (triton.cdiv(columns, tile.columns), tile.splits)
    blocks, steps = tile.blocks(count), tile.steps(weight.inner)
    partials = rows
    if tile.splits > 1:
        cells = tile.rows * blocks * tile.columns * (2 if gated else 1)
        partials = torch.empty(grid[0] * grid[1] * cells, dtype=torch.float32, device=rows.device)
    scale, _, *others = _epilogue(rows, weight, bias, residual, output)
    fragment_kernel[grid](
        rows,
        weight.weight.view(torch.int16),
        scale,
        *others,
        partials,
        arrivals(rows.device),
        count,
        columns,
        runs(weight.inner),
        tile.splits,
        steps,
        BLOCK_ROWS=tile.rows,
        BLOCKS=blocks,
        BLOCK_COLUMNS=tile.columns,
        SLICES=tile.slices,
        RUNS=tile.runs,
        AHEAD=tile.ahead(count),
        LOOP=steps > 1,
        DIVIDED=tile.splits > 1,
        GROUPED=weight.kind.group_size is not None,
        PACKED=not interpreting(),
        num_warps=tile.slices,
        maxnreg=tile.registers,
        **_shared(weight, bias, activation, gated, residual),
    )
