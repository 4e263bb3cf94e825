"""Products with packed weights equal products with the weights read back, whatever the format, the sizes and the epilogue."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from huggingface.transformers.integrations import quantized_linear as module
from huggingface.transformers.integrations.quantized_linear import (
    MANY_ROWS,
    QuantizedLinear,
    QuantizedWeight,
    quantized_linear,
    quantized_linear_reference,
)
from huggingface.transformers.integrations.quantized_linear_tiles import RowsTile, RowTile
from huggingface.transformers.integrations.skinny_linear import arrivals
from huggingface.transformers.integrations.triton_support import unavailable
from huggingface.transformers.quantizers.packing import WeightFormat

from .packed_products import DEVICE, arguments, cast, check_compiled, check_loss

needs_kernels = pytest.mark.skipif(unavailable(DEVICE) is not None, reason="no Triton")
INT8, NAIVE = WeightFormat(8), WeightFormat(4)
GROUPS = [WeightFormat(4, size, zero) for size in (32, 64, 128) for zero in (False, True)]
FORMATS = [INT8, NAIVE, *GROUPS]
FEW = [INT8, NAIVE, WeightFormat(4, 32, True), WeightFormat(4, 128)]
REAL = [
    (4096, 4096, False),
    (6144, 4096, False),
    (14336, 4096, True),
    (4096, 14336, False),
    (5120, 3072, False),
]
"""Outputs, inputs and whether gated, of Mistral-7B's products and Llama-3.2-3B's query, key and value."""


def started(monkeypatch) -> list[str]:
    """Returns a list that gains the name of every launch."""
    names: list[str] = []
    for name in ("_launch_row", "_launch_matrix_row", "_launch_rows", "_launch_fragment"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, o=original, n=name: names.append(n) or o(*args))
    return names


@needs_kernels
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("columns, inner", [(5, 32), (16, 128), (33, 100), (70, 300), (9, 640), (1, 1)])
@pytest.mark.parametrize("kind", FORMATS, ids=str)
def test_any_size(kind, columns, inner, rows, monkeypatch):
    names = started(monkeypatch)
    check_loss(arguments(rows, columns, inner, kind))
    expected = "_launch_rows"
    if rows == 1 and inner % 128 == 0:
        matrix = columns % 4 == 0 and kind in (INT8, WeightFormat(4, 128))
        expected = "_launch_matrix_row" if matrix else "_launch_row"
    elif rows == 3 and inner % 128 == 0 and kind in (INT8, NAIVE, WeightFormat(4, 128)):
        expected = "_launch_fragment"
    assert names == [expected]


@needs_kernels
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("activation", [None, "gelu_tanh", "silu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", FEW, ids=str)
def test_every_epilogue(kind, gated, activation, rows):
    for bias, residual in itertools.product((False,) if gated else (False, True), (False, True)):
        given = arguments(rows, 21, 256, kind, gated, bias, residual)
        check_loss(given, activation=activation, gated=gated)


@needs_kernels
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_norm_in_front(rows, norm):
    check_loss(arguments(rows, 20, 70, WeightFormat(4, 32), norm=norm, residual=True), activation="gelu_tanh")


@needs_kernels
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("columns, pieces", [(8, 32), (4, 8), (2, 64)])
@pytest.mark.parametrize("kind", FEW, ids=str)
def test_one_row_in_chunks(kind, columns, pieces, ahead, monkeypatch):
    """Whether chunks and outputs divide or not, and whether or not the next chunk is read ahead."""
    monkeypatch.setattr(module, "choose_tile", lambda *product: RowTile(columns, pieces, 1, ahead))
    for outputs, inner, gated in ((16, 1024, False), (13, 1920, False), (11, 640, True)):
        given = arguments(1, outputs, inner, kind, gated)
        check_loss(given, activation="silu" if gated else None, gated=gated)


@needs_kernels
@pytest.mark.parametrize("splits", [1, 2, 3, 8])
@pytest.mark.parametrize("gated", [False, True])
def test_the_runs_are_divided(gated, splits, monkeypatch):
    """Also into shares of different size, and empty ones; whoever comes last, the sum is the same."""
    monkeypatch.setattr(module, "choose_tile", lambda *product: RowsTile(16, 16, splits, 4, 3))
    given = arguments(20, 40, 600, WeightFormat(4, 32), gated=gated)
    first = check_loss(given, activation="silu", gated=gated)
    assert torch.equal(first, check_loss(given, activation="silu", gated=gated))
    assert not arrivals(DEVICE).any()


@needs_kernels
@pytest.mark.parametrize(
    "rows, dtype, expected",
    [
        (MANY_ROWS, torch.float16, ["_launch_rows"]),
        (MANY_ROWS + 1, torch.float16, []),
        (1, torch.float32, []),
        (2, torch.float64, []),
    ],
)
def test_who_computes_what(rows, dtype, expected, monkeypatch):
    names = started(monkeypatch)
    given = cast(arguments(rows, 8, 64, INT8), dtype)
    torch.testing.assert_close(
        quantized_linear(**given), quantized_linear_reference(**given), atol=4e-3, rtol=4e-3
    )
    assert names == expected


@pytest.mark.parametrize("kind", FORMATS, ids=str)
def test_without_triton_the_weight_is_read_back(kind, monkeypatch):
    monkeypatch.setattr(module, "unavailable", lambda device: "no Triton")
    for dtype, off in ((torch.float64, 1e-6), (torch.float32, 1e-5), (torch.float16, 4e-3)):
        given = cast(arguments(3, 8, 64, kind, bias=True, residual=True), dtype)
        got = quantized_linear(**given, activation="silu")
        expected = quantized_linear_reference(**given, activation="silu")
        torch.testing.assert_close(got, expected, atol=off, rtol=off)


def test_torchs_own_product_of_one_row_in_bfloat16(monkeypatch):
    monkeypatch.setattr(module, "unavailable", lambda device: "no Triton")
    given = cast(arguments(1, 24, 96, INT8, bias=True, residual=True), torch.bfloat16)
    got = quantized_linear(**given)
    torch.testing.assert_close(got, quantized_linear_reference(**given), atol=4e-2, rtol=4e-2)


@needs_kernels
def test_a_wrong_scale_shows():
    """The comparisons above can fail."""
    given = arguments(4, 16, 64, WeightFormat(4, 32))
    scale = given["weight"].scale.clone()
    scale[3, 1] *= 1.05
    wrong = cast({**given, "weight": replace(given["weight"], scale=scale)}, torch.float16)
    exact = quantized_linear_reference(**cast(given, torch.float32))
    plain = quantized_linear_reference(**cast(given, torch.float16))
    loss = (plain.float() - exact).abs().max()
    assert (quantized_linear(**wrong).float() - exact).abs().max() > 2 * loss


def test_weights_lie_side_by_side():
    for kind in FORMATS:
        parts = [torch.randn(outputs, 70) for outputs in (4, 6, 2)]
        packed = [QuantizedWeight.of(part, kind) for part in parts]
        together = packed[0].side_by_side(packed[1:])
        assert together.outputs == 12
        assert torch.equal(
            together.dense(torch.float32), torch.cat([one.dense(torch.float32) for one in packed])
        )


@pytest.mark.parametrize(
    "options, message", [({"activation": "relu"}, "'relu' is unknown"), ({"gated": True}, "takes no bias")]
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        quantized_linear(**arguments(2, 8, 32, INT8, bias=True), **options)


def test_the_module_holds_what_checkpoints_hold():
    layer = QuantizedLinear(100, 6, True, WeightFormat(4, 32, True), torch.float16)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "weight": (6, 64), "weight_scale": (6, 4), "weight_zero": (6, 4), "bias": (6,),
    }  # fmt: skip
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_kernels_compile_without_spills(monkeypatch):
    shapes, kinds = [(4096, 4096, False), (14336, 4096, True)], [INT8, WeightFormat(4, 128)]
    check_compiled(monkeypatch, shapes, (1, 33, 112), kinds, (torch.bfloat16,), (86, 90))


@pytest.mark.slow
def test_all_kernels_compile_without_spills(monkeypatch):
    dtypes = (torch.bfloat16, torch.float16)
    check_compiled(monkeypatch, REAL, (1, 16, 33, 64, 112), FORMATS, dtypes, (80, 86, 90))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 16, 33, 64, 112, 224])
@pytest.mark.parametrize("kind", FORMATS, ids=str)
def test_on_the_gpu_at_real_sizes(kind, rows, dtype):
    for columns, inner, gated in REAL[:3]:
        given = arguments(rows, columns, inner, kind, gated, bias=not gated, residual=True)
        activation = "silu" if gated else "gelu_tanh"
        first = check_loss(given, dtype, activation=activation, gated=gated)
        assert torch.equal(first, check_loss(given, dtype, activation=activation, gated=gated))
