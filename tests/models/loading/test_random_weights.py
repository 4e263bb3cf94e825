"""Random weights: the same for every dtype, class and packing, and never much more memory than the model takes in the end."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from huggingface.transformers.integrations.quantized_linear import QuantizedLinear, QuantizedWeight
from huggingface.transformers.models.spec_stream import stream_config_from
from huggingface.transformers.quantizers.configuration import PackedWeightsConfig
from huggingface.transformers.quantizers.packing import WeightFormat
from models.loading import random_weights as module
from models.loading.random_weights import random_model
from tests.architectures import inner_field, with_heads_of
from tests.models.conftest import tiny_config

INT4 = PackedWeightsConfig(4, 128)


def config_of(architecture: str, **values) -> PreTrainedConfig:
    """Returns the configuration of a small model whose linear layers are wide enough to be packed."""
    config = tiny_config(architecture)
    for name, value in {**with_heads_of(architecture, 64), inner_field(architecture): 256, **values}.items():
        setattr(config, name, value)
    return config


def build(architecture: str, dtype=torch.float32, packed=None, streams=False, **values) -> nn.Module:
    config = config_of(architecture, **values)
    if streams:
        config = stream_config_from(config, streams=2, stream_layers=1, transition_rank=4, lora_rank=2)
    return random_model(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, "cpu", dtype, packed)


def held(model: nn.Module) -> int:
    """Returns the bytes of the parameters that have memory, tied ones once."""
    return sum(parameter.nbytes for parameter in model.parameters() if not parameter.is_meta)


def test_every_tensor_has_values(architecture):
    """Buffers are what upstream computes in a model of its own, weights are drawn as widely."""
    model = build(architecture)
    config = config_of(architecture)
    upstream = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    buffers = dict(model.named_buffers())
    for name, expected in upstream.named_buffers():
        torch.testing.assert_close(buffers[name], expected)
    ours = dict(model.named_parameters())
    assert all(parameter.requires_grad for parameter in ours.values())
    for name, parameter in upstream.named_parameters():
        got, expected = ours[name].detach(), parameter.detach()
        torch.testing.assert_close(got.std(), expected.std(), rtol=0.2, atol=1e-6, msg=name)
        assert abs(float(got.mean() - expected.mean())) < 0.05, name


def test_layers_differ_and_the_head_stays_tied(architecture):
    model = build(architecture, tie_word_embeddings=True)
    weights = [p for n, p in model.named_parameters() if n.split(".")[-2] in ("v_proj", "c_attn")]
    assert len(weights) > 1
    assert not any(torch.equal(weights[0], other) for other in weights[1:])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    apart = build(architecture, tie_word_embeddings=False)
    assert not torch.equal(apart.get_output_embeddings().weight, apart.get_input_embeddings().weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_dtype_gets_the_same_weights_but_for_rounding(architecture, dtype):
    exact, rounded = build(architecture), dict(build(architecture, dtype).named_parameters())
    for name, parameter in exact.named_parameters():
        assert rounded[name].dtype == dtype
        assert torch.equal(rounded[name], parameter.to(dtype)), name


@pytest.mark.parametrize("streams", [False, True])
def test_packed_weights_are_those_of_the_dtype_packed(architecture, streams):
    plain = build(architecture, torch.bfloat16, streams=streams)
    packed = build(architecture, torch.bfloat16, INT4, streams=streams)
    stored = {n: m for n, m in packed.named_modules() if isinstance(m, QuantizedLinear)}
    assert stored
    for name, layer in stored.items():
        weight = plain.get_submodule(name).weight
        expected = QuantizedWeight.of(weight.t() if layer.transposed else weight, WeightFormat(4, 128))
        assert torch.equal(layer.weight, expected.weight), name
    assert packed.config.quantization_config is INT4


def test_streams_leave_the_main_weights_alone(architecture):
    ours = build(architecture, streams=True).state_dict()
    for name, expected in build(architecture).state_dict().items():
        assert torch.equal(ours[name], expected), name


@pytest.mark.parametrize("packed", [None, PackedWeightsConfig(8), INT4], ids=["plain", "int8", "int4"])
def test_a_model_is_made_and_packed_layer_by_layer(packed, monkeypatch):
    """What it holds at any time exceeds what it holds in the end by less than a layer."""
    most, models = [0], []

    def watched(function):
        def call(model, *given):
            models.append(model)
            found = function(model, *given)
            most[0] = max(most[0], held(model))
            return found

        return call

    monkeypatch.setattr(module, "_fill", watched(module._fill))
    monkeypatch.setattr(module, "quantize_layer", watched(module.quantize_layer))
    layers = 16
    model = build("llama", torch.bfloat16, packed, num_hidden_layers=layers)
    final = held(model)
    assert most[0] <= final * (1 + 4 / layers)
    assert all(one is model for one in models)
    assert len(models) >= layers


def test_a_part_is_drawn_in_float32_and_cast_at_once(monkeypatch):
    wide: list[int] = []
    original = module._fill

    def fill(model, *given):
        original(model, *given)
        wide.append(sum(p.dtype == torch.float32 for p in model.parameters() if not p.is_meta))

    monkeypatch.setattr(module, "_fill", fill)
    build("mistral", torch.bfloat16)
    assert not any(wide)
