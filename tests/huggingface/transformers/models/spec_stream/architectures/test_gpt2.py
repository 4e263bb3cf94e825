"""GPT-2: fused projections kept as (in, out), its three switches for attention, and checkpoints as they were published."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from huggingface.transformers.models.spec_stream import load_streaming
from huggingface.transformers.models.spec_stream.fused_layers import FusedLayers
from models import Limits
from tests.models.conftest import save_tokenizer
from tests.models.loaders import loaded

from ..test_fused_layers import sequences

IDS, ANCHORS = torch.tensor([[3, 1, 4, 1, 5, 9]]), torch.tensor([4])
SCALES = [
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
]


@pytest.mark.parametrize("fields", SCALES, ids=str)
@torch.no_grad()
def test_every_scaling_of_scores(fields, make_model, check_greedy, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    model = make_model("gpt2", **fields)
    check_greedy(model)
    want, streams = model.stream_forward(IDS, ANCHORS[:, None], streams=2)
    got = sequences(copy.deepcopy(model), IDS, ANCHORS, 2)
    torch.testing.assert_close(got, torch.cat([want, streams[:, 0]], 1), atol=1e-10, rtol=1e-10)
    for index, layer in enumerate(model.decoder_layers()):
        assert model.attention_scaling(index) == layer.attn.scaling


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_reordered_and_upcast_attention(implementation, make_model, check_greedy):
    """Eager attention then works in float32, which upstream refuses to round to from float64."""
    check_greedy(make_model("gpt2", torch.float32, implementation, reorder_and_upcast_attn=True))


def test_cross_attention_is_refused(make_model):
    with pytest.raises(ValueError, match="add_cross_attention"):
        make_model("gpt2", add_cross_attention=True)


@torch.no_grad()
def test_fused_weights_are_laid_out_as_the_kernels_read_them(make_model):
    """(out, in) in memory, whatever the shape of the parameter; the module itself computes what it did."""
    model = copy.deepcopy(make_model("gpt2"))
    before = model(IDS).logits
    fused = FusedLayers(model)
    for layer, own in zip(model.decoder_layers(), fused.layers, strict=True):
        for product, module in ((own.project, layer.attn.c_attn), (own.contract, layer.mlp.c_proj)):
            assert isinstance(module, Conv1D)
            assert product.weight.is_contiguous()
            assert product.weight.shape == (module.nf, module.nx)
            assert module.weight.shape == (module.nx, module.nf)
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-10, rtol=1e-10)
    model.float()
    assert (
        FusedLayers(model).layers[0].project.weight.data_ptr()
        == model.transformer.h[0].attn.c_attn.weight.data_ptr()
    )


@pytest.fixture
def published(make_model, make_stock, tmp_path):
    """A model, and its checkpoint as the first ones were saved: names without `transformer.`, masks among the weights."""
    stock = make_stock(make_model("gpt2", torch.float32, seed=3, vocab_size=257))
    stock.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {name.removeprefix("transformer."): weight for name, weight in load_file(path).items()}
    for index in range(4):
        weights[f"h.{index}.attn.bias"] = torch.ones(64, 64).tril()[None, None]
    save_file(weights, path, metadata={"format": "pt"})
    save_tokenizer(tmp_path)
    return stock, tmp_path


def test_published_checkpoints_load(published):
    stock, place = published
    model = load_streaming(str(place), {"streams": 2, "stream_layers": 1, "lora_rank": 2})
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, stock(IDS).logits)
    limits = Limits(max_new_tokens=8, ignore_eos=True)
    naive, static = (loaded(name, place).generate(["abcd"], limits)[0] for name in ("naive", "static"))
    assert naive.token_ids == static.token_ids
