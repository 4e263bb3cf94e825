"""Rounding, packing and reading back, at every format and awkward sizes."""

from __future__ import annotations

import pytest
import torch

from huggingface.transformers.quantizers.packing import RUN, WeightFormat, dequantize, pack, quantize, unpack

FORMATS = [
    WeightFormat(8),
    WeightFormat(4),
    *[WeightFormat(4, size, zero) for size in (32, 64, 128) for zero in (False, True)],
]
SHAPES = [(5, 128), (3, 256), (7, 100), (1, 1), (4, 33), (2, 640)]


def weight_of(outputs: int, inner: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(outputs, inner, generator=torch.Generator().manual_seed(seed))


def test_what_is_packed_comes_back():
    numbers = torch.randint(0, 16, (6, 3 * RUN), generator=torch.Generator().manual_seed(3)).byte()
    packed = pack(numbers)
    assert packed.shape == (6, 3 * RUN // 2)
    assert torch.equal(unpack(packed), numbers)


def test_the_quarters_of_a_run_share_words():
    numbers = torch.zeros(1, 2 * RUN, dtype=torch.uint8)
    numbers[0, 129], numbers[0, 161], numbers[0, 193], numbers[0, 225] = (
        5,
        9,
        3,
        14,
    )  # input 1 of each quarter
    words = pack(numbers).view(torch.int16)
    assert words.nonzero().tolist() == [[0, 33]]
    assert int(words[0, 33]) & 0xFFFF == 0xE395


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", FORMATS, ids=str)
def test_no_weight_is_off_by_more_than_half_a_step(kind, shape):
    weight = weight_of(*shape)
    stored = quantize(weight, kind)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == kind.shapes(*shape)
    assert all(tensor.dtype == kind.dtypes[name] for name, tensor in stored.items())
    step = stored["weight_scale"].float()
    if kind.group_size:
        step = step.repeat_interleave(kind.group_size, 1)[:, : shape[1]]
    error = (dequantize(stored, kind, shape[1], torch.float32) - weight).abs()
    # A scale in two bytes is rounded itself, and the largest number of seven or fifteen steps with it.
    assert (error <= step * (0.5 if kind.group_size is None else 0.51) + 1e-7).all()


@pytest.mark.parametrize("kind", FORMATS, ids=str)
def test_quantising_twice_changes_nothing(kind):
    first = quantize(weight_of(4, 160), kind)
    once = dequantize(first, kind, 160, torch.float32)
    again = dequantize(quantize(once, kind), kind, 160, torch.float32)
    torch.testing.assert_close(again, once, rtol=2e-3, atol=1e-6)


def test_groups_hold_where_one_scale_an_output_does_not():
    """One outlier an output takes the resolution of all its weights, or of its group's alone."""
    weight = weight_of(8, 1024)
    weight[:, 5] = 60.0

    def error(kind: WeightFormat) -> float:
        return float((dequantize(quantize(weight, kind), kind, 1024, torch.float32) - weight).square().mean())

    assert error(WeightFormat(4)) > 5 * error(WeightFormat(4, 128))
    assert error(WeightFormat(4, 128)) > 2 * error(WeightFormat(4, 32))


def test_a_zero_point_helps_weights_on_one_side():
    weight = weight_of(4, 256).abs()

    def error(zero: bool) -> float:
        kind = WeightFormat(4, 64, zero)
        return float((dequantize(quantize(weight, kind), kind, 256, torch.float32) - weight).square().mean())

    assert error(True) < 0.4 * error(False)


@pytest.mark.parametrize("kind", FORMATS, ids=str)
def test_all_zero_weights_stay_zero(kind):
    stored = quantize(torch.zeros(3, 64), kind)
    assert not dequantize(stored, kind, 64, torch.float32).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", FORMATS, ids=str)
def test_what_is_not_finite_is_refused(kind, value):
    weight = weight_of(3, 64)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(weight, kind)


def test_a_weight_beyond_its_scale_is_refused():
    with pytest.raises(ValueError, match="too large for scales"):
        quantize(torch.full((1, 32), 1e6), WeightFormat(4, 32))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((3,), "4 or 8 bits"),
        ((4, 48), "group size 48"),
        ((4, 0), "group size 0"),
        ((8, 32), "with 8 bits"),
        ((4, None, True), "zero point goes with groups"),
    ],
)
def test_wrong_formats_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightFormat(*arguments)
