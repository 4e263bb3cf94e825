"""The packed product equals the plain one, follows its weight, and stays away where it does not belong."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from huggingface.transformers.integrations import packed_linear
from huggingface.transformers.integrations.packed_linear import (
    PACKED,
    outputs_first,
    pack_linears,
    packed_linear_reference,
    project_together,
)

pytestmark = pytest.mark.skipif(not packed_linear.is_available(), reason="this torch has no oneDNN")


@pytest.mark.parametrize("rows", [1, 2, 7, 33])
@pytest.mark.parametrize("shape", [(1, 3), (17, 5), (256, 256), (1025, 1024)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_reference(rows, shape, bias):
    """Tolerance: twice what the plain float32 product loses against float64, over all numbers: single ones vary by chance."""
    torch.manual_seed(rows)
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
    loss, plain_loss = (float((one - exact).pow(2).mean().sqrt()) for one in (got, plain))
    assert loss <= 2 * plain_loss + 1e-7


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("shape", [(1, 3), (17, 5), (1025, 1024)])
def test_a_weight_kept_as_inputs_by_outputs_equals_the_reference(rows, shape, monkeypatch):
    """GPT-2's layer; that it takes the packed product, and not its own, is seen too."""
    layer = Conv1D(*shape)
    nn.init.normal_(layer.bias)
    packed = []
    make = packed_linear._Packed
    monkeypatch.setattr(packed_linear, "_Packed", lambda layers: packed.append(1) or make(layers))
    assert pack_linears(nn.Sequential(layer)) == 1
    x = torch.randn(2, rows, shape[1])
    with torch.no_grad():
        got = layer(x)
        plain = packed_linear_reference(x, layer.weight.t(), layer.bias)
    torch.testing.assert_close(got, plain)
    assert len(packed) == (rows > 1 or layer.weight.numel() >= packed_linear.LARGE_WEIGHT)


CHANGES = {
    "weight in place": lambda layer: layer.weight.mul_(2.0),
    "new data": lambda layer: setattr(layer.weight, "data", layer.weight.data * 3.0),
    "new weight": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(8, 8))),
    "new bias": lambda layer: setattr(layer, "bias", nn.Parameter(torch.randn(8))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_changed_layer_is_packed_anew(kind, change):
    layer = kind(8, 8)
    pack_linears(nn.Sequential(layer))
    x = torch.randn(1, 4, 8)
    with torch.no_grad():
        layer(x)
        change(layer)
        torch.testing.assert_close(layer(x), packed_linear_reference(x, outputs_first(layer), layer.bias))


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_layer_that_has_run_is_copied_and_pickled(kind):
    layer = kind(8, 8)
    pack_linears(nn.Sequential(layer))
    x = torch.randn(1, 4, 8)
    with torch.no_grad():
        want = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301 - our own bytes
            assert torch.equal(twin(x), want)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_training_and_names_are_untouched(kind):
    layer = kind(8, 8)
    names = list(layer.state_dict())
    pack_linears(nn.Sequential(layer))
    assert type(layer) is PACKED[kind]
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
