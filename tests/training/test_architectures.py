"""Every architecture trains: a small model from scratch, and streams with gated updates for a frozen stock model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from huggingface.transformers.models.spec_stream import stock_class, stream_config_from
from tests.architectures import FAMILIES
from training.fresh_weights import missing_factor, query_weights, shrink_queries, start_as_identity
from training.models import ModelFile
from training.muon import layer_matrices
from training.run import run

from .test_run import flags_for

SHARED = {"hidden_size": 32, "max_position_embeddings": 96, "initializer_range": 0.2}
STREAMS = {"streams": 2, "stream_layers": 1, "transition_rank": 4}


@pytest.fixture(autouse=True)
def _cpu_only(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(params=sorted(FAMILIES))
def architecture(request) -> str:
    return request.param


def fresh(architecture, **fields):
    config = AutoConfig.for_model(
        architecture, vocab_size=40, **{**SHARED, **FAMILIES[architecture], **fields}
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(stream_config_from(config, **STREAMS))


def test_a_small_model_from_scratch(architecture, tmp_path, own_file):
    """With Muon for its matrices; what is saved drafts what upstream's own class says."""
    place = tmp_path / "tiny.json"
    place.write_text(json.dumps({"model_type": architecture, **SHARED, **FAMILIES[architecture], **STREAMS}))
    flags = flags_for("scratch", tmp_path / "out", train_file=own_file, model_config=place, optimizer="muon")
    folder = run(flags)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == f"spec_stream_{architecture}"
    ids = AutoTokenizer.from_pretrained(folder)("Thing: red boat\nText:", return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False}
    plain = model.generate(**ids, **options, drafts="none")
    assert torch.equal(model.generate(**ids, **options, drafts="streams"), plain)


def test_streams_for_a_frozen_model(architecture, tmp_path, own_file, tokenizer):
    special = {"bos_token_id": 0, "eos_token_id": 0}
    values = {**SHARED, **FAMILIES[architecture], **special, "vocab_size": len(tokenizer)}
    config = AutoConfig.for_model(architecture, **values)
    torch.manual_seed(1)
    stock_class(config)(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    shape = {"streams": 2, "stream_layers": 1, "lora_rank": 2}
    place = str(tmp_path / "base")
    folder = run(
        flags_for("adapter", tmp_path / "out", train_file=own_file, model_name_or_path=place, **shape)
    )
    base, trained = (load_file(where / "model.safetensors") for where in (tmp_path / "base", folder))
    assert all(torch.equal(tensor, trained[name]) for name, tensor in base.items())
    updates = [tensor for name, tensor in trained.items() if name.endswith(".up.weight")]
    assert updates
    assert all(tensor.abs().sum() > 0 for tensor in updates)


def test_products_are_named(architecture):
    """Muon gets every matrix of the layers; a new model starts as the identity."""
    model = fresh(architecture)
    wanted = [weight for name, weight in model.decoder_layers().named_parameters() if weight.dim() == 2]
    assert {id(weight) for weight in layer_matrices(model)} == {id(weight) for weight in wanted}
    start_as_identity(model)
    rows = torch.randn(1, 3, model.config.hidden_size)
    positions = torch.arange(3)[None]
    out = model.run_layer(0, rows, None, model.rotary(rows, positions), None)
    bias = sum(
        part.bias
        for part in (
            model.decoder_layers()[0].get_submodule(model.layer_names.output),
            model.decoder_layers()[0].get_submodule(model.layer_names.contract),
        )
        if part.bias is not None
    )
    torch.testing.assert_close(out, rows + bias)


def test_scores_are_scaled_but_gpt_neos(architecture):
    assert missing_factor(fresh(architecture)) == pytest.approx(
        16**-0.5 if architecture == "gpt_neo" else 1.0
    )


def test_fused_queries_are_left_alone():
    """One weight holds query, key and value: the factor would shrink all three."""
    model = fresh("gpt2", scale_attn_weights=False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert missing_factor(model) != 1
    assert query_weights(model) == []
    shrink_queries(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    "fields, layers, positions",
    [
        ({"n_layer": 3, "n_positions": 64}, 3, 64),
        ({"num_layers": 2, "max_position_embeddings": 32}, 2, 32),
        ({"num_hidden_layers": 5}, 5, 2048),
        ({}, 0, 2048),
    ],
)
def test_a_files_sizes_by_any_name(fields, layers, positions):
    file = ModelFile(fields, {})
    assert (file.layers, file.positions) == (layers, positions)
