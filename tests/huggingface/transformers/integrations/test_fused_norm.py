"""Addition and norm in one pass: equal to one after the other, and rounded like them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from huggingface.transformers.integrations import fused_norm
from huggingface.transformers.integrations.divided_linear import Parts
from huggingface.transformers.integrations.fused_norm import add_norm, add_norm_reference, is_known
from huggingface.transformers.integrations.triton_support import unavailable

from . import compile_check
from .recorded_launch import recorded

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLACE = "huggingface.transformers.integrations.fused_norm"
needs_kernels = pytest.mark.skipif(unavailable(DEVICE) is not None, reason="no Triton")

FLOAT32_ROUNDING = torch.finfo(torch.float32).eps


def make_norm(kind: str, features: int) -> nn.Module:
    norm = nn.LayerNorm(features, eps=1e-5) if kind == "layer" else LlamaRMSNorm(features, eps=1e-6)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, mean=0.5)
    return norm


@torch.no_grad()
def check(kind, shape, update, dtype):
    torch.manual_seed(shape[-1])
    norm = make_norm(kind, shape[-1]).to(DEVICE, dtype)
    # A mean and a spread far from 0 and 1: what a LayerNorm has to take away.
    hidden = (torch.randn(shape) * 3 + 2).to(DEVICE, dtype)
    check_sum(hidden, torch.randn(shape).to(DEVICE, dtype) if update else None, norm)


def make_parts(shape, count: int, bias: bool, dtype) -> Parts:
    return Parts(
        torch.randn(count, *shape, device=DEVICE),
        torch.randn(shape[-1]).to(DEVICE, dtype) if bias else None,
    )


def check_sum(hidden, added, norm) -> None:
    dtype, before = hidden.dtype, hidden.clone()
    got, total = add_norm(hidden, added, norm)
    plain, plain_total = add_norm_reference(hidden, added, norm)
    exact, _ = add_norm_reference(plain_total.float(), None, copy.deepcopy(norm).float())
    assert torch.equal(total, plain_total)
    assert torch.equal(hidden, before)
    loss = float((plain.float() - exact).abs().max())
    assert got.dtype == dtype
    assert float((got.float() - exact).abs().max()) <= 2 * loss + 4 * FLOAT32_ROUNDING * float(
        exact.abs().max()
    )


@needs_kernels
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 3, 24), (1, 33, 17), (1, 1, 1000), (1, 2, 5000)])
def test_equals_one_after_the_other(kind, shape, update, dtype):
    check(kind, shape, update, dtype)


@needs_kernels
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 3, 24), (1, 33, 17), (1, 2, 1000)])
@torch.no_grad()
def test_a_product_in_parts_is_added_like_a_stored_one(shape, dtype, count, bias, kind):
    torch.manual_seed(count)
    norm = make_norm(kind, shape[-1]).to(DEVICE, dtype)
    hidden = (torch.randn(shape) * 3 + 2).to(DEVICE, dtype)
    parts = make_parts(shape, count, bias, dtype)
    check_sum(hidden, parts, norm)
    assert torch.equal(add_norm(hidden, parts, norm)[0], add_norm(hidden, parts.sum(dtype), norm)[0])


def test_parts_of_a_float64_step():
    norm = make_norm("rms", 8).double()
    hidden, parts = torch.randn(2, 3, 8).double(), Parts(torch.randn(2, 2, 3, 8), torch.randn(8).double())
    got, total = add_norm(hidden, parts, norm)
    assert torch.equal(total, hidden + parts.sum(torch.float64))
    assert torch.equal(got, norm(total))


def test_float64_is_exact():
    norm = make_norm("layer", 8).double()
    hidden, update = torch.randn(2, 3, 8).double(), torch.randn(2, 3, 8).double()
    got, total = add_norm(hidden, update, norm)
    assert torch.equal(total, hidden + update)
    assert torch.equal(got, norm(hidden + update))


def test_without_triton_the_reference_runs(monkeypatch):
    monkeypatch.setattr(fused_norm, "unavailable", lambda device: "no Triton")
    norm, hidden = make_norm("rms", 8), torch.randn(1, 2, 8)
    assert torch.equal(add_norm(hidden, None, norm)[0], norm(hidden))


@pytest.mark.parametrize(
    "norm, known",
    [
        (nn.LayerNorm(8), True),
        (LlamaRMSNorm(8), True),
        (nn.LayerNorm(8, elementwise_affine=False), False),
        (nn.LayerNorm(8, bias=False), False),
        (nn.RMSNorm(8), False),
        (nn.Identity(), False),
    ],
    ids=str,
)
def test_which_norms_are_known(norm, known):
    assert is_known(norm) is known


def check_compiled(monkeypatch, sizes, kinds, capabilities) -> None:
    """Compiles the kernel for rows of these sizes and asserts that it fits the card."""
    pytest.importorskip("triton")
    kernels = []
    for features, kind, layer in itertools.product(sizes, kinds, ("layer", "rms")):
        norm = make_norm(layer, features).to("meta", kind)
        rows = torch.empty(1, 2, features, dtype=kind, device="meta")
        parts = [torch.empty(count, 1, 2, features, device="meta") for count in (2, 4)]
        for update in (rows, *(Parts(one, rows[0, 0]) for one in parts)):
            kernels += recorded(
                monkeypatch,
                PLACE,
                "_add_norm_kernel",
                lambda rows=rows, update=update, norm=norm: add_norm(rows, update, norm),
            )
    for kernel, usages in zip(kernels, compile_check.compile_kernels(kernels, capabilities), strict=True):
        assert all(usage.fits for usage in usages), (kernel, usages)


def test_the_widest_rows_compile_without_spills(monkeypatch):
    check_compiled(monkeypatch, (8192,), (torch.bfloat16,), (86, 90))


@pytest.mark.slow
def test_all_rows_compile_without_spills(monkeypatch):
    check_compiled(monkeypatch, (768, 2048, 8192), (torch.bfloat16, torch.float16), (80, 86, 90))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("features", [768, 2048, 8192])
def test_on_the_gpu_at_real_sizes(kind, features, dtype):
    check(kind, (4, 160, features), True, dtype)
    check(kind, (1, 1, features), False, dtype)
