"""Qwen2: biases on query, key and value, and which of its layers slide."""

from __future__ import annotations

import pytest
import torch

FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    "fields, windows",
    [
        ({"layer_types": None, "max_window_layers": 2, "sliding_window": 3}, [None, None, 3, 3]),
        ({"layer_types": None, "max_window_layers": 0, "sliding_window": 2}, [2, 2, 2, 2]),
        ({"layer_types": None, "max_window_layers": 9}, [None] * 4),
        ({"layer_types": None, "max_window_layers": 1, "use_sliding_window": False}, [None] * 4),
        ({"layer_types": (SLIDING, FULL, FULL, SLIDING), "sliding_window": 2}, [2, None, None, 2]),
    ],
    ids=str,
)
def test_which_layers_slide(fields, windows, make_model, check_greedy):
    model = make_model("qwen2", **fields)
    assert [model.layer_window(index) for index in range(4)] == windows
    check_greedy(model)


def test_sliding_layers_without_a_window_are_refused(make_model):
    with pytest.raises(ValueError, match="use_sliding_window"):
        make_model("qwen2", use_sliding_window=False, layer_types=(FULL, FULL, FULL, SLIDING))


@torch.no_grad()
def test_the_biases_count(make_model):
    """Tiny models have other biases than zero, so every comparison with upstream sees them."""
    model = make_model("qwen2")
    for layer in model.decoder_layers():
        for name in model.layer_names.projections:
            assert layer.get_submodule(name).bias.abs().min() > 0
        assert layer.self_attn.o_proj.bias is None
