"""Checkpoints in AWQ's format: what is read is what a naive writer wrote, bit for bit, and what is wrong is told at once."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from huggingface.transformers.integrations.quantized_linear import QuantizedLinear
from huggingface.transformers.models.spec_stream import load_streaming
from huggingface.transformers.quantizers import awq_checkpoint, quantizer
from huggingface.transformers.quantizers.awq_checkpoint import PARTS, translate_config
from huggingface.transformers.quantizers.configuration import PackedWeightsConfig
from huggingface.transformers.quantizers.packing import WeightFormat
from tests.huggingface.transformers.quantizers.awq_writer import (
    edit_config,
    edit_tensors,
    layer_tensors,
    write_awq,
)

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(vocab_size=13, num_key_value_heads=2, **SIZES))


def qwen2() -> nn.Module:
    """Biases, and a head tied to the embeddings."""
    config = Qwen2Config(vocab_size=13, num_key_value_heads=2, tie_word_embeddings=True, **SIZES)
    return Qwen2ForCausalLM(config)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=13, n_embd=64, n_layer=2, n_head=2, n_positions=64))


@pytest.fixture
def plain(tmp_path):
    """Returns `plain(make)`: the directory of a tiny stock model."""

    def save(make=llama):
        torch.manual_seed(0)
        model = make()
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, std=0.1 if name.endswith("bias") else 0.3)
        model.save_pretrained(tmp_path / "plain")
        return tmp_path / "plain"

    return save


def read(place, **options):
    config = translate_config(AutoConfig.from_pretrained(place), str(place))
    return AutoModelForCausalLM.from_pretrained(
        place, config=config, dtype=torch.float32, output_loading_info=True, **options
    )


@pytest.mark.parametrize("layout", ["gemm", "gemv"])
@pytest.mark.parametrize("make", [llama, qwen2, gpt2])
def test_what_was_written_is_read(make, layout, plain, tmp_path):
    place = write_awq(plain(make), tmp_path / "awq", 32, layout)
    model, found = read(place)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    dense = AutoModelForCausalLM.from_pretrained(place / "dense", dtype=torch.float32)
    packed = {name: one for name, one in model.named_modules() if isinstance(one, QuantizedLinear)}
    assert packed.keys() == quantizer.convertible(dense, []).keys()
    for name, module in packed.items():
        assert module.kind == WeightFormat(4, 32, True)
        want = dense.get_submodule(name).weight
        want = want.t() if module.transposed else want
        assert torch.equal(module.packed.dense(torch.float32), want)
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_every_group_size_and_layout(size):
    weight = torch.randn(24, 1280, generator=torch.Generator().manual_seed(size))
    for layout in ("gemm", "gemv"):
        parts, dense = layer_tensors(weight, size, layout)
        stored = awq_checkpoint.unpacked(parts, size, layout)
        module = QuantizedLinear(1280, 24, False, WeightFormat(4, size, True), torch.float32)
        assert {name: tuple(one.shape) for name, one in stored.items()} == module.kind.shapes(24, 1280)
        assert all(one.dtype == module.kind.dtypes[name] for name, one in stored.items())
        assert torch.equal(module.read(stored).dense(torch.float32), dense)


def test_it_is_saved_in_our_format_and_comes_back_bit_equal(plain, tmp_path):
    place = write_awq(plain(), tmp_path / "awq", kept=("layers.1.mlp.down",))
    model, _ = read(place)
    assert isinstance(model.get_submodule("model.layers.1.mlp.down_proj"), nn.Linear)
    model.save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert saved == {
        "quant_method": "packed_weights", "bits": 4, "group_size": 32, "zero_point": True,
        "modules_to_not_convert": None, "modules": {"model.layers.1.mlp.down_proj": "plain"},
    }  # fmt: skip
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    kept, back = model.state_dict(), again.state_dict()
    assert kept.keys() == back.keys()
    assert all(torch.equal(kept[name], back[name]) for name in kept)


def test_streams_on_an_awq_base(plain, tmp_path):
    """Streams that were trained beside the full weights are read beside the packed ones."""
    base = plain()
    torch.manual_seed(1)
    fields = {"streams": 2, "stream_layers": 1, "transition_rank": 4, "lora_rank": 2}
    model = load_streaming(str(base), stream_fields=fields)
    model.config.base_model_name_or_path = "../awq"
    model.save_pretrained(tmp_path / "streams")
    write_awq(base, tmp_path / "awq")
    packed = load_streaming(str(tmp_path / "streams"), dtype=torch.float32).eval()
    assert isinstance(packed.get_submodule("model.layers.0.mlp.up_proj"), QuantizedLinear)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = packed.generate(IDS, drafts="none", **options)
    assert torch.equal(packed.generate(IDS, draft_nodes=6, **options), want)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "awq" / "dense", dtype=torch.float32)
    assert torch.equal(dense.generate(IDS, attention_mask=torch.ones_like(IDS), **options), want)


def test_half_precision_keeps_the_scales(plain, tmp_path):
    place = write_awq(plain(), tmp_path / "awq")
    model = load_streaming(str(place), dtype=torch.bfloat16)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.uint8, torch.float16)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"group_size": 16}, "group size 16"),
        ({"group_size": -1}, "group size -1"),
        ({"bits": 8}, "8 bits, zero_point True; 4 bits with zero points are read"),
        ({"zero_point": False}, "zero_point False"),
        ({"version": "gemv_fast"}, "version 'gemv_fast'; gemm and gemv are read"),
        # The files hold groups of 32.
        ({"group_size": 64}, r"qzeros is I32 \(2, 8\), expected I32 \(1, 8\) \(gemm, groups of 64\)"),
        ({"version": "gemv"}, r"qzeros is I32 \(2, 8\), expected I32 \(64, 8\) \(gemv"),
    ],
    ids=str,
)
def test_a_config_that_we_do_not_read_is_told_before_any_tensor(
    fields, message, plain, tmp_path, monkeypatch
):
    place = write_awq(plain(), tmp_path / "awq")
    edit_config(place, **fields)
    monkeypatch.setattr(quantizer.UnpackAwq, "convert", lambda *_, **__: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match=message):
        load_streaming(str(place))


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda found: found.pop(f"{UP}.scales"), f"has no {UP}.scales"),
        (lambda found: found.pop(f"{UP}.qzeros"), f"has no {UP}.qzeros"),
        (lambda found: found.pop(f"{UP}.qweight"), f"has no {UP}.qweight"),
        (lambda found: found.update({f"{UP}.qweight": found[f"{UP}.qweight"][:32].clone()}), r"expected I32 \(64, 12\)"),
        (lambda found: found.update({f"{UP}.scales": found[f"{UP}.scales"].float()}), r"scales is F32 \(2, 96\), expected F16"),
        (lambda found: found.update({"lm_head.qweight": torch.zeros(64, 1, dtype=torch.int32)}), "packs lm_head"),
        (
            lambda found: [found.pop(name) for name in list(found) if name.endswith(PARTS)],
            "no file holds a packed layer",
        ),
    ],
    ids=["no scales", "no zeros", "no numbers", "wrong shape", "wrong dtype", "head", "nothing packed"],
)  # fmt: skip
def test_files_that_do_not_fit_are_told_before_any_tensor(change, message, plain, tmp_path, monkeypatch):
    place = write_awq(plain(), tmp_path / "awq")
    edit_tensors(place, change)
    monkeypatch.setattr(quantizer.UnpackAwq, "convert", lambda *_, **__: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match=message):
        load_streaming(str(place))


def test_scales_that_are_not_finite_name_their_layer(plain, tmp_path):
    place = write_awq(plain(), tmp_path / "awq")
    edit_tensors(place, lambda found: found[f"{UP}.scales"].fill_(float("inf")))
    with pytest.raises(ValueError, match=rf"{UP}: the scales hold NaN or infinite"):
        load_streaming(str(place))


def test_another_layout_in_our_own_config_is_refused():
    with pytest.raises(ValueError, match="layout 'marlin'"):
        PackedWeightsConfig(4, 32, True, checkpoint_layout="marlin")
