"""The product of few rows equals plain operations, whatever the sizes, the epilogue and the split of the inner dimension."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from huggingface.transformers.integrations import skinny_linear
from huggingface.transformers.integrations.skinny_linear import (
    MOST_INPUTS,
    ROW_BLOCK,
    SMALL_INPUTS,
    SMALL_ROWS,
    choose_tiles,
    linear,
    linear_reference,
)
from huggingface.transformers.integrations.triton_support import unavailable

from . import compile_check
from .recorded_launch import recorded

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(unavailable(DEVICE) is not None, reason="no Triton")
MODULE = "huggingface.transformers.integrations.skinny_linear"
SHAPES = [
    (768, 768, False), (2304, 768, False), (3072, 768, False), (768, 3072, False), (2048, 2048, False),
    (6144, 2048, False), (8192, 2048, False), (2048, 8192, False), (8192, 8192, False), (50257, 768, False),
    (4096, 8192, False), (5632, 2048, True), (11008, 4096, True),
]  # fmt: skip
"""Outputs, inputs and whether gated, of products of decoders from 125M to 7B."""


def norm_of(kind: str | None, features: int) -> nn.Module | None:
    if kind is None:
        return None
    norm = nn.LayerNorm(features, eps=1e-5) if kind == "layer" else LlamaRMSNorm(features, eps=1e-6)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=0.5)
    return norm


def arguments(rows, columns, inner, gated=False, bias=False, residual=False, norm=None, seed=0):
    """Returns the arguments of a product in float32; weights of a size that keeps outputs near 1."""
    torch.manual_seed(seed)
    return {
        "rows": torch.randn(1, rows, inner),
        "weight": torch.randn(columns * (2 if gated else 1), inner) * inner**-0.5,
        "bias": torch.randn(columns) if bias else None,
        "residual": torch.randn(1, rows, columns) if residual else None,
        "norm": norm_of(norm, inner),
    }


def cast(given: dict, dtype: torch.dtype, device=DEVICE) -> dict:
    """Returns copies of the arguments in another dtype."""
    return {
        name: value if value is None else copy.deepcopy(value).to(device, dtype)
        for name, value in given.items()
    }


@torch.no_grad()
def check_loss(given: dict, dtype=torch.float16, **options) -> torch.Tensor:
    """Asserts that the product loses at most twice what plain operations of the dtype lose against float32; returns it.

    One rounding of the largest output comes on top: of few outputs, chance may round the plain ones better than it should.
    """
    rounded = cast(given, dtype)
    got = linear(**rounded, **options)
    plain = linear_reference(**rounded, **options)
    exact = linear_reference(**cast(rounded, torch.float32), **options)
    assert got.dtype == dtype
    assert got.shape == exact.shape
    loss = float((plain.float() - exact).abs().max())
    rounding = torch.finfo(dtype).eps / 2 * float(exact.abs().max())
    assert float((got.float() - exact).abs().max()) <= 2 * loss + rounding
    return got


@pytest.fixture
def tiles_of(monkeypatch):
    """Returns `tiles_of(columns, inner, splits)`, which makes every product use these tiles."""

    def use(columns: int, inner: int, splits: int) -> None:
        monkeypatch.setattr(
            skinny_linear,
            "choose_tiles",
            lambda *sizes: replace(choose_tiles(*sizes), columns=columns, inner=inner, splits=splits),
        )

    return use


@needs_kernels
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 31, 32, 33])
@pytest.mark.parametrize("columns, inner", [(48, 64), (5, 24), (65, 100), (1, 1)])
def test_any_number_of_rows(rows, columns, inner):
    check_loss(arguments(rows, columns, inner, bias=True, residual=True))


@needs_kernels
@pytest.mark.parametrize("activation", [None, "gelu_tanh", "silu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("rows", [1, 3, 2 * ROW_BLOCK + 1])
def test_every_epilogue(rows, splits, gated, activation, tiles_of):
    tiles_of(16, 16, splits)
    for bias in (False,) if gated else (False, True):
        for residual in (False, True):
            given = arguments(rows, 21, 70, gated, bias, residual)
            check_loss(given, activation=activation, gated=gated)


@needs_kernels
@pytest.mark.parametrize("splits", [1, 2, 3, 8])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("columns, inner", [(32, 128), (33, 129), (31, 40), (32, 96)])
def test_the_inner_dimension_is_divided(columns, inner, gated, splits, tiles_of):
    """Multiples of the tiles, sizes next to them, and parts that are empty."""
    tiles_of(16, 16, splits)
    given = arguments(4 if splits < 8 else ROW_BLOCK + 4, columns, inner, gated, residual=True)
    first = check_loss(given, activation="silu", gated=gated)
    assert torch.equal(first, check_loss(given, activation="silu", gated=gated))
    assert not skinny_linear.arrivals(DEVICE).any()


@needs_kernels
def test_one_product_after_another_finds_the_counters_at_zero(tiles_of):
    """Different numbers of tiles and splits, one after the other, on the same counters."""
    for columns, inner, splits in ((50, 64, 4), (16, 200, 2), (90, 70, 3)):
        tiles_of(16, 16, splits)
        check_loss(arguments(7, columns, inner))
        assert not skinny_linear.arrivals(DEVICE).any()


@needs_kernels
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("inner", [32, 70])
def test_a_norm_in_front(rows, norm, inner):
    check_loss(
        arguments(rows, 20, inner, bias=True, residual=True, norm=norm, seed=inner), activation="gelu_tanh"
    )
    check_loss(arguments(rows, 20, inner, gated=True, norm=norm), activation="silu", gated=True)


@needs_kernels
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_norm_wider_than_one_program_holds(norm, monkeypatch):
    """The norm is then a pass of its own; the row is read in several chunks."""
    apart, products = [], []
    original, product = skinny_linear.add_norm, skinny_linear.gemv
    monkeypatch.setattr(skinny_linear, "gemv", lambda *args: products.append(1) or product(*args))
    monkeypatch.setattr(skinny_linear, "add_norm", lambda *args: apart.append(1) or original(*args))
    wide = skinny_linear.WIDEST_NORM
    check_loss(arguments(1, 3, wide, norm=norm))
    assert not apart
    check_loss(arguments(1, 3, wide + 4, norm=norm, bias=True))
    assert apart
    assert len(products) == 2


@needs_kernels
def test_rows_of_a_batch_keep_their_shape():
    given = arguments(6, 10, 32, residual=True)
    given["rows"], given["residual"] = given["rows"].view(2, 3, 32), given["residual"].view(2, 3, 10)
    assert check_loss(given).shape == (2, 3, 10)


def launches(monkeypatch, compute: bool = True) -> list[str]:
    """Returns a list that gains the name of every kernel launch of a product; unless they `compute`, launches are only noted."""
    started: list[str] = []
    for name in ("gemv", "launch_fragment", "launch_staged", "_launch"):
        original = getattr(skinny_linear, name) if compute else lambda *args: None
        monkeypatch.setattr(
            skinny_linear, name, lambda *args, o=original, n=name: started.append(n) or o(*args)
        )
    return started


@needs_kernels
@pytest.mark.parametrize(
    "rows, inner, dtype, expected",
    [
        (1, 16, torch.float16, ["gemv"]),
        (2, 16, torch.float16, ["_launch"]),
        (ROW_BLOCK, SMALL_INPUTS + 4, torch.float16, ["_launch"]),
        (ROW_BLOCK + 1, SMALL_INPUTS + 4, torch.float16, []),
        (ROW_BLOCK + 1, 16, torch.float16, ["_launch"]),
        (SMALL_ROWS, 16, torch.float16, ["_launch"]),
        (SMALL_ROWS + 1, 16, torch.float16, []),
        (1, MOST_INPUTS + 4, torch.float16, ["gemv"]),
        (9, MOST_INPUTS, torch.float16, ["_launch"]),
        (9, MOST_INPUTS + 4, torch.float16, []),
        (1, 16, torch.float32, []),
        (2, 16, torch.float64, []),
    ],
)
def test_who_computes_what(rows, inner, dtype, expected, monkeypatch):
    started = launches(monkeypatch)
    given = cast(arguments(rows, 8, inner), dtype)
    torch.testing.assert_close(linear(**given), linear_reference(**given), atol=2e-3, rtol=2e-3)
    assert started == expected


def test_float32_is_the_reference_bit_for_bit():
    given = cast(arguments(3, 8, 16, bias=True, residual=True, norm="rms"), torch.float32)
    assert torch.equal(linear(**given), linear_reference(**given))


def test_without_triton_the_reference_runs(monkeypatch):
    monkeypatch.setattr(skinny_linear, "unavailable", lambda device: "no Triton")
    started = launches(monkeypatch)
    given = cast(arguments(2, 8, 16), torch.float16)
    assert torch.equal(linear(**given), linear_reference(**given))
    assert started == []


def test_the_reference_is_what_it_says():
    given = cast(arguments(2, 6, 8, gated=True, residual=True, norm="layer"), torch.float64)
    normed = nn.functional.layer_norm(given["rows"], (8,), given["norm"].weight, given["norm"].bias, 1e-5)
    gate, factor = (normed @ given["weight"].T).split(6, dim=-1)
    want = gate * torch.sigmoid(gate) * factor + given["residual"]
    torch.testing.assert_close(linear_reference(**given, activation="silu", gated=True), want)


@pytest.mark.parametrize(
    "options, message", [({"activation": "relu"}, "'relu' is unknown"), ({"gated": True}, "takes no bias")]
)
def test_wrong_arguments_are_named(options, message):
    given = cast(arguments(2, 8, 16, bias=True), torch.float16)
    with pytest.raises(ValueError, match=message):
        linear(**given, **options)


@needs_kernels
def test_a_missing_residual_shows():
    """The comparison above can fail."""
    given = arguments(4, 16, 32, residual=True)
    wrong = {**given, "residual": given["residual"] + 0.01}
    got, exact = linear(**cast(wrong, torch.float16)), linear_reference(**given)
    plain = linear_reference(**cast(given, torch.float16))
    assert (got.cpu().float() - exact).abs().max() > 2 * (plain.cpu().float() - exact).abs().max()


def check_compiled(monkeypatch, shapes, rows: tuple[int, ...], kinds, capabilities) -> None:
    """Compiles each distinct kernel of these products and asserts that it fits the card; all run here without Gluon."""
    pytest.importorskip("triton")
    monkeypatch.setattr(skinny_linear, "gluon_unavailable", lambda: "no Gluon")
    kernels = []
    for columns, inner, gated in shapes:
        for count, kind in itertools.product(rows, kinds):

            def call(count=count, columns=columns, inner=inner, gated=gated, kind=kind):
                def empty(*sizes):
                    return torch.empty(sizes, dtype=kind, device="meta")

                linear(
                    empty(1, count, inner), empty(columns * (1 + gated), inner),
                    None if gated else empty(columns), "silu" if gated else "gelu_tanh", gated, empty(1, count, columns),
                )  # fmt: skip

            found = recorded(monkeypatch, MODULE, "_linear_kernel", call)
            assert len(found) == 1
            kernels += [entry for entry in found if entry not in kernels]
    for kernel, usages in zip(kernels, compile_check.compile_kernels(kernels, capabilities), strict=True):
        assert all(usage.fits for usage in usages), (kernel, usages)


def test_the_smallest_tiles_compile(monkeypatch, tiles_of):
    """Tiles narrower than a cache line, and a single output, of which Triton makes a constant."""
    tiles_of(16, 16, 3)
    check_compiled(
        monkeypatch, [(21, 70, True), (1, 1, False), (1, 40, True)], (3,), (torch.bfloat16,), (80, 90)
    )


def test_the_largest_tiles_compile_without_spills(monkeypatch):
    """Gated, streamed and held weights at the most rows; 8.6 has the least shared memory."""
    shapes = [(11008, 4096, True), (50257, 768, False), (2304, 768, False)]
    check_compiled(monkeypatch, shapes, (32,), (torch.bfloat16,), (86, 90))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, 16, 32])
def test_all_tiles_compile_without_spills(rows, monkeypatch):
    check_compiled(monkeypatch, SHAPES, (rows,), (torch.bfloat16, torch.float16), (80, 86, 90))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 31, 32, 160])
def test_on_the_gpu_at_real_sizes(rows, dtype):
    for columns, inner, gated in SHAPES[:6] + SHAPES[-2:]:
        given = arguments(rows, columns, inner, gated, bias=not gated, residual=True, norm="rms")
        activation = "silu" if gated else "gelu_tanh"
        first = check_loss(given, dtype, activation=activation, gated=gated)
        assert torch.equal(first, check_loss(given, dtype, activation=activation, gated=gated))
        assert not skinny_linear.arrivals(DEVICE).any()
