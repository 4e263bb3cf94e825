"""torch's product over 4-bit weights equals the weight read back, follows its layer, and stays away where it does not belong."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from huggingface.transformers.integrations import repacked_int4
from huggingface.transformers.integrations.quantized_linear import QuantizedLinear, QuantizedWeight
from huggingface.transformers.integrations.repacked_int4 import RepackedLinear, copied_group, repack_linears
from huggingface.transformers.quantizers.configuration import PackedWeightsConfig
from huggingface.transformers.quantizers.packing import WeightFormat
from huggingface.transformers.quantizers.quantizer import quantize_model

pytestmark = pytest.mark.skipif(
    not repacked_int4.is_available(), reason="this torch or processor has no fast 4-bit product"
)
FORMATS = [
    WeightFormat(4),
    *[WeightFormat(4, size, zero) for size in (32, 64, 128) for zero in (False, True)],
]


def layer_of(kind: WeightFormat, outputs: int, inner: int, bias: bool = True) -> QuantizedLinear:
    torch.manual_seed(0)
    layer = QuantizedLinear(inner, outputs, bias, kind, torch.bfloat16)
    for name, tensor in QuantizedWeight.of(torch.randn(outputs, inner), kind).tensors().items():
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
    if bias:
        layer.bias.data.normal_()
    return layer


def took_it(layer: QuantizedLinear) -> bool:
    return "_copy" in layer.__dict__


@pytest.mark.parametrize("shape", [(16, 128), (48, 640), (256, 1024)])
@pytest.mark.parametrize("rows", [1, 3, 32])
@pytest.mark.parametrize("kind", FORMATS, ids=str)
def test_equals_the_weight_read_back(kind, rows, shape):
    """Tolerance: twice what the bfloat16 product of the weight read back loses against float32."""
    layer = layer_of(kind, *shape)
    assert repack_linears(nn.Sequential(layer)) == 1
    x = torch.randn(2, 1, shape[1]).bfloat16() if rows == 1 else torch.randn(rows, shape[1]).bfloat16()
    got = layer(x)
    assert took_it(layer)
    plain = QuantizedLinear.forward(layer, x)
    exact = x.float() @ layer.packed.dense(torch.float32).t() + layer.bias.float()
    assert got.shape == plain.shape
    assert got.dtype == torch.bfloat16
    loss = float((plain.float() - exact).square().mean().sqrt())
    assert float((got.float() - exact).square().mean().sqrt()) <= 2 * loss


@pytest.mark.parametrize(
    "kind, outputs, inner, size",
    [
        (WeightFormat(4, 64), 32, 128, 64),
        (WeightFormat(4), 32, 96, 32),
        (WeightFormat(4), 32, 640, 128),
        (WeightFormat(4, 128), 32, 160, None),  # a tail
        (WeightFormat(4), 32, 100, None),
        (WeightFormat(4, 32), 13, 64, None),
        (WeightFormat(8), 32, 64, None),
    ],
    ids=str,
)
def test_which_weights_it_holds(kind, outputs, inner, size):
    assert copied_group(kind, inner, outputs) == size
    layer = layer_of(kind, outputs, inner)
    assert repack_linears(nn.Sequential(layer)) == (size is not None)
    assert isinstance(layer, RepackedLinear) == (size is not None)


@pytest.mark.parametrize(
    "dtype, rows",
    [(torch.float32, 1), (torch.float16, 1), (torch.bfloat16, 33), (torch.bfloat16, 0)],
    ids=str,
)
def test_it_stays_away(dtype, rows):
    layer = layer_of(WeightFormat(4, 32), 16, 64, bias=False)
    repack_linears(nn.Sequential(layer))
    x = torch.randn(rows, 64).to(dtype)
    assert torch.equal(layer(x), QuantizedLinear.forward(layer, x))
    assert not took_it(layer)


def test_it_follows_its_weight():
    layer = layer_of(WeightFormat(4, 32), 16, 64, bias=False)
    repack_linears(nn.Sequential(layer))
    x = torch.randn(2, 64).bfloat16()
    before = layer(x)
    layer.weight_scale.mul_(2)
    torch.testing.assert_close(layer(x), 2 * before)
    layer.weight = nn.Parameter(torch.full_like(layer.weight, 8 + 16 * 8), requires_grad=False)
    assert not layer(x).any()


def test_too_large_a_model_is_not_copied(monkeypatch):
    layer = layer_of(WeightFormat(4, 32), 16, 64)
    monkeypatch.setattr(repacked_int4, "COPY_LIMIT", layer.weight.nbytes - 1)
    assert repack_linears(nn.Sequential(layer)) == 0
    assert type(layer) is QuantizedLinear


def test_a_processor_without_it_keeps_what_it_has(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert repack_linears(nn.Sequential(layer_of(WeightFormat(4, 32), 16, 64))) == 0


def test_generation_uses_it_and_saves_nothing_of_it(make_model):
    model = quantize_model(
        copy.deepcopy(make_model("llama", torch.bfloat16, hidden_size=64)), PackedWeightsConfig(4, 32)
    )
    names = set(model.state_dict())
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(ids, drafts="none", **options)
    assert plain.shape == (1, 17)
    assert any(took_it(module) for module in model.modules() if isinstance(module, RepackedLinear))
    assert set(model.state_dict()) == names
    twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(ids, drafts="none", **options), plain)
