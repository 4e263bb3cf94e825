"""Seventeen to thirty-two rows through a ring in shared memory: what it computes, where it is chosen, and what it needs."""

from __future__ import annotations

import pytest
import torch

from huggingface.transformers.integrations import skinny_linear, staged_linear
from huggingface.transformers.integrations.skinny_linear import linear, linear_reference
from huggingface.transformers.integrations.staged_linear import choose_staged_splits, launch_staged
from huggingface.transformers.integrations.triton_support import unavailable

from . import compile_check
from .recorded_launch import recorded
from .test_skinny_linear import DEVICE, arguments, cast, check_loss, launches

pytestmark = pytest.mark.skipif(unavailable(DEVICE) is not None, reason="no Triton")
MODULE = "huggingface.transformers.integrations.staged_linear"
LARGE = [(6144, 2048), (8192, 2048), (2048, 8192)]
"""Outputs and inputs of three products of GPT-Neo-1.3B's layer; the fourth is `fragment_linear`'s."""


@pytest.fixture
def divided(monkeypatch):
    """Makes this kernel compute every product, its inner dimension divided among so many programs."""

    def use(splits: int) -> None:
        monkeypatch.setattr(skinny_linear, "choose_fragment_tile", lambda *sizes: None)
        monkeypatch.setattr(skinny_linear, "choose_staged_splits", lambda *sizes: splits)

    return use


@pytest.mark.parametrize("splits", [2, 4])
@pytest.mark.parametrize("rows", [17, 24, 31, 32])
def test_ragged_rows_and_columns(rows, splits, divided):
    divided(splits)
    for columns in (1, 64, 100, 128):
        check_loss(arguments(rows, columns, 512))


@pytest.mark.parametrize("activation", [None, "gelu_tanh", "silu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_every_epilogue(residual, bias, activation, divided):
    divided(2)
    check_loss(arguments(20, 70, 512, bias=bias, residual=residual), activation=activation)


@pytest.mark.parametrize("steps", [2, 3, 4, 5, 9])
def test_fewer_and_more_steps_than_stages(steps, divided):
    """A copy is done here when its group is waited for, so that a wait for too few shows."""
    divided(2)
    check_loss(arguments(18, 40, 2 * steps * staged_linear.BLOCK_INNER, norm="layer"))


def test_the_parts_are_added_in_their_order(divided):
    divided(4)
    given = arguments(20, 70, 1024, residual=True)
    first = check_loss(given)
    assert torch.equal(first, check_loss(given))
    assert not skinny_linear.arrivals(first.device).any()


def test_one_wrong_weight_shows(divided):
    """The comparisons above can fail: the last weight of the last stage."""
    divided(2)
    given = cast(arguments(20, 64, 512), torch.float16)
    exact = linear_reference(**cast(given, torch.float32))
    loss = (linear_reference(**given).float() - exact).abs().max()
    given["weight"][-1, -1] += 0.1
    assert (linear(**given).float() - exact).abs().max() > 4 * loss


@pytest.mark.parametrize(
    "rows, columns, inner, gated, expected",
    [
        (16, 4096, 2048, False, "launch_fragment"),
        (17, 4096, 2048, False, "launch_staged"),
        (32, 4096, 2048, False, "launch_staged"),
        (33, 4096, 2048, False, None),
        (17, 2048, 2048, False, "launch_fragment"),
        (17, 4096, 2048, True, "_launch"),
    ],
)
def test_who_computes_what(rows, columns, inner, gated, expected, monkeypatch):
    """Asks without computing: the products are too large to interpret."""
    started = launches(monkeypatch, compute=False)
    given = cast(arguments(1, 1, inner, gated), torch.float16)
    given["rows"] = given["rows"].expand(1, rows, inner).contiguous()
    given["weight"] = given["weight"][:1].expand(columns * (2 if gated else 1), inner)
    monkeypatch.setattr(skinny_linear, "_library_linear", lambda *args: None)
    linear(**given, gated=gated)
    assert started == ([] if expected is None else [expected])


def test_what_is_not_aligned_is_computed_elsewhere(monkeypatch):
    started = launches(monkeypatch, compute=False)
    held = torch.empty(4096 * 2048 + 1, dtype=torch.float16, device=DEVICE)
    rows = torch.empty(20, 2048, dtype=torch.float16, device=DEVICE)
    linear(rows, held[1:].view(4096, 2048))
    linear(rows, held[:-1].view(4096, 2048))
    assert started == ["_launch", "launch_staged"]


@pytest.mark.parametrize(
    "rows, columns, inner, expected",
    [
        (32, 6144, 2048, 2), (32, 8192, 2048, 2), (32, 2048, 8192, 8), (17, 6144, 2048, 2),
        (16, 6144, 2048, None), (33, 6144, 2048, None), (32, 8256, 2048, None), (32, 6144, 1920, None),
        (32, 6144, 2112, None), (32, 6144, 8320, None), (32, 64, 2048, None), (32, 512, 8192, 32), (32, 512, 4096, None),
        (32, 256, 8192, None),
    ],
)  # fmt: skip
def test_the_rule(rows, columns, inner, expected):
    """What was fastest or nearly so on an H200; `None` where another kernel was, or nothing was measured, or nothing is left."""
    assert choose_staged_splits(rows, columns, inner) == expected


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_kernels_compile_without_spills(kind, monkeypatch):
    pytest.importorskip("triton")

    def empty(*shape):
        return torch.empty(shape, dtype=kind, device="meta")

    kernels: list[tuple] = []
    for columns, inner in [*LARGE, (2047, 8192), (512, 8192)]:  # the last in the fewest steps
        splits = choose_staged_splits(32, columns, inner)
        output, counters = empty(32, columns), torch.empty(9, dtype=torch.int32, device="meta")
        given = empty(32, inner), empty(columns, inner), empty(columns), 1, output, output, counters
        kernels += recorded(
            monkeypatch, MODULE, "staged_linear_kernel", lambda s=splits, g=given: launch_staged(s, *g)
        )
    for kernel, usages in zip(kernels, compile_check.compile_kernels(kernels), strict=True):
        assert all(usage.fits for usage in usages), (kernel, usages)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [17, 31, 32])
def test_on_the_gpu_at_real_sizes(rows, dtype, monkeypatch):
    started = launches(monkeypatch)
    for columns, inner in [*LARGE, (4100, 2048)]:
        given = arguments(rows, columns, inner, bias=True, residual=True, norm="layer")
        first = check_loss(given, dtype, activation="gelu_tanh")
        assert torch.equal(first, check_loss(given, dtype, activation="gelu_tanh"))
    assert "launch_staged" in started
