"""One row: every size of block and chunk, a norm inside, and what the compiler makes of it."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from huggingface.transformers.integrations import gemv as module
from huggingface.transformers.integrations.gemv import WIDEST_NORM, Blocks, choose_blocks, gemv
from huggingface.transformers.integrations.skinny_linear import ACTIVATIONS, linear_reference
from huggingface.transformers.integrations.triton_support import unavailable

from . import compile_check
from .recorded_launch import recorded

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(unavailable(DEVICE) is not None, reason="no Triton")
SHAPES = [
    (768, 768, False), (2304, 768, False), (3072, 768, False), (768, 3072, False), (50257, 768, False),
    (2048, 2048, False), (8192, 2048, False), (2048, 8192, False), (4096, 11008, False), (11008, 4096, True),
]  # fmt: skip
"""Outputs, inputs and whether gated, of products of decoders from 125M to 7B."""
PLACE = "huggingface.transformers.integrations.gemv"


@torch.no_grad()
def check(columns, inner, dtype=torch.float16, activation=None, gated=False, norm=None, bias=False):
    """Asserts that a row's product loses at most twice what plain operations of the dtype lose against float32.

    One rounding of the largest output comes on top: of few outputs, chance may round the plain ones better than it should.
    """
    torch.manual_seed(columns + inner)
    row, residual = torch.randn(1, 1, inner), torch.randn(1, 1, columns)
    weight = torch.randn(columns * (2 if gated else 1), inner) * inner**-0.5
    offset = torch.randn(columns) if bias else None
    layer: nn.Module | None = None
    if norm is not None:
        layer = nn.LayerNorm(inner) if norm == "layer" else LlamaRMSNorm(inner)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, mean=0.5)

    def all_in(kind):
        given = (row, weight, offset, residual, layer)
        rounded = [copy.deepcopy(part).to(dtype).to(DEVICE) if part is not None else None for part in given]
        return [part.to(kind) if part is not None else None for part in rounded]

    row_, weight_, bias_, residual_, norm_ = all_in(dtype)
    got = torch.full_like(residual_, float("nan"))
    gemv(row_, weight_, bias_, ACTIVATIONS[activation], gated, residual_, norm_, got)
    plain = linear_reference(row_, weight_, bias_, activation, gated, residual_, norm_)
    row_, weight_, bias_, residual_, norm_ = all_in(torch.float32)
    exact = linear_reference(row_, weight_, bias_, activation, gated, residual_, norm_)
    loss = float((plain.float() - exact).abs().max())
    rounding = torch.finfo(dtype).eps / 2 * float(exact.abs().max())
    assert float((got.float() - exact).abs().max()) <= 2 * loss + rounding


@needs_kernels
@pytest.mark.parametrize("columns", [1, 5, 16])
@pytest.mark.parametrize("inner", [1, 3, 16, 40, 64])
@pytest.mark.parametrize("gated", [False, True])
def test_sizes(columns, inner, gated):
    check(columns, inner, gated=gated, activation="silu", bias=not gated)


@needs_kernels
@pytest.mark.parametrize("block", [1, 2, 8])
@pytest.mark.parametrize("inner", [16, 48, 50, 15])
@pytest.mark.parametrize("gated", [False, True])
def test_several_chunks(block, inner, gated, monkeypatch):
    """Columns and inputs that are multiples of the block, and such that are not; a tail of 1 to 16."""
    rest = inner % 16
    blocks = Blocks(block, 16, inner // 16 or 1, 1 << (rest - 1).bit_length() if rest and inner > 16 else 0)
    monkeypatch.setattr(module, "choose_blocks", lambda *sizes: blocks)
    check(16, inner, gated=gated)
    check(13, inner, gated=gated, activation="gelu_tanh", bias=not gated)


@needs_kernels
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("inner", [16, 20, 100, 127])
@pytest.mark.parametrize("block", [1, 4])
def test_a_norm_inside(norm, inner, block, monkeypatch):
    """Columns of the padding must not shift a LayerNorm's mean or variance."""
    monkeypatch.setattr(module, "choose_blocks", lambda *sizes: replace(choose_blocks(*sizes), columns=block))
    check(9, inner, norm=norm, activation="gelu_tanh", bias=True)


@needs_kernels
def test_a_row_wider_than_a_program_holds():
    check(3, 2 * WIDEST_NORM + 5)


@pytest.mark.parametrize("columns", [1, 768, 3072, 50257])
@pytest.mark.parametrize("inner", [5, 768, 2560, 3000, WIDEST_NORM, 11008])
@pytest.mark.parametrize("gated", [False, True])
def test_blocks_are_powers_of_two_that_cover_the_row(columns, inner, gated):
    pytest.importorskip("triton")
    blocks = choose_blocks(columns, inner, gated)
    assert all(size & (size - 1) == 0 for size in (blocks.columns, blocks.inner, blocks.tail))
    covered = blocks.inner * blocks.chunks + blocks.tail
    assert covered >= inner
    assert blocks.chunks == 1 or blocks.inner * blocks.chunks <= inner
    assert blocks.chunks == 1 or inner > WIDEST_NORM, "a program that normalises must hold the whole row"
    assert (blocks.inner + blocks.tail) * blocks.columns * (1 + gated) <= 16384


@pytest.mark.parametrize("inner", [2560, 3072, 5120])
def test_no_lane_idles_at_the_widths_of_common_models(inner):
    """2.7B of GPT-Neo, 3B of Llama 3.2, 13B of Llama."""
    pytest.importorskip("triton")
    blocks = choose_blocks(3 * inner, inner, False)
    assert blocks.inner * blocks.chunks + blocks.tail == inner


def check_compiled(monkeypatch, shapes, kinds, capabilities) -> None:
    """Compiles each distinct kernel of these products and asserts that it fits the card."""
    pytest.importorskip("triton")
    kernels = []
    for (columns, inner, gated), kind in itertools.product(shapes, kinds):

        def call(columns=columns, inner=inner, gated=gated, kind=kind):
            def empty(*sizes):
                return torch.empty(sizes, dtype=kind, device="meta")

            layer = LlamaRMSNorm(inner) if gated else nn.LayerNorm(inner)
            norm = layer.to("meta", kind) if inner <= WIDEST_NORM else None
            weight, bias = empty(columns * (1 + gated), inner), None if gated else empty(columns)
            out = empty(1, 1, columns)
            gemv(empty(1, 1, inner), weight, bias, 2 if gated else 1, gated, empty(1, 1, columns), norm, out)

        kernels += [
            entry for entry in recorded(monkeypatch, PLACE, "gemv_kernel", call) if entry not in kernels
        ]
    for kernel, usages in zip(kernels, compile_check.compile_kernels(kernels, capabilities), strict=True):
        assert all(usage.fits for usage in usages), (kernel, usages)


def test_a_single_output_compiles(monkeypatch):
    """Triton makes a constant of an argument that is 1, and constants lack what numbers have."""
    check_compiled(monkeypatch, [(1, 1, False), (1, 40, True)], (torch.bfloat16,), (80, 90))


def test_the_largest_blocks_compile_without_spills(monkeypatch):
    check_compiled(
        monkeypatch,
        [(11008, 4096, True), (50257, 768, False), (10240, 2560, False), (4096, 11008, False)],
        (torch.bfloat16,),
        (86, 90),
    )


@pytest.mark.slow
def test_all_blocks_compile_without_spills(monkeypatch):
    check_compiled(monkeypatch, SHAPES, (torch.bfloat16, torch.float16), (80, 86, 90))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns, inner, gated", SHAPES)
def test_on_the_gpu_at_real_sizes(columns, inner, gated, dtype):
    norm = None if inner > WIDEST_NORM else "rms" if gated else "layer"
    check(columns, inner, dtype, "silu" if gated else "gelu_tanh", gated, norm, bias=not gated)
