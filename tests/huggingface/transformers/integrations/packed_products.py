"""What the tests of packed products share: arguments, the loss that is allowed, and which kernels fit the cards."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from huggingface.transformers.integrations import quantized_linear as module
from huggingface.transformers.integrations.quantized_linear import (
    QuantizedWeight,
    quantized_linear,
    quantized_linear_reference,
)
from huggingface.transformers.integrations.quantized_linear_tiles import (
    FragmentTile,
    MatrixRowTile,
    Product,
    RowsTile,
    RowTile,
)

from . import compile_check
from .recorded_launch import recorded

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = {
    RowTile: "quantized_row_kernel",
    MatrixRowTile: "quantized_row_mma_kernel",
    RowsTile: "quantized_rows_kernel",
    FragmentTile: "fragment_kernel",
}
"""The kernel that computes a product in a kind of tile."""


def arguments(rows, columns, inner, kind, gated=False, bias=False, residual=False, norm=None):
    """Returns the arguments of a product in float32; weights of a size that keeps outputs near 1."""
    torch.manual_seed(rows + inner)
    weight = torch.randn(columns * (2 if gated else 1), inner) * inner**-0.5
    layer = {"layer": nn.LayerNorm, "rms": LlamaRMSNorm}[norm](inner) if norm else None
    return {
        "rows": torch.randn(1, rows, inner),
        "weight": QuantizedWeight.of(weight, kind),
        "bias": torch.randn(columns) if bias else None,
        "residual": torch.randn(1, rows, columns) if residual else None,
        "norm": layer,
    }


def cast(given: dict, dtype: torch.dtype) -> dict:
    """Returns the arguments on the device, all but the packed weight in another dtype."""
    weight = given["weight"]
    tensors = {name: tensor.to(DEVICE) for name, tensor in weight.tensors().items()}
    moved = QuantizedWeight(
        weight.kind, weight.inner, tensors["weight"], tensors["weight_scale"], tensors.get("weight_zero")
    )
    rest = {name: value for name, value in given.items() if name != "weight"}
    others = {n: v if v is None else copy.deepcopy(v).to(DEVICE, dtype) for n, v in rest.items()}
    return others | {"weight": moved}


@torch.no_grad()
def check_loss(given: dict, dtype=torch.float16, **options) -> torch.Tensor:
    """Asserts that the product loses at most twice what plain operations of the dtype lose against float32; returns it."""
    rounded = cast(given, dtype)
    got = quantized_linear(**rounded, **options)
    plain = quantized_linear_reference(**rounded, **options)
    exact = quantized_linear_reference(**cast(rounded, torch.float32), **options)
    assert got.dtype == dtype
    assert got.shape == exact.shape
    loss = float((plain.float() - exact).abs().max())
    rounding = torch.finfo(dtype).eps / 2 * float(exact.abs().max())
    assert float((got.float() - exact).abs().max()) <= 2 * loss + 2 * rounding
    return got


def check_compiled(monkeypatch, shapes, rows, kinds, dtypes, capabilities) -> list[compile_check.Usage]:
    """Compiles each distinct kernel of these products and asserts that it fits the card; returns what they use."""
    pytest.importorskip("triton")
    kernels: list[tuple] = []
    for (columns, inner, gated), count, kind, dtype in itertools.product(shapes, rows, kinds, dtypes):

        def call(columns=columns, inner=inner, gated=gated, count=count, kind=kind, dtype=dtype):
            def empty(*sizes, of=dtype):
                return torch.empty(sizes, dtype=of, device="meta")

            outputs = columns * (1 + gated)
            stored = {n: empty(*s, of=kind.dtypes[n]) for n, s in kind.shapes(outputs, inner).items()}
            weight = QuantizedWeight(
                kind, inner, stored["weight"], stored["weight_scale"], stored.get("weight_zero")
            )
            quantized_linear(
                empty(1, count, inner), weight, None if gated else empty(columns), "silu" if gated else "gelu_tanh",
                gated, empty(1, count, columns),
            )  # fmt: skip

        product = Product(kind, count, columns * (1 + gated), inner, gated)
        name = KERNELS[type(module.choose_tile(torch.device("meta"), product))]
        found = recorded(monkeypatch, module.__name__, name, call)
        assert len(found) == 1
        kernels += [entry for entry in found if entry not in kernels]
    found = compile_check.compile_kernels(kernels, capabilities)
    for kernel, usages in zip(kernels, found, strict=True):
        assert all(usage.fits for usage in usages), (kernel, usages)
    return list(itertools.chain.from_iterable(found))
