"""Scaling channels keeps the function; outliers break plain rounding, and activation-aware scales mend it."""

from __future__ import annotations

import copy

import pytest
import torch

from huggingface.transformers.quantizers.awq import scale_for_quantization
from huggingface.transformers.quantizers.channel_scaling import add_outliers, input_groups
from huggingface.transformers.quantizers.configuration import PackedWeightsConfig
from huggingface.transformers.quantizers.packing import WeightFormat
from huggingface.transformers.quantizers.quantizer import quantize_model

TEXT = torch.randint(1, 13, (4, 24), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(1, 13, (4, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(architecture, make_model):
    return make_model(architecture, hidden_size=64).float()


@torch.no_grad()
def loss(model, config: PackedWeightsConfig, reference) -> float:
    """Returns the mean square difference that packing makes to the logits of text not calibrated on."""
    packed = quantize_model(copy.deepcopy(model), config)
    return float((packed(input_ids=OTHER).logits - reference).square().mean())


@torch.no_grad()
def test_outliers_change_no_output(model):
    before = model.double()(input_ids=TEXT).logits
    add_outliers(model, 4, 30.0)
    torch.testing.assert_close(model(input_ids=TEXT).logits, before, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_scales_change_no_output(model):
    before = model.double()(input_ids=TEXT).logits
    choices = scale_for_quantization(model, [TEXT], WeightFormat(4, 32))
    torch.testing.assert_close(model(input_ids=TEXT).logits, before, rtol=1e-6, atol=1e-6)
    assert len(choices) == 2 * len(model.decoder_layers())
    assert all(choice.error <= choice.unscaled_error for choice in choices)


@torch.no_grad()
def test_scales_mend_what_outliers_break(model):
    groups, naive = PackedWeightsConfig(4, 32), PackedWeightsConfig(4)
    reference = model(input_ids=OTHER).logits
    sound = loss(model, groups, reference)
    add_outliers(model, 6, 30.0)
    broken, broken_naive = loss(model, groups, reference), loss(model, naive, reference)
    assert broken > 1.5 * sound
    assert broken_naive > 1.5 * sound
    choices = scale_for_quantization(model, [TEXT], groups.format)
    assert any(choice.power > 0 for choice in choices)
    assert loss(model, groups, reference) < min(0.7 * broken, 1.5 * sound)


def test_factors_must_be_usable(model):
    group = next(iter(input_groups(model)))
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite factors above 0"):
            group.scale(torch.full_like(group.norm.weight, value))


def test_without_text_nothing_is_scaled(model):
    before = copy.deepcopy(model.state_dict())
    for texts in ([], [TEXT[:, :0]]):
        with pytest.raises(ValueError, match="calibration text"):
            scale_for_quantization(model, texts, WeightFormat(4, 32))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_that_names_no_layers_is_refused(model):
    model.layer_names = None
    with pytest.raises(ValueError, match="load_streaming"):
        list(input_groups(model))
