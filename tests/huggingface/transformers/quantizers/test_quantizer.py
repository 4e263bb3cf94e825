"""Packed weights through `from_pretrained` and `save_pretrained`: stock classes, streams, and what cannot be packed."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    modeling_utils,
)
from transformers.pytorch_utils import Conv1D

from huggingface.transformers.integrations.quantized_linear import QuantizedLinear
from huggingface.transformers.models.spec_stream import load_streaming
from huggingface.transformers.quantizers import quantizer
from huggingface.transformers.quantizers.configuration import PackedWeightsConfig
from huggingface.transformers.quantizers.packing import WeightFormat, dequantize

CONFIGS = [PackedWeightsConfig(8), PackedWeightsConfig(4), PackedWeightsConfig(4, 32, True)]
NAMES = ["int8", "int4", "int4-groups"]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=13, n_embd=48, n_layer=2, n_head=2, n_positions=64))


def qwen2() -> nn.Module:
    """Query, key and value with biases, grouped heads, a head tied to the embeddings."""
    sizes = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Qwen2ForCausalLM(
        Qwen2Config(vocab_size=13, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    )


@pytest.fixture(params=[gpt2, qwen2], ids=["gpt2", "qwen2"])
def saved(request, tmp_path):
    """A tiny stock model and the directory it was saved in."""
    torch.manual_seed(0)
    model = request.param().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "plain")
    return model, str(tmp_path / "plain")


def twin(model: nn.Module, packed: nn.Module) -> nn.Module:
    """Returns the model with its weights replaced by what the packed ones stand for."""
    copied = copy.deepcopy(model)
    for name, module in packed.named_modules():
        if isinstance(module, QuantizedLinear):
            dense = dequantize(
                module.packed.tensors(),
                module.kind,
                module.in_features,
                copied.get_submodule(name).weight.dtype,
            )
            target = copied.get_submodule(name)
            target.weight.data = dense.t() if isinstance(target, Conv1D) else dense
    return copied


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_quantised_on_load_saved_and_loaded_bit_equal(config, saved, tmp_path):
    model, directory = saved
    loaded, found = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=config, output_loading_info=True
    )
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    converted = [name for name, module in loaded.named_modules() if isinstance(module, QuantizedLinear)]
    linears = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    assert converted == [name for name in linears if name != "lm_head"]
    torch.testing.assert_close(loaded(IDS).logits, twin(model, loaded)(IDS).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-5)
    loaded.save_pretrained(tmp_path / "packed")
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    kept, read = loaded.state_dict(), again.state_dict()
    assert kept.keys() == read.keys()
    assert all(kept[name].dtype == read[name].dtype and torch.equal(kept[name], read[name]) for name in kept)
    assert torch.equal(again(IDS).logits, loaded(IDS).logits)
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("plain", "packed")}
    assert sizes["packed"] < sizes["plain"] * (0.65 if config.bits == 8 else 0.6)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_in_place_is_the_same_as_on_load(config, saved):
    model, directory = saved
    loaded = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    packed = quantizer.quantize_model(model, config)
    kept, read = packed.state_dict(), loaded.state_dict()
    assert all(torch.equal(kept[name], read[name]) for name in kept)


@pytest.mark.parametrize("config", [PackedWeightsConfig(8), PackedWeightsConfig(4, 64)])
def test_memory_is_set_aside_for_what_is_packed(config, saved, monkeypatch):
    """Upstream does so before it reads weights to a GPU, by what each number is said to take there."""
    asked = []
    monkeypatch.setattr(
        modeling_utils,
        "caching_allocator_warmup",
        lambda *given: asked.append(modeling_utils.get_total_byte_count(*given)),
    )
    options = {
        "quantization_config": copy.deepcopy(config),
        "device_map": {"": "cpu"},
        "dtype": torch.float16,
    }
    model = AutoModelForCausalLM.from_pretrained(saved[1], **options)
    assert asked == [{"cpu": sum(parameter.nbytes for parameter in model.parameters())}]


def test_half_precision_keeps_the_scales(saved):
    _, directory = saved
    config = PackedWeightsConfig(4, 32)
    half = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, dtype=torch.bfloat16)
    layer = next(module for module in half.modules() if isinstance(module, QuantizedLinear))
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.uint8, torch.float16)
    assert half.get_input_embeddings().weight.dtype == torch.bfloat16
    assert torch.isfinite(half(IDS).logits).all()


def test_named_modules_stay_as_they_are(saved):
    _, directory = saved
    config = PackedWeightsConfig(8, modules_to_not_convert=["mlp"])
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    kinds = {
        name: type(module) for name, module in model.named_modules() if name.split(".")[-2:-1] == ["mlp"]
    }
    assert kinds
    assert QuantizedLinear not in kinds.values()


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_streams_stay_exact_against_the_same_quantised_model(config, architecture, make_model, tmp_path):
    """Updates of stream rows hang on hooks of the layers that were swapped."""
    model = make_model(architecture, hidden_size=48)
    for name, parameter in model.streams.named_parameters():
        if name.endswith("up.weight"):
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    packed = load_streaming(str(tmp_path), quantization_config=config).eval()
    assert any(isinstance(module, QuantizedLinear) for module in packed.modules())
    assert not any(isinstance(module, QuantizedLinear) for module in packed.streams.modules())
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = packed.generate(IDS, drafts="none", **options)
    drafted = packed.generate(IDS, draft_nodes=6, return_dict_in_generate=True, **options)
    assert torch.equal(drafted.sequences, plain)
    anchors = torch.tensor([[2, 5]])
    with_updates = packed.stream_forward(IDS, anchors)[1]
    for lora in packed.streams.lora.values():
        nn.init.zeros_(lora.up.weight)
    assert not torch.allclose(packed.stream_forward(IDS, anchors)[1], with_updates)


def test_a_weight_that_is_not_finite_names_its_layer(saved):
    model, directory = saved
    path = f"{directory}/model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "mlp" in name and name.endswith("weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name.removesuffix('.weight')}: the weight holds NaN"):
        AutoModelForCausalLM.from_pretrained(directory, quantization_config=PackedWeightsConfig(8))
    dict(model.named_parameters())[name].data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=rf"{name.removesuffix('.weight')}: the weight holds NaN"):
        quantizer.quantize_model(model, PackedWeightsConfig(4))


@pytest.mark.parametrize(
    "fields, message",
    [({"bits": 3}, "4 or 8 bits"), ({"group_size": 7}, "group size 7"), ({"colour": 1}, "unknown fields")],
)
def test_wrong_configurations_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        PackedWeightsConfig(**fields)


def test_registering_twice_changes_nothing():
    quantizer.register()
    quantizer.register()


def planned(model: nn.Module) -> PackedWeightsConfig:
    """Returns a plan that has one layer in 8 bits, one as it is, and the others in 4."""
    names = list(quantizer.convertible(model, []))
    return PackedWeightsConfig(4, 32, modules={names[1]: {"bits": 8}, names[-1]: "plain"})


def test_a_plan_mixes_formats_and_comes_back_bit_equal(saved, tmp_path):
    model, directory = saved
    config = planned(model)
    loaded = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    kinds = {
        name: module.kind for name, module in loaded.named_modules() if isinstance(module, QuantizedLinear)
    }
    names = list(quantizer.convertible(model, []))
    assert kinds == {
        name: WeightFormat(8) if name == names[1] else WeightFormat(4, 32)
        for name in names
        if name != names[-1]
    }
    plain = loaded.get_submodule(names[-1])
    assert torch.equal(plain.weight, model.get_submodule(names[-1]).weight)
    torch.testing.assert_close(loaded(IDS).logits, twin(model, loaded)(IDS).logits, atol=1e-5, rtol=1e-5)
    loaded.save_pretrained(tmp_path / "packed")
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.quantization_config.modules == config.modules
    kept, read = loaded.state_dict(), again.state_dict()
    assert kept.keys() == read.keys()
    assert all(kept[name].dtype == read[name].dtype and torch.equal(kept[name], read[name]) for name in kept)
    packed = quantizer.quantize_model(model, config).state_dict()
    assert packed.keys() == kept.keys()
    assert all(torch.equal(packed[name], kept[name]) for name in kept)


def test_a_plan_for_another_model_is_refused_before_anything_is_read(saved, monkeypatch):
    model, directory = saved
    config = PackedWeightsConfig(4, modules={"layers.9.nothing": {"bits": 8}})
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(quantizer.PackWeights, "convert", lambda *_, **__: pytest.fail("a weight was read"))
    with pytest.raises(
        ValueError, match=r"names layers\.9\.nothing, which .* has not among its \d+ linear layers"
    ):
        AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    with pytest.raises(ValueError, match=r"layers\.9\.nothing"):
        quantizer.quantize_model(model, config)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("own", [{"bits": 5}, {"colour": 1}, "half", 8])
def test_a_wrong_format_in_a_plan_names_the_module(own):
    with pytest.raises(ValueError, match="of module h.0.fc is not known"):
        PackedWeightsConfig(4, modules={"h.0.fc": own})
