"""Few rows times packed weights, straight from registers: what it computes, where it is chosen, and what it needs."""

from __future__ import annotations

import pytest
import torch

from benchmark.tile_candidates import fragment_candidates
from benchmark.tune_products import TIMED_ROWS, TUNABLE
from huggingface.transformers.integrations import gluon_support
from huggingface.transformers.integrations import quantized_linear as module
from huggingface.transformers.integrations import quantized_linear_tiles as tiles
from huggingface.transformers.integrations.quantized_linear import (
    quantized_linear,
    quantized_linear_reference,
)
from huggingface.transformers.integrations.quantized_linear_tiles import (
    MOST_FRAGMENT_ROWS,
    FragmentTile,
    Product,
    RowsTile,
    choose_tile,
    default_fragment_tile,
    default_tile,
)
from huggingface.transformers.integrations.skinny_linear import arrivals
from huggingface.transformers.integrations.triton_support import unavailable
from huggingface.transformers.quantizers.packing import WeightFormat, runs

from .packed_products import DEVICE, arguments, cast, check_compiled, check_loss

needs_kernels = pytest.mark.skipif(unavailable(DEVICE) is not None, reason="no Triton")
INT8, INT4, NAIVE = WeightFormat(8), WeightFormat(4, 128), WeightFormat(4)
KINDS = [INT8, INT4, NAIVE]
CPU = torch.device("cpu")
SHAPES = list(dict.fromkeys(shape for parts in TUNABLE.values() for shape in parts.values()))


@pytest.fixture
def chosen(monkeypatch):
    """Makes every product's tile the one that is given."""

    def choose(tile: FragmentTile) -> None:
        monkeypatch.setattr(module, "choose_tile", lambda *product: tile)

    return choose


def product_of(rows, outputs, inner, kind, gated=False) -> Product:
    return Product(kind, rows, outputs, inner, gated)


def fields_of(kind: WeightFormat, rows: str, shape: str, fields: dict) -> dict:
    """Returns a file that holds one tile, for the CPU."""
    return {"cpu": {f"int{kind.bits}{'-128' if kind.group_size else ''}": {rows: {shape: fields}}}}


@needs_kernels
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 15, 16, 33])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_ragged_rows_and_columns(kind, rows, chosen):
    """Also with more rows than a block of 8 or 16, and outputs that fill no tile."""
    for size, columns in ((8, 16), (16, 32)):
        chosen(FragmentTile(size, columns, 2, 1, 1, 255))
        check_loss(arguments(rows, 37, 512, kind))


@needs_kernels
@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"residual": True, "activation": "silu"},
        {"bias": True, "residual": True, "activation": "gelu_tanh"},
        {"gated": True, "activation": "silu", "residual": True},
        {"gated": True},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_epilogue(kind, options, chosen):
    made = {name: value for name, value in options.items() if name in ("bias", "residual", "gated")}
    used = {name: value for name, value in options.items() if name in ("activation", "gated")}
    for tile in (FragmentTile(8, 16, 2, 2, 1, 255), FragmentTile(8, 32, 1, 1, 2, 255)):
        chosen(tile)
        check_loss(arguments(11, 21, 512, kind, **made), **used)


@needs_kernels
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    "tile",
    [
        FragmentTile(8, 16, 4, 3, 1, 255),
        FragmentTile(16, 16, 2, 1, 3, 255),
        FragmentTile(8, 32, 1, 2, 2, 255),
        FragmentTile(8, 16, 1, 4, 3, 255),
    ],
    ids=str,
)
def test_slices_steps_and_splits(tile, kind, gated, chosen):
    """Whoever comes last, the sum is the same, and the counters are left at zero."""
    chosen(tile)
    given = arguments(9, 40, 12 * 128, kind, gated)
    first = check_loss(given, activation="silu", gated=gated)
    assert torch.equal(first, check_loss(given, activation="silu", gated=gated))
    assert not arrivals(DEVICE).any()


@needs_kernels
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_one_wrong_scale_shows(kind, chosen):
    """The comparisons above can fail."""
    chosen(FragmentTile(8, 16, 2, 1, 1, 255))
    given = cast(arguments(5, 16, 256, kind), torch.float16)
    exact = quantized_linear_reference(**cast(given, torch.float32))
    plain = quantized_linear_reference(**given)
    given["weight"].scale[3, -1] *= 1.05
    loss = (plain.float() - exact).abs().max()
    assert (quantized_linear(**given).float() - exact).abs().max() > 4 * loss


@pytest.mark.parametrize("rows", range(2, 17))
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_rule_fits_whatever_the_size(kind, rows):
    """It computes what it is chosen for, has warps in a power of two, and asks for all runs it counts."""
    generator = torch.Generator().manual_seed(rows)
    for _ in range(100):
        columns, blocks = (int(torch.randint(1, most, (), generator=generator)) for most in (20000, 120))
        gated = bool(torch.randint(2, (), generator=generator))
        product = product_of(rows, columns * (1 + gated), blocks * 128, kind, gated)
        tile = default_fragment_tile(product)
        if gated and (kind.bits == 8 or rows > 8):
            assert tile is None
            continue
        assert tile is not None
        assert tile.fits(product)
        assert tile.slices in (1, 2, 4, 8, 16)
        assert tile.steps(product.inner) * tile.slices * tile.runs == runs(product.inner)
        assert tile.registers * 32 * tile.slices <= 65536
        assert 1 <= tile.ahead(rows) <= tile.runs * tile.blocks(rows)


@pytest.mark.parametrize(
    "product",
    [
        product_of(1, 64, 1024, INT4),
        product_of(17, 64, 1024, INT4),
        product_of(8, 64, 1000, INT4),
        product_of(8, 64, 1024, WeightFormat(4, 128, True)),
        product_of(8, 64, 1024, WeightFormat(4, 32)),
        product_of(8, 64, 1024, INT8, True),
        product_of(9, 64, 1024, INT4, True),
        product_of(8, 2**21, 2048, INT4),
    ],
    ids=lambda product: "x".join(map(str, product.keys)),
)
def test_what_the_other_kernels_compute(product):
    """One row, many rows, broken runs, zero points, other groups, most gates, and what 32 bits cannot count."""
    assert not isinstance(default_tile(product), FragmentTile)


@pytest.mark.parametrize(
    "rows, stored, found", [(8, "16", True), (7, "8", True), (40, "64", True), (9, "8", False)]
)
def test_rows_that_a_file_lacks_have_the_next_ones_tile(rows, stored, found, monkeypatch):
    fields = {"rows": 32, "columns": 32, "splits": 1, "warps": 2, "stages": 5}
    monkeypatch.setattr(tiles, "_stored", lambda: fields_of(INT4, stored, "64x1024", fields))
    choose_tile.cache_clear()
    assert (choose_tile(CPU, product_of(rows, 64, 1024, INT4)) == RowsTile(**fields)) == found
    choose_tile.cache_clear()


@needs_kernels
def test_a_measured_tile_is_left_where_it_does_not_fit(monkeypatch):
    """The file's key does not say whether there are zero points."""
    fields = {"rows": 8, "columns": 32, "slices": 2, "runs": 1, "splits": 2, "registers": 200}
    monkeypatch.setattr(tiles, "_stored", lambda: fields_of(INT4, "8", "64x1024", fields))
    choose_tile.cache_clear()
    assert choose_tile(CPU, product_of(7, 64, 1024, INT4)) == FragmentTile(**fields)
    assert isinstance(choose_tile(CPU, product_of(7, 64, 1024, WeightFormat(4, 128, True))), RowsTile)
    choose_tile.cache_clear()


def test_the_file_holds_tiles_that_fit():
    found = 0
    for device in tiles._stored().values():
        for kind, name in ((INT8, "int8"), (INT4, "int4-128")):
            for rows, products in device[name].items():
                for key, fields in products.items():
                    tile = tiles.read_tile(fields)
                    if isinstance(tile, FragmentTile):
                        found += 1
                        outputs, inner = map(int, key.removesuffix(" gated").split("x"))
                        product = product_of(int(rows), outputs, inner, kind, key.endswith("gated"))
                        assert tile.fits(product), key
    assert found


@needs_kernels
def test_without_gluon_the_other_kernel_computes(monkeypatch):
    fields = {"rows": 8, "columns": 16, "slices": 2, "runs": 1, "splits": 1, "registers": 128}
    monkeypatch.setattr(tiles, "_stored", lambda: fields_of(INT4, "8", "64x1024", fields))
    monkeypatch.setattr(tiles, "gluon_unavailable", lambda: "no Gluon")
    monkeypatch.setattr(module, "_launch_fragment", lambda *args: pytest.fail("launched"))
    choose_tile.cache_clear()
    for outputs in (64, 48):  # measured and not
        assert isinstance(choose_tile(CPU, product_of(7, outputs, 1024, INT4)), RowsTile)
        check_loss(arguments(7, outputs, 1024, INT4))
    choose_tile.cache_clear()


@pytest.mark.parametrize(
    "version, gluon, message",
    [
        (None, None, "not installed"),
        ("3.4.0", None, "Triton 3.4.0 has no Gluon"),
        ("3.9.0", object(), "Triton 3.9.0 was not tried, only that of 3.6.x, 3.7.x"),
        ("3.7.1", object(), None),
    ],
)
def test_why_gluon_is_unavailable(version, gluon, message, monkeypatch):
    triton = None if version is None else type("Triton", (), {"__version__": version})
    monkeypatch.setattr(gluon_support, "triton", triton)
    monkeypatch.setattr(gluon_support, "gluon", gluon)
    monkeypatch.setattr(gluon_support, "interpreting", lambda: False)
    reason = gluon_support.gluon_unavailable()
    assert reason is None if message is None else message in str(reason)


def test_kernels_compile_without_spills(monkeypatch):
    shapes = [(2048, 2048, False), (14336, 4096, True)]
    check_compiled(monkeypatch, shapes, (7,), [INT4], (torch.bfloat16,), (80, 86, 90))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [7, 16])
def test_all_kernels_of_the_rule_compile_without_spills(rows, monkeypatch):
    shapes = [(shape.outputs // (1 + shape.gated), shape.inner, shape.gated) for shape in SHAPES]
    check_compiled(monkeypatch, shapes, (rows,), KINDS, (torch.bfloat16, torch.float16), (80, 86, 90))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [rows for rows in TIMED_ROWS if 1 < rows <= MOST_FRAGMENT_ROWS])
@pytest.mark.parametrize("kind", [INT8, INT4], ids=str)
def test_what_tuning_tries_does_not_spill(kind, rows, monkeypatch):
    """On sm_90, where tiles were measured."""
    tried: dict[FragmentTile, list] = {}
    for shape in SHAPES:
        columns = shape.outputs // (1 + shape.gated)
        for tile in fragment_candidates(product_of(rows, shape.outputs, shape.inner, kind, shape.gated)):
            tried.setdefault(tile, []).append((columns, shape.inner, shape.gated))
    for tile, shapes in tried.items():
        monkeypatch.setattr(module, "choose_tile", lambda *_, tile=tile: tile)
        check_compiled(monkeypatch, shapes, TIMED_ROWS[rows], [kind], (torch.bfloat16,), (90,))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, 7, 16, 33, 48])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_on_the_gpu_at_real_sizes(kind, rows, dtype, monkeypatch):
    for shape in SHAPES:
        columns = shape.outputs // (1 + shape.gated)
        given = arguments(rows, columns, shape.inner, kind, shape.gated, bias=not shape.gated, residual=True)
        for tile in fragment_candidates(product_of(rows, shape.outputs, shape.inner, kind, shape.gated)):
            monkeypatch.setattr(module, "choose_tile", lambda *_, tile=tile: tile)
            first = check_loss(given, dtype, activation="silu", gated=shape.gated)
            assert torch.equal(first, check_loss(given, dtype, activation="silu", gated=shape.gated))
