"""Limits refuse what no decoder could honour."""

import math

import pytest

from models import Limits


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", -1), ("temperature", -0.5), ("temperature", math.nan), ("temperature", math.inf),
        ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("top_p", math.nan), ("on_long", "chop"),
    ],
)  # fmt: skip
def test_value_out_of_range_names_the_flag(field, value):
    with pytest.raises(ValueError, match=f"--{field} got .*expected"):
        Limits(**{field: value})


def test_temperature_zero_is_greedy():
    assert not Limits(temperature=0.0).samples
    assert Limits(temperature=0.7).samples
