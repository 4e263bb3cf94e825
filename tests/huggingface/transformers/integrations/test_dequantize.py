"""Weights read back by the kernel are those of plain operations, bit for bit, whatever the format and the sizes."""

from __future__ import annotations

import itertools

import pytest
import torch

from huggingface.transformers.integrations import dequantize as module
from huggingface.transformers.integrations.dequantize import dense, dense_reference
from huggingface.transformers.integrations.quantized_linear import (
    MANY_ROWS,
    QuantizedWeight,
    quantized_linear,
)
from huggingface.transformers.integrations.triton_support import unavailable
from huggingface.transformers.quantizers.packing import WeightFormat, quantize

from . import compile_check
from .recorded_launch import recorded

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(unavailable(DEVICE) is not None, reason="no Triton")
MODULE = "huggingface.transformers.integrations.dequantize"
FORMATS = [WeightFormat(8), WeightFormat(4)]
FORMATS += [WeightFormat(4, size, zero) for size in (32, 64, 128) for zero in (False, True)]
DTYPES = [torch.float16, torch.float32]
if DEVICE.type == "cuda":
    DTYPES.append(torch.bfloat16)  # which Triton's interpreter cuts off instead of rounding
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
SIZES = [(1, 1), (5, 32), (33, 100), (16, 128), (70, 300), (3, 768), (7, 1024)]


def stored(outputs: int, inner: int, kind: WeightFormat) -> dict[str, torch.Tensor]:
    """Returns a packed weight on the device, with an output of zeros, a tiny one and one that is large."""
    torch.manual_seed(outputs + inner)
    weight = torch.randn(outputs, inner)
    for row, factor in enumerate((1.0, 0.0, 1e-6, 100.0)[:outputs]):
        weight[row] *= factor
    return {name: tensor.to(DEVICE) for name, tensor in quantize(weight, kind).items()}


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert got.is_contiguous()
    assert torch.equal(got.view(BITS[got.dtype]), expected.view(BITS[got.dtype]))


@needs_kernels
@pytest.mark.parametrize("kind", FORMATS, ids=str)
def test_the_same_bits_at_any_size(kind):
    for outputs, inner in SIZES:
        tensors = stored(outputs, inner, kind)
        for dtype in DTYPES:
            got = dense(tensors, kind, inner, dtype)
            assert_same_bits(got, dense_reference(tensors, kind, inner, dtype))


@needs_kernels
@pytest.mark.parametrize("kind", FORMATS, ids=str)
def test_every_number_and_every_zero_point(kind):
    tensors = stored(16, 128, kind)
    weight = torch.arange(16 * tensors["weight"].shape[1], device=DEVICE).view(16, -1)
    tensors["weight"] = weight.to(tensors["weight"].dtype)
    if kind.zero_point:
        tensors["weight_zero"] = (
            torch.arange(16, device=DEVICE)[:, None] + tensors["weight_zero"] * 0
        ).byte()
    for dtype in DTYPES:
        assert_same_bits(dense(tensors, kind, 128, dtype), dense_reference(tensors, kind, 128, dtype))


@needs_kernels
def test_a_part_of_weights_that_lie_side_by_side():
    kind = WeightFormat(4, 32, True)
    part = {name: tensor[3:] for name, tensor in stored(10, 100, kind).items()}
    assert_same_bits(dense(part, kind, 100, torch.float16), dense_reference(part, kind, 100, torch.float16))


@needs_kernels
def test_a_wrong_zero_point_shows():
    """The comparisons above can fail."""
    kind = WeightFormat(4, 64, True)
    tensors = stored(4, 256, kind)
    expected = dense_reference(tensors, kind, 256, torch.float16)
    tensors["weight_zero"] = tensors["weight_zero"].clone()
    tensors["weight_zero"][3, 2] += 1
    assert (dense(tensors, kind, 256, torch.float16) != expected).sum() == 64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_plain_operations_where_the_kernel_does_not_run(dtype, monkeypatch):
    monkeypatch.setattr(module, "unavailable", lambda device: "no Triton")
    monkeypatch.setattr(module, "_dense_kernel", None)
    tensors = stored(4, 96, FORMATS[2])
    got = dense(tensors, FORMATS[2], 96, dtype)
    assert torch.equal(got, dense_reference(tensors, FORMATS[2], 96, dtype))


@needs_kernels
@pytest.mark.parametrize("kind", [FORMATS[0], FORMATS[2]], ids=str)
def test_many_rows_read_the_weight_back_once(kind, monkeypatch):
    launches: list[tuple] = []
    original = module._dense_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return original[grid]

    monkeypatch.setattr(module, "_dense_kernel", Counted())
    torch.manual_seed(0)
    rows = torch.randn(1, MANY_ROWS + 1, 128, dtype=torch.float16, device=DEVICE)
    tensors = stored(8, 128, kind)
    weight = QuantizedWeight(kind, 128, tensors["weight"], tensors["weight_scale"])
    expected = torch.nn.functional.linear(rows, dense_reference(tensors, kind, 128, torch.float16))
    assert torch.equal(quantized_linear(rows, weight), expected)
    assert len(launches) == 1


def check_compiled(monkeypatch, shapes, kinds, dtypes, capabilities) -> None:
    """Compiles each distinct kernel of these weights and asserts that it fits the card."""
    pytest.importorskip("triton")
    kernels: list[tuple] = []
    for (outputs, inner), kind, dtype in itertools.product(shapes, kinds, dtypes):
        shapes_of = kind.shapes(outputs, inner)
        tensors = {n: torch.empty(s, dtype=kind.dtypes[n], device="meta") for n, s in shapes_of.items()}

        def call(tensors=tensors, kind=kind, inner=inner, dtype=dtype):
            dense(tensors, kind, inner, dtype)

        found = recorded(monkeypatch, MODULE, "_dense_kernel", call)
        assert len(found) == 1
        kernels += [entry for entry in found if entry not in kernels]
    for kernel, usages in zip(kernels, compile_check.compile_kernels(kernels, capabilities), strict=True):
        assert all(usage.fits for usage in usages), (kernel, usages)
        assert all(usage.shared == 0 for usage in usages), (
            kernel,
            usages,
        )  # no thread needs another's weights


def test_kernels_compile_without_spills(monkeypatch):
    kinds = [WeightFormat(8), WeightFormat(4), WeightFormat(4, 32, True), WeightFormat(4, 128)]
    check_compiled(monkeypatch, [(2048, 2048), (50257, 1600)], kinds, (torch.bfloat16,), (86, 90))


@pytest.mark.slow
def test_all_kernels_compile_without_spills(monkeypatch):
    shapes = [(2048, 2048), (2304, 768), (50257, 1600)]
    check_compiled(monkeypatch, shapes, FORMATS, (torch.bfloat16, torch.float16), (80, 86, 90))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FORMATS, ids=str)
def test_on_the_gpu_at_real_sizes(kind):
    for outputs, inner in ((2048, 2048), (2304, 768), (28672, 4096), (50257, 2048)):
        tensors = stored(outputs, inner, kind)
        for dtype in DTYPES:
            got = dense(tensors, kind, inner, dtype)
            assert_same_bits(got, dense_reference(tensors, kind, inner, dtype))
