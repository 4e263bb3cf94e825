"""The packed product equals the plain one, follows its weight, and stays away where it does not belong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from huggingface.transformers.integrations import packed_linear
from huggingface.transformers.integrations.packed_linear import (
    PackedLinear,
    pack_linears,
    packed_linear_reference,
    project_together,
)

pytestmark = pytest.mark.skipif(not packed_linear.is_available(), reason="this torch has no oneDNN")


@pytest.mark.parametrize("rows", [1, 2, 7, 33])
@pytest.mark.parametrize("shape", [(1, 3), (17, 5), (256, 256), (1025, 1024)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_reference(rows, shape, bias):
    """Tolerance: twice what the plain float32 product loses against float64."""
    out_features, in_features = shape
    model = nn.Sequential(nn.Linear(in_features, out_features, bias=bias))
    assert pack_linears(model) == 1
    layer = model[0]
    x = torch.randn(2, rows, in_features)
    with torch.no_grad():
        got = layer(x)
        plain = packed_linear_reference(x, layer.weight, layer.bias)
        exact = packed_linear_reference(
            x.double(), layer.weight.double(), layer.bias.double() if bias else None
        )
    loss = float((plain - exact).abs().max())
    assert float((got - exact).abs().max()) <= 2 * loss + 1e-6


def test_a_changed_weight_is_packed_anew():
    layer = nn.Linear(8, 8)
    pack_linears(nn.Sequential(layer))
    x = torch.randn(1, 4, 8)
    with torch.no_grad():
        layer(x)
        layer.weight.mul_(2.0)
        torch.testing.assert_close(layer(x), packed_linear_reference(x, layer.weight, layer.bias))


def test_training_and_names_are_untouched():
    layer = nn.Linear(8, 8)
    names = list(layer.state_dict())
    pack_linears(nn.Sequential(layer))
    assert isinstance(layer, PackedLinear)
    assert list(layer.state_dict()) == names
    layer(torch.randn(1, 4, 8)).sum().backward()
    assert layer.weight.grad is not None


def test_other_dtypes_and_large_models_stay_plain(monkeypatch):
    assert pack_linears(nn.Linear(8, 8).to(torch.bfloat16)) == 0
    monkeypatch.setattr(packed_linear, "PACK_LIMIT", 8)
    assert pack_linears(nn.Linear(8, 8)) == 0


@pytest.mark.parametrize("rows", [1, 5])
def test_layers_together_equal_layers_apart(rows):
    layers = tuple(nn.Linear(24, width, bias=False) for width in (16, 8, 40))
    x = torch.randn(2, rows, 24)
    with torch.no_grad():
        want = [packed_linear_reference(x, layer.weight, None) for layer in layers]
        pack_linears(nn.ModuleList(layers))
        for got in (project_together(layers, x), project_together(layers, x)):
            for ours, theirs in zip(got, want, strict=True):
                torch.testing.assert_close(ours, theirs)
        layers[1].weight.mul_(2.0)
        torch.testing.assert_close(project_together(layers, x)[1], 2 * want[1])


def test_hooks_are_not_skipped():
    """Gated LoRA is a hook on these layers."""
    layers = tuple(nn.Linear(8, 8, bias=False) for _ in range(2))
    pack_linears(nn.ModuleList(layers))
    layers[1].register_forward_hook(lambda module, args, output: output + 1.0)
    x = torch.randn(1, 4, 8)
    with torch.no_grad():
        got = project_together(layers, x)
        torch.testing.assert_close(got[1], packed_linear_reference(x, layers[1].weight, None) + 1.0)
