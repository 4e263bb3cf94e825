"""Mistral: the window is upstream's to the position, in every layer or in none."""

from __future__ import annotations

import pytest
import torch

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])


@pytest.mark.parametrize("window", [2, 3, 7, None])
def test_windows_are_upstreams(window, make_model, check_greedy):
    model = make_model("mistral", sliding_window=window)
    assert model.layer_windows() == {window}
    check_greedy(model)


@pytest.mark.parametrize("wrong", [2, 4])
def test_a_window_that_is_off_by_one_is_seen(wrong, make_model, make_stock, check_greedy):
    """The comparison above can fail."""
    model = make_model("mistral", sliding_window=3)
    stock = make_stock(model)
    model.config.sliding_window = wrong
    try:
        with torch.no_grad():
            hidden, _ = model.stream_forward(IDS, torch.tensor([[4]]), streams=0)
            logits = model.get_output_embeddings()(hidden)
            assert (logits - stock(IDS).logits).abs().max() > 1e-3
    finally:
        model.config.sliding_window = 3


def test_layers_of_several_kinds_are_refused(make_model):
    kinds = ["sliding_attention", "full_attention"] * 2
    model = make_model("mistral", sliding_window=8)
    for window, types in ((8, kinds), (None, kinds), (8, ["full_attention"] * 4)):
        config = type(model.config)(
            **{**model.config.to_dict(), "sliding_window": window, "layer_types": types}
        )
        with pytest.raises(ValueError, match="layer_types"):
            type(model)(config)


def test_the_published_window():
    """Version 0.1 has one of 4,096 positions, later ones none."""
    from huggingface.transformers.models.spec_stream.architectures.mistral import StreamMistralConfig

    assert StreamMistralConfig().sliding_window == 4096
    assert StreamMistralConfig(sliding_window=None).sliding_window is None
