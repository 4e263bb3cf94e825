"""Quantising alone: what is measured is what packing does, and everything is put back."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from huggingface.transformers.generation.perplexity import Likelihood
from huggingface.transformers.integrations.quantized_linear import QuantizedLinear
from huggingface.transformers.quantizers.configuration import PackedWeightsConfig
from huggingface.transformers.quantizers.packing import WeightFormat
from huggingface.transformers.quantizers.quantizer import convertible, quantize_model
from precision.calibration import Sample
from precision.measure import check_weights, likelihoods, measure_unit, nll_change, stored_as, stored_bytes
from precision.units import units
from tests.models.conftest import tiny_config

SAMPLES = [Sample([1], [5, 9, 2, 6]), Sample([3, 1], [4, 1, 5]), Sample([8], [9, 7, 9])]
TRIAL = WeightFormat(4, 32)


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    torch.manual_seed(0)
    if request.param == "llama":
        return LlamaForCausalLM(tiny_config("llama")).eval()
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(vocab_size=13, initializer_range=0.3, **sizes)).eval()


@pytest.mark.parametrize("by", ["module", "layer", "projection"])
def test_a_unit_is_measured_as_the_quantiser_packs_it(model, by):
    modules = convertible(model, [])
    unit = units(modules, by)[-1]
    others = [name for name in modules if name not in unit.modules]
    before = likelihoods(model, SAMPLES)
    kept = copy.deepcopy(model.state_dict())
    row = measure_unit(model, modules, unit, TRIAL, SAMPLES, before)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in modules.values())
    for kind, found in ((TRIAL, row["nll_change"]), (WeightFormat(8), row["int8_nll_change"])):
        plan = dict.fromkeys(others, "plain")
        packed = quantize_model(
            copy.deepcopy(model), PackedWeightsConfig(kind.bits, kind.group_size, modules=plan)
        )
        expected = nll_change(before, likelihoods(packed, SAMPLES))[0]
        assert found == pytest.approx(expected, abs=1e-5)
        stored = [module for module in packed.modules() if isinstance(module, QuantizedLinear)]
        assert len(stored) == len(unit.modules)
        name = "default" if kind is TRIAL else "int8"
        tensors = (tensor for module in stored for tensor in module.packed.tensors().values())
        assert row["bytes"][name] == sum(tensor.nbytes for tensor in tensors)
    assert row["perplexity_ratio"] == math.exp(row["nll_change"])
    assert (
        row["bytes"]["plain"]
        == 2 * row["weights"]
        == 2 * sum(modules[one].weight.numel() for one in unit.modules)
    )


def test_errors_and_cosine_of_one_layer(model):
    modules = convertible(model, [])
    unit = units(modules, "module")[0]
    module = modules[unit.modules[0]]
    own = module.weight.data.clone()
    inputs = []
    handle = module.register_forward_hook(lambda _module, given, _output: inputs.append(given[0]))
    before = likelihoods(model, SAMPLES)
    handle.remove()
    row = measure_unit(model, modules, unit, TRIAL, SAMPLES, before)
    with stored_as(modules, {unit.modules[0]: TRIAL}) as originals:
        back = module.weight.data.clone()
        assert list(originals) == list(unit.modules)
        changed = [module(one).detach() for one in inputs]
    plain = [module(one).detach() for one in inputs]
    assert row["weight_mse"] == pytest.approx(float((back - own).square().mean()), rel=1e-4)
    assert row["weight_relative_mse"] == pytest.approx(
        row["weight_mse"] / float(own.square().mean()), rel=1e-4
    )
    cosines = [
        F.cosine_similarity(one, two, dim=-1).flatten() for one, two in zip(changed, plain, strict=True)
    ]
    assert row["output_cosine"] == pytest.approx(float(torch.cat(cosines).mean()), abs=1e-6)
    assert 0.9 < row["output_cosine"] < 0.99999


def test_weights_come_back_after_an_error(model):
    modules = convertible(model, [])
    kept = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), stored_as(modules, dict.fromkeys(modules, TRIAL)):
        raise KeyError
    last = list(modules)[-1]
    modules[last].weight.data[0, 0] = float("nan")
    with (
        pytest.raises(ValueError, match=f"{last}: the weight holds NaN"),
        stored_as(modules, dict.fromkeys(modules, TRIAL)),
    ):
        pass
    modules[last].weight.data[0, 0] = kept[f"{last}.weight"][0, 0]
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "NaN or infinite"), (0.0, "every weight is zero")]
)
def test_weights_that_cannot_be_measured_are_named(model, value, message):
    modules = convertible(model, [])
    check_weights(modules)
    name = list(modules)[1]
    modules[name].weight.data.fill_(value)
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        check_weights(modules)


def test_change_and_its_error():
    before = [Likelihood(10.0, 5), Likelihood(20.0, 5)]
    assert nll_change(before, before) == (0.0, 0.0)
    mean, error = nll_change(before, [Likelihood(11.0, 5), Likelihood(22.0, 5)])
    assert mean == pytest.approx(0.3)
    assert error == pytest.approx(0.1)  # 0.2 and 0.4 a token: their standard deviation over the root of two
    assert nll_change(before[:1], before[:1]) == (0.0, None)


def test_bytes_of_half_precision():
    assert stored_bytes(torch.nn.Linear(48, 10), None) == 960
