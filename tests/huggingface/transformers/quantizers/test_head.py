"""The LM head in 8 bits: tied or not, on load and in place, saved and loaded, with streams drafting through it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from huggingface.transformers.generation.draft_tree import TreeShape
from huggingface.transformers.generation.tree_tuning import DraftPlan
from huggingface.transformers.integrations.quantized_linear import QuantizedLinear, QuantizedWeight
from huggingface.transformers.models.spec_stream import load_streaming, modeling_spec_stream
from huggingface.transformers.quantizers import quantizer
from huggingface.transformers.quantizers.configuration import PackedWeightsConfig
from huggingface.transformers.quantizers.packing import WeightFormat
from tests.huggingface.transformers.generation.host_runner import use_host_runner

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SIZES = {"vocab_size": 13, "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
OPTIONS = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=13, n_embd=48, n_layer=2, n_head=2, n_positions=64))


def tied() -> nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **SIZES, **HEADS))


def untied() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **SIZES, **HEADS))


@pytest.fixture(params=[gpt2, tied, untied], ids=["gpt2", "tied", "untied"])
def saved(request, tmp_path):
    """A tiny stock model and the directory it was saved in."""
    torch.manual_seed(0)
    model = request.param().eval()
    model.save_pretrained(tmp_path / "plain")
    return model, tmp_path / "plain"


def load(place, **options):
    model, found = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True, **options)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_on_load_saved_and_loaded_bit_equal(bits, saved, tmp_path):
    model, place = saved
    packed = load(place, quantization_config=PackedWeightsConfig(bits, lm_head="int8"))
    head, embeddings = packed.get_output_embeddings(), packed.get_input_embeddings()
    assert isinstance(head, QuantizedLinear)
    assert head.kind == WeightFormat(8)
    assert torch.equal(embeddings.weight, model.get_input_embeddings().weight)
    want = QuantizedWeight.of(model.get_output_embeddings().weight, WeightFormat(8))
    assert torch.equal(head.weight, want.weight)
    assert torch.equal(head.weight_scale, want.scale)
    kept = load(place, quantization_config=PackedWeightsConfig(bits))
    states = kept.base_model(IDS).last_hidden_state
    torch.testing.assert_close(
        packed(IDS).logits, states @ want.dense(torch.float32).t(), atol=1e-6, rtol=1e-5
    )
    packed.save_pretrained(tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["lm_head"] == "int8"
    assert "lm_head.weight_scale" in load_file(tmp_path / "packed" / "model.safetensors")
    again = load(tmp_path / "packed")
    assert again.config.quantization_config.lm_head == "int8"
    first, second = packed.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )
    assert torch.equal(again(IDS).logits, packed(IDS).logits)


def test_in_place_is_the_same_as_on_load(saved):
    model, place = saved
    config = PackedWeightsConfig(4, 32, lm_head="int8")
    loaded = load(place, quantization_config=config).state_dict()
    packed = quantizer.quantize_model(model, config).state_dict()
    assert packed.keys() == loaded.keys()
    assert all(torch.equal(packed[name], loaded[name]) for name in packed)


def test_nothing_ties_it_again(saved):
    model, _ = saved
    packed = quantizer.quantize_model(model, PackedWeightsConfig(8, lm_head="int8"))
    for one in (packed, copy.deepcopy(packed)):
        before = one(IDS).logits
        one.tie_weights()
        assert isinstance(one.get_output_embeddings(), QuantizedLinear)
        assert one.get_output_embeddings().weight.dtype == torch.int8
        assert torch.equal(one(IDS).logits, before)


def test_kept_is_the_default_and_leaves_no_trace(saved, tmp_path):
    _, place = saved
    packed = load(place, quantization_config=PackedWeightsConfig(8))
    assert type(packed.get_output_embeddings()) is nn.Linear
    packed.save_pretrained(tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert "lm_head" not in config["quantization_config"]


def test_what_cannot_be_packed_is_named(saved):
    model, _ = saved
    with pytest.raises(ValueError, match="lm_head is 'int4', expected 'int8' or None"):
        PackedWeightsConfig(4, lm_head="int4")
    with pytest.raises(ValueError, match="has no LM head that can be packed"):
        quantizer.quantize_model(model.base_model, PackedWeightsConfig(8, lm_head="int8"))
    model.get_output_embeddings().weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="lm_head: the weight holds NaN"):
        quantizer.quantize_model(model, PackedWeightsConfig(8, lm_head="int8"))


@pytest.fixture
def streaming(architecture, make_model, tmp_path):
    """A model whose streams often disagree with it, head and all packed, as it is loaded."""
    model = copy.deepcopy(make_model(architecture, hidden_size=48))
    for name, parameter in model.streams.named_parameters():
        if name.endswith("up.weight"):
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    config = PackedWeightsConfig(4, 32, lm_head="int8")
    return load_streaming(str(tmp_path), quantization_config=config).eval()


def test_streams_stay_exact_through_the_same_head(streaming, monkeypatch):
    assert isinstance(streaming.get_output_embeddings(), QuantizedLinear)
    plain = streaming.generate(IDS, drafts="none", **OPTIONS)
    assert torch.equal(streaming.generate(IDS, draft_nodes=6, **OPTIONS), plain)
    tokens = streaming.transition_tables()[1]
    head = streaming.get_output_embeddings().packed.dense(tokens.dtype)
    torch.testing.assert_close(tokens, streaming.streams.transition_out(head))
    monkeypatch.setattr(modeling_spec_stream, "AT_ONCE", 5)
    streaming._tables = None
    torch.testing.assert_close(streaming.transition_tables()[1], tokens)


def test_the_captured_step_uses_it(streaming, monkeypatch):
    use_host_runner(monkeypatch)
    seen: list[int] = []
    streaming.get_output_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(args[0].shape[1])
    )
    options = {**OPTIONS, "return_dict_in_generate": True}
    plain = streaming.generate(IDS, drafts="none", capture=False, **options)
    seen.clear()
    plan = DraftPlan(TreeShape((-1, *[0] * 5), 3), beam=8)
    drafted = streaming.generate(IDS, plan=plan, **options)
    assert (plain.statistics.runner, drafted.statistics.runner) == ("eager", "cuda graph")
    assert torch.equal(drafted.sequences, plain.sequences)
    assert set(seen) == {4, 24}  # a prompt's last row or a tree's nodes, and their streams
