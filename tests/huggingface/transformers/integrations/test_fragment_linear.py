"""Few rows times plain weights, straight from registers: what it computes, where it is chosen, and what it needs."""

from __future__ import annotations

import itertools

import pytest
import torch

from huggingface.transformers.integrations import skinny_linear
from huggingface.transformers.integrations.fragment_linear import (
    FEWEST_INPUTS,
    MOST_COLUMNS,
    REGISTERS,
    ROW_BLOCKS,
    RUN,
    FragmentTile,
    choose_fragment_tile,
    launch_fragment,
)
from huggingface.transformers.integrations.skinny_linear import linear, linear_reference
from huggingface.transformers.integrations.triton_support import unavailable

from . import compile_check
from .recorded_launch import recorded
from .test_skinny_linear import DEVICE, arguments, cast, check_loss, launches

needs_kernels = pytest.mark.skipif(unavailable(DEVICE) is not None, reason="no Triton")
MODULE = "huggingface.transformers.integrations.fragment_linear"
SMALL = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
LARGE = [(6144, 2048), (2048, 2048), (8192, 2048), (2048, 8192)]
"""Outputs and inputs of the four products of a layer, of GPT-Neo-125M and 1.3B."""


@pytest.fixture
def chosen(monkeypatch):
    """Makes every product's tile the one that is given."""

    def choose(tile: FragmentTile | None) -> None:
        monkeypatch.setattr(skinny_linear, "choose_fragment_tile", lambda *sizes: tile)

    return choose


@needs_kernels
@pytest.mark.parametrize("rows", [2, 3, 7, 8, 9, 15, 16, 31, 32, 39])
def test_ragged_rows_and_columns(rows, chosen):
    """Blocks of rows that are not full, or not there, and outputs that fill no tile."""
    for blocks in ROW_BLOCKS:
        if rows <= blocks[0] * blocks[1]:
            chosen(FragmentTile(*blocks, 16 if rows % 2 else 32, 2, 1, 255))
            for columns in (1, 32, 37):
                check_loss(arguments(rows, columns, 256))


@needs_kernels
@pytest.mark.parametrize("activation", [None, "gelu_tanh", "silu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_every_epilogue(residual, bias, activation, chosen):
    for tile in (FragmentTile(8, 1, 16, 2, 2, 255), FragmentTile(16, 2, 32, 1, 4, 255)):
        chosen(tile)
        check_loss(arguments(7, 21, 256, bias=bias, residual=residual), activation=activation)


@needs_kernels
@pytest.mark.parametrize("blocks", ROW_BLOCKS)
@pytest.mark.parametrize("count, slices, runs", [(5, 1, 1), (12, 1, 3), (12, 2, 6), (12, 4, 3), (32, 16, 1)])
def test_slices_runs_and_steps(count, slices, runs, blocks, chosen):
    """One to five steps; inputs of a later step are asked for in the one before."""
    chosen(FragmentTile(*blocks, 16, slices, runs, 255))
    check_loss(arguments(blocks[0] * blocks[1] - 1, 20, count * RUN, bias=True, residual=True))


@needs_kernels
def test_rows_of_a_batch_keep_their_shape_and_a_norm_comes_first():
    given = arguments(6, 10, 256, residual=True, norm="rms")
    given["rows"], given["residual"] = given["rows"].view(2, 3, 256), given["residual"].view(2, 3, 10)
    assert check_loss(given).shape == (2, 3, 10)


@needs_kernels
def test_one_wrong_weight_shows(chosen):
    """The comparisons above can fail: the last weight of the last run."""
    chosen(FragmentTile(8, 1, 16, 2, 2, 255))
    given = cast(arguments(5, 16, 256), torch.float16)
    exact = linear_reference(**cast(given, torch.float32))
    loss = (linear_reference(**given).float() - exact).abs().max()
    given["weight"][-1, -1] += 0.1
    assert (linear(**given).float() - exact).abs().max() > 4 * loss


@needs_kernels
@pytest.mark.parametrize(
    "rows, columns, inner, dtype, gated, expected",
    [
        (1, 8, 256, torch.float16, False, "gemv"),
        (2, 8, 256, torch.float16, False, "launch_fragment"),
        (40, 8, 256, torch.float16, False, "launch_fragment"),
        (41, 8, 256, torch.float16, False, "_launch"),
        (2, 8, 256, torch.float16, True, "_launch"),
        (2, 8, 260, torch.float16, False, "_launch"),
        (40, 8, 2048, torch.float16, False, "launch_fragment"),
        (41, 8, 2048, torch.float16, False, None),
        (2, 8, 256, torch.float32, False, None),
    ],
)
def test_who_computes_what(rows, columns, inner, dtype, gated, expected, monkeypatch):
    started = launches(monkeypatch)
    given = cast(arguments(rows, columns, inner, gated), dtype)
    want = linear_reference(**given, gated=gated)
    torch.testing.assert_close(linear(**given, gated=gated), want, atol=4e-3, rtol=4e-3)
    assert started == ([] if expected is None else [expected])


@needs_kernels
def test_without_gluon_the_other_kernel_computes(monkeypatch):
    monkeypatch.setattr(skinny_linear, "gluon_unavailable", lambda: "no Gluon")
    started = launches(monkeypatch)
    check_loss(arguments(7, 16, 256))
    assert started == ["_launch"]


@needs_kernels
@pytest.mark.parametrize("rows", range(42))
def test_the_rule_fits_whatever_the_size(rows):
    """It computes all rows and inputs, its registers are there, and it loops only where that was faster."""
    generator = torch.Generator().manual_seed(rows)
    found = 0
    for _ in range(300):
        columns, count = (int(torch.randint(1, most, (), generator=generator)) for most in (10000, 100))
        inner = count * RUN if count % 5 else count * RUN - 32
        tile = choose_fragment_tile(rows, columns, inner)
        if not 2 <= rows <= 40 or inner % RUN or inner < FEWEST_INPUTS or columns > MOST_COLUMNS:
            assert tile is None
        if tile is None:
            continue
        found += 1
        assert rows <= tile.rows * tile.blocks
        assert tile.steps(inner) * tile.slices * tile.runs * RUN == inner
        assert tile.registers * 32 * tile.slices <= REGISTERS
        assert 1 <= tile.ahead <= tile.runs * tile.blocks
        assert rows <= 16 or tile.steps(inner) == 1
    assert (found > 0) == (2 <= rows <= 40)


@needs_kernels
@pytest.mark.parametrize(
    "rows, shape, expected",
    [
        (7, (6144, 2048), FragmentTile(8, 1, 32, 8, 2, 128)),
        (16, (6144, 2048), FragmentTile(16, 1, 32, 4, 2, 255)),
        (32, (6144, 2048), None),
        (7, (2048, 2048), FragmentTile(8, 1, 16, 16, 2, 128)),
        (32, (2048, 2048), FragmentTile(16, 2, 16, 8, 4, 255)),
        (7, (2048, 8192), FragmentTile(8, 1, 16, 16, 4, 128)),
        (16, (2048, 8192), None),
        (16, (3072, 768), FragmentTile(16, 1, 32, 4, 3, 255)),
        (40, (768, 3072), FragmentTile(8, 5, 16, 8, 6, 255)),
        (16, (4096, 14336), FragmentTile(16, 1, 32, 8, 4, 255)),
        (32, (4096, 14336), None),
        (7, (14336, 4096), None),
        (7, (2560, 2560), None),
        (16, (2560, 10240), None),
    ],
)
def test_measured_products(rows, shape, expected):
    """What was fastest or nearly so on an H200; `None` where another kernel was."""
    assert choose_fragment_tile(rows, *shape) == expected


def compiled_ones(monkeypatch, sizes, kind) -> list[tuple]:
    """Returns the distinct kernels of products (rows, columns, inner), for `compile_check`."""
    kernels: list[tuple] = []
    for rows, columns, inner in sizes:
        tile = choose_fragment_tile(rows, columns, inner)
        if tile is None:
            continue

        def call(rows=rows, columns=columns, inner=inner, tile=tile):
            def empty(*shape):
                return torch.empty(shape, dtype=kind, device="meta")

            output = empty(rows, columns)
            launch_fragment(
                tile, empty(rows, inner), empty(columns, inner), empty(columns), 1, output, output
            )

        kernels += recorded(monkeypatch, MODULE, "fragment_linear_kernel", call)
    return kernels


def check_compiled(kernels: list[tuple], capabilities: tuple[int, ...]) -> None:
    pytest.importorskip("triton")
    for kernel, usages in zip(kernels, compile_check.compile_kernels(kernels, capabilities), strict=True):
        assert all(usage.fits for usage in usages), (kernel, usages)


@needs_kernels
def test_kernels_compile_without_spills(monkeypatch):
    """The largest tile of each number of rows, and a single output, of which Triton makes a constant."""
    sizes = [(2, 1, 256), (8, 6144, 2048), (16, 8192, 2048), (32, 768, 3072), (40, 768, 3072)]
    check_compiled(compiled_ones(monkeypatch, sizes, torch.bfloat16), (86, 90))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_all_measured_products_compile_without_spills(kind, monkeypatch):
    sizes = [
        (rows, *shape) for rows, shape in itertools.product((8, 16, 32, 40), [*SMALL, *LARGE, (4096, 14336)])
    ]
    check_compiled(compiled_ones(monkeypatch, sizes, kind), (80, 86, 90))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [8, 16, 32, 40])
@pytest.mark.parametrize("widths", [(2048, 4096, 8192), (2047, 4095, 8191)], ids=["even", "ragged"])
def test_whatever_the_rule_chooses_does_not_spill(widths, rows, monkeypatch):
    """Each tile at the first depth that it computes in one step and in several."""
    sizes: dict[tuple[FragmentTile, bool], tuple[int, int, int]] = {}
    for columns, inner in itertools.product(widths, range(FEWEST_INPUTS, 16385, RUN)):
        tile = choose_fragment_tile(rows, columns, inner)
        if tile is not None:
            sizes.setdefault((tile, tile.steps(inner) > 1), (rows, columns, inner))
    assert len(sizes) >= 10
    check_compiled(compiled_ones(monkeypatch, sizes.values(), torch.bfloat16), (86, 90))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, 7, 8, 9, 16, 17, 32, 33, 40])
def test_on_the_gpu_at_real_sizes(rows, dtype, monkeypatch):
    started = launches(monkeypatch)
    for columns, inner in [*SMALL, *LARGE, (4096, 14336), (1000, 768), (4100, 2048)]:
        given = arguments(rows, columns, inner, bias=True, residual=True, norm="layer")
        first = check_loss(given, dtype, activation="gelu_tanh")
        assert torch.equal(first, check_loss(given, dtype, activation="gelu_tanh"))
    assert "launch_fragment" in started
