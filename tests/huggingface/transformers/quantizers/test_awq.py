"""Scaling channels keeps the function; outliers break plain rounding, and activation-aware scales mend it."""

from __future__ import annotations

import copy

import pytest
import torch

from huggingface.transformers.quantizers.awq import scale_for_quantization
from huggingface.transformers.quantizers.channel_scaling import RUN, add_outliers, input_groups
from huggingface.transformers.quantizers.configuration import PackedWeightsConfig
from huggingface.transformers.quantizers.packing import WeightFormat
from huggingface.transformers.quantizers.quantizer import quantize_model

TEXT = torch.randint(1, 13, (4, 24), generator=torch.Generator().manual_seed(0))
OTHER = torch.randint(1, 13, (4, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(architecture, make_model):
    return copy.deepcopy(make_model(architecture, hidden_size=96)).float()


@pytest.fixture
def wide(architecture, make_model):
    """A model of two runs of channels."""
    return copy.deepcopy(make_model(architecture, hidden_size=2 * RUN))


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


@pytest.mark.parametrize(("layout", "channels"), [("isolated", 5), ("runs", RUN)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_power_of_two_changes_not_a_bit(wide, layout, channels, dtype):
    model = wide.to(dtype)
    norms = [group.norm.weight.clone() for group in input_groups(model)]
    before = model(input_ids=TEXT).logits
    add_outliers(model, channels, 32.0, layout=layout)
    assert torch.equal(model(input_ids=TEXT).logits, before)
    for group, norm in zip(input_groups(model), norms, strict=True):
        larger = (group.norm.weight == 32 * norm).nonzero().flatten().tolist()
        assert len(larger) == channels
        if layout == "runs":
            assert larger[0] % RUN == 0
            assert larger == list(range(larger[0], larger[0] + RUN))


@torch.no_grad()
def test_runs_break_one_scale_an_output_and_not_groups(wide):
    model = wide.float()
    groups, naive = PackedWeightsConfig(4, RUN), PackedWeightsConfig(4)
    reference = model(input_ids=OTHER).logits
    sound, sound_naive = loss(model, groups, reference), loss(model, naive, reference)
    add_outliers(model, RUN, 16.0, layout="runs")
    assert loss(model, naive, reference) > 1.8 * sound_naive
    assert loss(model, groups, reference) < 1.1 * sound
    choices = scale_for_quantization(model, [TEXT], groups.format)
    assert all(choice.error <= choice.unscaled_error for choice in choices)
    assert loss(model, groups, reference) < 1.5 * sound


@pytest.mark.parametrize(
    ("channels", "layout", "message"),
    [
        (4, "rows", "layout 'rows'"),
        (4, "runs", "multiple of 128"),
        (0, "isolated", "0 channels"),
        (97, "isolated", "up to 96"),
    ],
)
def test_outliers_that_cannot_be_change_nothing(model, channels, layout, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_outliers(model, channels, 8.0, layout=layout)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


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
