"""One row on the tensor cores: as computed by operations the interpreter knows, by the real assembly, and where it is chosen."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmark.tile_candidates import MATRIX_ROW_TILES
from huggingface.transformers.integrations import quantized_linear as module
from huggingface.transformers.integrations import quantized_linear_tiles as tiles
from huggingface.transformers.integrations import quantized_row_mma as kernels
from huggingface.transformers.integrations.quantized_linear import QuantizedWeight, quantized_linear
from huggingface.transformers.integrations.quantized_linear_tiles import (
    MOST_CHUNKS,
    FragmentTile,
    MatrixRowTile,
    Product,
    RowsTile,
    RowTile,
    choose_tile,
    default_tile,
)
from huggingface.transformers.integrations.triton_support import interpreting, unavailable
from huggingface.transformers.quantizers.packing import WeightFormat

from .emulated_warp import emulate
from .packed_products import DEVICE, arguments, cast, check_compiled, check_loss

needs_kernels = pytest.mark.skipif(unavailable(DEVICE) is not None, reason="no Triton")
needs_interpreter = pytest.mark.skipif(not interpreting(), reason="kernels are not interpreted")
INT8, INT4 = WeightFormat(8), WeightFormat(4, 128)
FORMATS = [
    INT8,
    WeightFormat(4),
    *(WeightFormat(4, size, zero) for size in (32, 64, 128) for zero in (False, True)),
]
CASES = [
    (8, 1024, False, MatrixRowTile(32, 1, 1)),
    (16, 1920, False, MatrixRowTile(32, 2, 2)),
    (8, 3072, False, MatrixRowTile(64, 1, 2)),
    (8, 5120, False, MatrixRowTile(32, 1, 1)),
    (8, 1152, False, MatrixRowTile(128, 2, 1)),
    (8, 2048, True, MatrixRowTile(32, 1, 2)),
    (8, 512, True, MatrixRowTile(64, 1, 1)),
    (4, 4096, True, MatrixRowTile(64, 1, 2)),
]
"""Outputs, inputs, whether gated, and tiles: one chunk and several, the last one whole or not, more than four at 4 bits."""
MISTRAL = [(6144, 4096, False), (4096, 4096, False), (14336, 4096, True), (4096, 14336, False)]
"""Outputs, inputs and whether gated."""


def product_of(columns, inner, kind, gated=False, rows=1) -> Product:
    return Product(kind, rows, columns * (1 + gated), inner, gated)


@needs_kernels
@pytest.mark.parametrize("columns, inner, gated, tile", CASES)
@pytest.mark.parametrize("kind", [INT8, INT4], ids=str)
def test_every_tile_and_epilogue(kind, columns, inner, gated, tile, monkeypatch):
    assert product_of(columns, inner, kind, gated).takes(tile)
    monkeypatch.setattr(module, "choose_tile", lambda *_: tile)
    for bias, residual in itertools.product((False,) if gated else (False, True), (False, True)):
        given = arguments(1, columns, inner, kind, gated, bias, residual)
        check_loss(given, activation="silu" if gated else "gelu_tanh", gated=gated)


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns, inner, gated, tile", CASES)
@pytest.mark.parametrize("kind", [INT8, INT4], ids=str)
def test_the_assembly_in_an_emulated_warp(kind, columns, inner, gated, tile, dtype, monkeypatch):
    ran = emulate(monkeypatch)
    monkeypatch.setattr(module, "interpreting", lambda: False)
    monkeypatch.setattr(module, "choose_tile", lambda *_: tile)
    given = arguments(1, columns, inner, kind, gated, not gated, True)
    check_loss(given, dtype, activation="silu" if gated else None, gated=gated)
    assert len(set(ran)) == (2 if kind is INT8 else 3)


@needs_interpreter
@pytest.mark.parametrize("kind", [INT8, INT4], ids=str)
def test_every_number_of_a_format(kind, monkeypatch):
    """One input of one and nothing else reads a weight back, whatever it is and wherever it lies."""
    emulate(monkeypatch)
    monkeypatch.setattr(module, "interpreting", lambda: False)
    given = arguments(1, 4, 256, kind)
    weight = given["weight"].weight
    weight.view(torch.uint8).copy_(torch.arange(weight.numel()).view_as(weight).mul(37).remainder(256))
    for index in (0, 1, 31, 32, 77, 127, 128, 200, 255):
        given["rows"] = torch.zeros(1, 1, 256)
        given["rows"][..., index] = 1.0
        check_loss(given)


@needs_interpreter
@pytest.mark.parametrize(
    "name, right, wrong",
    [
        ("HALF_NIBBLES", "selp.f32 k1, c3, c2", "selp.f32 k1, c2, c3"),
        ("HALF_NIBBLES", "{$20, $21}", "{$21, $20}"),
        ("HALF_OFFSETS", "0xBE00BE00", "0xBE01BE01"),
        ("SUM_OF_LANES", "u, a, 16,", "u, a, 8,"),
    ],
)
def test_a_wrong_instruction_shows(name, right, wrong, monkeypatch):
    """The comparisons above can fail."""
    emulate(monkeypatch)
    monkeypatch.setattr(module, "interpreting", lambda: False)
    asm = getattr(kernels, name).value
    assert right in asm
    monkeypatch.setattr(kernels, name, kernels.constant(asm.replace(right, wrong)))
    with pytest.raises(AssertionError):
        check_loss(arguments(1, 8, 1024, INT4))


@needs_kernels
@pytest.mark.parametrize("kind", [INT8, INT4], ids=str)
def test_tensors_that_start_anywhere(kind):
    given = cast(arguments(1, 8, 256, kind), torch.float16)
    expected = quantized_linear(**given)
    weight = given["weight"]
    moved = torch.zeros(weight.weight.numel() + 1, dtype=weight.weight.dtype, device=DEVICE)[1:]
    moved.copy_(weight.weight.flatten())
    shifted = QuantizedWeight(kind, 256, moved.view_as(weight.weight), weight.scale)
    rows = torch.cat([given["rows"].new_zeros(1), given["rows"].flatten()])[1:].view(1, 1, 256)
    assert torch.equal(quantized_linear(**{**given, "weight": shifted, "rows": rows}), expected)


@needs_kernels
def test_it_is_chosen_only_where_it_computes():
    columns = (1, 2, 4, 6, 8, 12, 768, 2050, 4096, 28672)
    inner = (1, 100, 128, 384, 768, 4096, 14336, 28672, 57344, 65536, 131072)
    chosen = 0
    for kind, out, size, gated, rows in itertools.product(FORMATS, columns, inner, (False, True), (1, 2, 16)):
        tile = default_tile(product_of(out, size, kind, gated, rows))
        computes = rows == 1 and size % 128 == 0 and out % 4 == 0 and kind in (INT8, INT4)
        fits = size * kind.bits // 128 <= (128 if gated else 256) * MOST_CHUNKS
        assert isinstance(tile, MatrixRowTile) == (computes and fits), (kind, out, size, gated, rows)
        assert isinstance(tile, RowsTile | FragmentTile) == (rows > 1 or size % 128 != 0)
        if isinstance(tile, MatrixRowTile):
            chosen += 1
            assert tile.warps * 32 == tile.pieces
            assert 1 <= tile.depth <= max(1, -(-size * kind.bits // 128 // tile.pieces))
    assert chosen > 50


@pytest.mark.parametrize(
    "kind, columns, gated, tile",
    [
        (INT4, 12, False, MatrixRowTile(64, 2, 1)),
        (INT4, 16, True, MatrixRowTile(64, 2, 1)),
        (INT4, 16, False, MatrixRowTile(64, 1, 3)),
        (INT4, 16, False, MatrixRowTile(128, 1, 2)),
        (INT8, 16, True, MatrixRowTile(32, 1, 3)),
        (INT8, 16, True, MatrixRowTile(128, 1, 1)),
        (INT8, 16, True, MatrixRowTile(256, 1, 1)),
        (WeightFormat(4, 128, True), 16, False, MatrixRowTile(64, 1, 1)),
    ],
)
def test_tiles_that_do_not_fit(kind, columns, gated, tile):
    """Outputs that do not divide, two fours of a gate, chunks that are not there, registers that do not suffice, zero points."""
    assert not product_of(columns, 4096, kind, gated).takes(tile)


@needs_kernels
def test_a_measured_tile_is_left_where_it_does_not_fit(monkeypatch):
    """The file's key does not say whether there are zero points."""
    fields = {"pieces": 32, "fours": 2, "depth": 1}
    monkeypatch.setattr(
        tiles, "_stored", lambda: {"cpu": {"int4-128": {"1": {"16x1024": fields, "12x1024": fields}}}}
    )
    choose_tile.cache_clear()
    cpu, zero = torch.device("cpu"), WeightFormat(4, 128, True)
    assert choose_tile(cpu, product_of(16, 1024, INT4)) == MatrixRowTile(32, 2, 1)
    assert choose_tile(cpu, product_of(12, 1024, INT4)) == MatrixRowTile(32, 1, 1)
    assert isinstance(choose_tile(cpu, product_of(16, 1024, zero)), RowTile)
    choose_tile.cache_clear()


def test_the_file_holds_tiles_that_fit():
    found = 0
    for device in tiles._stored().values():
        for kind in (INT8, INT4):
            for key, fields in device[f"int{kind.bits}{'-128' if kind is INT4 else ''}"]["1"].items():
                outputs, inner = map(int, key.removesuffix(" gated").split("x"))
                tile = tiles.read_tile(fields)
                if isinstance(tile, MatrixRowTile):
                    found += 1
                    assert Product(kind, 1, outputs, inner, key.endswith("gated")).takes(tile), key
    assert found


def check_layout(usages, warps: set[int]) -> None:
    """Asserts that assembly meets lanes as it expects them."""
    layout = "#ttg.blocked<{{sizePerThread = [1, 4], threadsPerWarp = [32, 1], warpsPerCTA = [{}, 1], order = [1, 0]}}>"
    assert {name for usage in usages for name in usage.layouts} == {layout.format(count) for count in warps}
    assert all(len(usage.layouts) == 1 for usage in usages)


def test_kernels_compile_without_spills(monkeypatch):
    usages = check_compiled(monkeypatch, MISTRAL, (1,), [INT8, INT4], (torch.bfloat16,), (80, 86, 90))
    check_layout(usages, {4, 8})


@pytest.mark.slow
@pytest.mark.parametrize("tile", [MatrixRowTile(*one) for one in MATRIX_ROW_TILES], ids=str)
@pytest.mark.parametrize("kind", [INT8, INT4], ids=str)
def test_every_tile_that_is_tried_compiles_without_spills(kind, tile, monkeypatch):
    """Not for sm_80, where bytes in seven chunks spill 16 bytes, and no tile was measured."""
    shapes = [shape for shape in MISTRAL if product_of(shape[0], shape[1], kind, shape[2]).takes(tile)]
    monkeypatch.setattr(module, "choose_tile", lambda *_: tile)
    dtypes = (torch.bfloat16, torch.float16)
    check_layout(check_compiled(monkeypatch, shapes, (1,), [kind], dtypes, (86, 90)), {tile.warps})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [INT8, INT4], ids=str)
def test_on_the_gpu_at_real_sizes(kind, dtype, monkeypatch):
    for columns, inner, gated in MISTRAL:
        given = arguments(1, columns, inner, kind, gated, bias=not gated, residual=True)
        for pieces, fours, depth in itertools.product((32, 64, 128, 256), (1, 2), (1, 2)):
            tile = MatrixRowTile(pieces, fours, depth)
            if product_of(columns, inner, kind, gated).takes(tile):
                monkeypatch.setattr(module, "choose_tile", lambda *_, tile=tile: tile)
                first = check_loss(given, dtype, activation="silu", gated=gated)
                assert torch.equal(first, check_loss(given, dtype, activation="silu", gated=gated))


@needs_kernels
def test_with_a_triton_that_was_not_tried_the_other_kernel_computes(monkeypatch):
    """The assembly relies on where the compiler puts numbers."""
    product = product_of(6144, 4096, INT4)
    assert isinstance(default_tile(product), MatrixRowTile)
    monkeypatch.setattr(tiles, "gluon_unavailable", lambda: "not tried")
    assert isinstance(default_tile(product), RowTile)
