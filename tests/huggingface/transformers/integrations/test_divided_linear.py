"""Products in parts: which are divided, and that their sum is the product, rounded once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from huggingface.transformers.integrations import skinny_linear
from huggingface.transformers.integrations.compile_ahead import _Undone
from huggingface.transformers.integrations.divided_linear import (
    Parts,
    choose_parts,
    divided_linear,
    divided_linear_reference,
)
from huggingface.transformers.integrations.fragment_linear import choose_fragment_tile
from huggingface.transformers.integrations.fused_norm import add_norm, settle
from huggingface.transformers.integrations.skinny_linear import parts_for

from .test_fused_norm import make_norm


@pytest.mark.parametrize("rows", [33, 64, 96, 128])
@pytest.mark.parametrize(
    "columns, inner, count",
    [
        (2048, 2048, 2),
        (2048, 8192, 4),
        (2048, 5632, 2),
        (512, 2048, 4),
        (768, 3072, 4),
        (2560, 2560, 2),
        (2560, 10240, 2),
        (2561, 10240, None),
        (6144, 2048, None),
        (8192, 2048, None),
        (511, 2048, None),
        (2048, 2047, None),
        (2048, 2056, None),
        (2048, 8208, None),
    ],
)
def test_which_products_are_divided(rows, columns, inner, count):
    assert choose_parts(rows, columns, inner) == count


@pytest.mark.parametrize("rows", [1, 32, 193, 1000])
def test_few_and_many_rows_are_not_divided(rows):
    assert choose_parts(rows, 2048, 8192) is None


def test_wide_products_are_divided_up_to_fewer_rows():
    assert (choose_parts(192, 2048, 8192), choose_parts(129, 2560, 10240)) == (4, None)


def test_parts_are_added_in_their_order_and_rounded_once():
    """Large parts that cancel, and a bias that a sum rounded before it would lose."""
    parts = torch.tensor([[1e8], [1.0], [-1e8], [2048.0]])
    assert Parts(parts).sum(torch.float32).item() == 2048.0
    assert Parts(parts, torch.ones(1)).sum(torch.float32).item() == 2049.0
    halves = torch.tensor([[1024.0], [1024.5]])
    got = Parts(halves, torch.tensor([0.75], dtype=torch.float16)).sum(torch.float16)
    assert (got.dtype, got.item()) == (torch.float16, 2050.0)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_the_sum_is_the_product(dtype, count):
    torch.manual_seed(count)
    rows, weight, bias = (
        torch.randn(2, 5, 24).to(dtype),
        torch.randn(7, 24).to(dtype),
        torch.randn(7).to(dtype),
    )
    got = divided_linear(rows, weight, count, bias)
    assert got.parts.shape == (count, 2, 5, 7)
    assert got.parts.dtype == torch.float32
    first = slice(0, 24 // count)
    torch.testing.assert_close(got.parts[0], rows[..., first].float() @ weight[:, first].float().t())
    exact = F.linear(rows.double(), weight.double(), bias.double())
    torch.testing.assert_close(got.sum(dtype), exact.to(dtype))


def test_unequal_parts_are_refused():
    with pytest.raises(ValueError, match="24 inputs cannot be divided into 5"):
        divided_linear(torch.randn(3, 24), torch.randn(2, 24), 5)


def sized(rows: int, columns: int, inner: int, dtype=torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns rows and weights that hold nothing."""
    return (
        torch.empty(1, rows, inner, dtype=dtype, device="meta"),
        torch.empty(columns, inner, dtype=dtype, device="meta"),
    )


def test_what_our_kernels_compute_is_not_divided(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(skinny_linear, "unavailable", lambda device: None)
    monkeypatch.setattr(skinny_linear, "gluon_unavailable", lambda: None)
    assert choose_fragment_tile(40, 2048, 2048) is not None
    assert parts_for(*sized(40, 2048, 2048)) is None
    assert parts_for(*sized(64, 2048, 2048)) == 2
    assert parts_for(*sized(40, 2048, 8192)) == 4
    assert parts_for(*sized(32, 2048, 8192)) is None
    assert parts_for(*sized(64, 768, 768)) is None
    assert parts_for(*sized(64, 2048, 2048, torch.float32)) is None
    monkeypatch.setattr(skinny_linear, "gluon_unavailable", lambda: "no Gluon")
    assert parts_for(*sized(40, 2048, 2048)) == 2


def test_without_triton_nothing_is_divided(monkeypatch):
    monkeypatch.setattr(skinny_linear, "unavailable", lambda device: "no Triton")
    assert parts_for(*sized(64, 2048, 2048)) is None


def test_the_librarys_product_can_be_walked_through():
    """Compilation ahead leaves it undone, and has to know the size of its result."""
    rows, weight = torch.randn(6, 2, 8).half(), torch.randn(5, 2, 8).half()
    with torch.inference_mode(), _Undone():
        made = torch.bmm(rows.transpose(0, 1), weight.permute(1, 2, 0), out_dtype=torch.float32)
    assert (made.shape, made.dtype, made.stride()) == ((2, 6, 5), torch.float32, (30, 5, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [33, 64, 100, 160, 192])
@torch.no_grad()
def test_on_the_gpu_at_real_sizes(rows, dtype, bias, kind):
    """Product, addition and norm lose at most twice what they lose with the library's product."""
    for columns, inner in ((2048, 2048), (2048, 8192), (768, 3072)):
        torch.manual_seed(rows)
        given = torch.randn(1, rows, inner).to("cuda", dtype)
        weight = (torch.randn(columns, inner) * inner**-0.5).to("cuda", dtype)
        offset = torch.randn(columns).to("cuda", dtype) if bias else None
        hidden = torch.randn(1, rows, columns).to("cuda", dtype)
        norm = make_norm(kind, columns).to("cuda", dtype)
        count = choose_parts(rows, columns, inner)
        assert count is not None
        parts = divided_linear(given, weight, count, offset)
        reference = divided_linear_reference(given, weight, count, offset)
        torch.testing.assert_close(parts.parts, reference.parts, atol=1e-4, rtol=1e-4)
        again = divided_linear(given, weight, count, offset)
        assert torch.equal(parts.parts, again.parts)
        normed, total = add_norm(hidden, parts, norm)
        assert torch.equal(total, settle(hidden, parts))
        plain, plain_total = add_norm(hidden, F.linear(given, weight, offset), norm)
        wide = None if offset is None else offset.double()
        exact_total = hidden.double() + F.linear(given.double(), weight.double(), wide)
        exact = make_norm(kind, columns).to("cuda").double()
        exact.load_state_dict(norm.state_dict())
        for got, library, want in (
            (total, plain_total, exact_total),
            (normed, plain, exact(exact_total)),
        ):
            loss = float((library.double() - want).abs().max())
            assert float((got.double() - want).abs().max()) <= 2 * loss
