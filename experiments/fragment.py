"""Launches of `rows_kernels.fragment_kernel`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experiments.rows_kernels import fragment_kernel
from huggingface.transformers.integrations.quantized_linear import QuantizedWeight
from huggingface.transformers.integrations.skinny_linear import arrivals
from huggingface.transformers.integrations.triton_support import interpreting, overlaps_launches, triton
from huggingface.transformers.quantizers.packing import runs


@dataclass(frozen=True)
class Fragment:
    """Rows of a block and blocks, columns, slices, warps across columns, runs of a slice at a time, splits, input blocks ahead, most
    registers of a thread (0: any)."""

    rows: int
    blocks: int
    columns: int
    slices: int
    across: int
    run: int
    splits: int = 1
    ahead: int = 1
    registers: int = 0

    @property
    def warps(self) -> int:
        return self.slices * self.across

    def fits(self, inner: int) -> bool:
        return inner % (128 * self.slices * self.run * self.splits) == 0

    def __str__(self) -> str:
        text = f"n{self.rows}x{self.blocks} m{self.columns} s{self.slices}x{self.across} r{self.run} a{self.ahead}"
        return text + (f" k{self.splits}" if self.splits > 1 else "") + (f" reg{self.registers}" if self.registers else "")


def launch_fragment(tile: Fragment, rows, weight: QuantizedWeight, bias, activation, gated, residual, output) -> None:
    columns = output.shape[-1]
    count = rows.numel() // weight.inner
    kind = weight.kind
    assert kind.group_size in (None, 128) and not kind.zero_point and tile.fits(weight.inner)
    grid = (triton.cdiv(count, tile.rows * tile.blocks), triton.cdiv(columns, tile.columns), tile.splits)
    partials = rows
    if tile.splits > 1:
        size = grid[0] * grid[1] * grid[2] * tile.rows * tile.blocks * tile.columns * (2 if gated else 1)
        partials = torch.empty(size, dtype=torch.float32, device=rows.device)
    steps = weight.inner // (128 * tile.slices * tile.run * tile.splits)
    pdl = overlaps_launches(rows.device)
    options = {"launch_pdl": True} if pdl else {}
    if tile.registers:
        options["maxnreg"] = tile.registers
    fragment_kernel[grid](
        rows, weight.weight.view(torch.int16), weight.scale, rows if bias is None else bias,
        rows if residual is None else residual, output, partials, arrivals(rows.device),
        count, columns, runs(weight.inner), tile.splits, steps,
        N=tile.rows, B=tile.blocks, AHEAD=min(tile.ahead, tile.run * tile.blocks), M=tile.columns, S=tile.slices, WM=tile.across, R=tile.run, MORE=steps > 1, BITS=kind.bits,
        GROUPED=kind.group_size is not None, DIVIDED=tile.splits > 1,
        ACTIVATION=activation, GATED=gated, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        PACKED=not interpreting(), PDL=pdl, num_warps=tile.warps, **options,
    )  # fmt: skip


def compile_job(module, name, signature, constants, attributes, options, target) -> float:
    """Stands in for `benchmark.compile_ahead._compile`, which does not know kernels in Gluon."""
    import importlib
    from time import perf_counter

    from triton.experimental.gluon._runtime import GluonASTSource

    start = perf_counter()
    function = getattr(importlib.import_module(module), name)
    kind = GluonASTSource if function.is_gluon() else triton.compiler.ASTSource
    triton.compile(kind(function, signature, constants, attributes), target=target, options=options)
    return perf_counter() - start
