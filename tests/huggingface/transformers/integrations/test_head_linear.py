"""The LM head's product is the same whether its rows are few or many, and whether they lie apart or not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from huggingface.transformers.integrations.head_linear import head_linear


@pytest.mark.parametrize("vocab, apart", [(40, False), (41, True)])
@pytest.mark.parametrize("batch, rows", [(1, 3), (2, 17), (3, 40)])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_the_plain_product(batch, rows, vocab, apart, biased):
    torch.manual_seed(rows)
    states, weight = torch.randn(batch, rows, 16), torch.randn(vocab, 16)
    bias = torch.randn(vocab) if biased else None
    logits = head_linear(states, weight, bias)
    torch.testing.assert_close(logits, F.linear(states, weight, bias))
    many = batch * rows > 32
    assert logits.stride() == ((48 * rows, 48, 1) if many and apart else (vocab * rows, vocab, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [50257, 8192])
@pytest.mark.parametrize("rows", [7, 49, 64, 160])
@torch.no_grad()
def test_on_the_gpu_in_half_precision(rows, vocab):
    torch.manual_seed(rows)
    states, weight = (torch.randn(size, 768, device="cuda", dtype=torch.bfloat16) for size in (rows, vocab))
    exact = states.double() @ weight.double().T
    loss = (F.linear(states, weight) - exact).abs().max()
    assert (head_linear(states[None], weight)[0] - exact).abs().max() <= 1.5 * loss
