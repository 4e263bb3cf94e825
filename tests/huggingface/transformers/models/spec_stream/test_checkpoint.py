"""Saving and loading: whole models, streams beside a base model, stock checkpoints, and what is wrong with a bad one."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from huggingface.transformers.generation.draft_settings import saved_settings, update_settings
from huggingface.transformers.models.spec_stream import load_streaming, stream_config_from
from huggingface.transformers.quantizers.configuration import PackedWeightsConfig
from tests.architectures import a_projection

IDS = torch.tensor([[3, 1, 4, 1, 5]])


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        hidden, streams = model.stream_forward(IDS, torch.tensor([[4]]))
        return torch.cat([hidden.flatten(), streams.flatten()])


def _edit(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def whole(architecture, make_model, tmp_path):
    model = make_model(architecture, dtype=torch.float32)
    model.save_pretrained(tmp_path / "whole")
    return model, tmp_path / "whole"


@pytest.fixture
def adapter(architecture, make_model, make_stock, tmp_path):
    """Streams alone in one directory, their stock base beside it."""
    model = make_model(architecture, dtype=torch.float32, seed=7)
    make_stock(model).save_pretrained(tmp_path / "base")
    config = stream_config_from(
        model.config,
        **{
            "streams": 3,
            "stream_layers": 2,
            "lora_rank": 2,
            "transition_rank": 4,
            "base_model_name_or_path": "../base",
        },
    )
    saved = type(model)(config)
    saved.load_state_dict(model.state_dict())
    saved.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_whole_model_round_trip_through_auto(whole):
    model, directory = whole
    again = AutoModelForCausalLM.from_pretrained(directory)
    assert type(again) is type(model)
    assert torch.equal(_logits(again), _logits(model))
    assert "auto_map" not in json.loads((directory / "config.json").read_text())


def test_sharded_round_trip(whole, tmp_path):
    model, _ = whole
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "shards")), _logits(model))


def test_adapter_holds_streams_alone_and_finds_its_base(adapter):
    model, directory = adapter
    assert all(name.startswith("streams.") for name in load_file(directory / "model.safetensors"))
    again = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(_logits(again), _logits(model))


def test_stock_checkpoint_gets_our_loop_or_new_streams(architecture, make_model, make_stock, tmp_path):
    model = make_model(architecture, dtype=torch.float32)
    stock = make_stock(model)
    stock.save_pretrained(tmp_path)
    plain = load_streaming(str(tmp_path))
    assert plain.streams is None
    want = stock.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=9, do_sample=False)
    got = plain.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=9, do_sample=False)
    assert torch.equal(got, want)
    fresh = load_streaming(str(tmp_path), {"streams": 2, "stream_layers": 1, "lora_rank": 2})
    assert fresh.streams.config.streams == 2
    assert torch.isfinite(_logits(fresh)).all()


def test_missing_and_unknown_stream_weights(whole):
    _, directory = whole
    path = directory / "model.safetensors"
    weights = load_file(path)
    weights["streams.stray"] = torch.zeros(1)
    weights.pop("streams.embedding.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing \['streams.embedding.weight'\].*streams.stray"):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape", "no file"])
def test_broken_adapter(adapter, fault):
    """M04: keys are listed, nothing is initialised at random."""
    _, directory = adapter
    path = directory / "model.safetensors"
    weights = load_file(path)
    name = "streams.embedding.weight"
    if fault == "missing":
        weights.pop(name)
    elif fault == "unknown":
        name = "streams.stray"
        weights[name] = torch.zeros(1)
    elif fault == "shape":
        weights[name] = torch.zeros(1, 1)
    save_file(weights, path, metadata={"format": "pt"})
    if fault == "no file":
        path.unlink()
        name = "model.safetensors"
    with pytest.raises(ValueError, match=name):
        AutoModelForCausalLM.from_pretrained(directory)


def test_streams_in_shards_are_read(adapter, tmp_path):
    model, directory = adapter
    saved = AutoModelForCausalLM.from_pretrained(directory)
    saved.save_pretrained(directory, max_shard_size="1KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(directory)), _logits(model))


def test_streams_of_a_packed_model_are_saved_alone(architecture, make_model, make_stock, tmp_path):
    """And stand on the base as it is, packed or not."""
    model = make_model(architecture, dtype=torch.float32, hidden_size=48)
    make_stock(model).save_pretrained(tmp_path / "base")
    model = copy.deepcopy(model)
    model.config.base_model_name_or_path = "../base"
    model.save_pretrained(tmp_path / "streams")
    packed = load_streaming(str(tmp_path / "streams"), quantization_config=PackedWeightsConfig(8))
    packed.save_pretrained(tmp_path / "again")
    assert all(name.startswith("streams.") for name in load_file(tmp_path / "again" / "model.safetensors"))
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), _logits(model))


def test_a_base_may_have_streams_of_its_own(architecture, make_model, tmp_path):
    base = make_model(architecture, dtype=torch.float32, seed=3)
    base.save_pretrained(tmp_path / "base")
    model = copy.deepcopy(make_model(architecture, dtype=torch.float32, seed=3, streams=2, stream_layers=1))
    model.config.base_model_name_or_path = "../base"
    model.save_pretrained(tmp_path / "streams")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "streams")
    assert again.streams.config.streams == 2
    assert torch.equal(again.streams.embedding.weight, model.streams.embedding.weight)
    head = base.get_output_embeddings().weight
    assert torch.equal(again.get_output_embeddings().weight, head)


def test_main_weights_beside_the_streams_are_refused(adapter):
    """The main weights are the base model's; whoever finds others would not know which to believe."""
    model, directory = adapter
    path = directory / "model.safetensors"
    weights = load_file(path)
    name = a_projection(model.state_dict(), "k_proj.weight")
    save_file({**weights, name: model.state_dict()[name].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(name)):
        AutoModelForCausalLM.from_pretrained(directory)


def test_adapter_of_another_base(adapter):
    """M05: the message names both."""
    model, directory = adapter
    _edit(directory / "config.json", hidden_size=32)
    with pytest.raises(ValueError, match=f"hidden_size 32.*has {model.config.hidden_size}"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_adapter_whose_base_is_incomplete(adapter):
    """M04: main weights that the base lacks are named, not drawn at random."""
    _, directory = adapter
    path = directory.parent / "base" / "model.safetensors"
    weights = load_file(path)
    lost = a_projection(weights, "k_proj.weight")
    weights.pop(lost)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"base model .* missing .*{re.escape(lost)}"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_adapter_of_another_family(adapter, architecture, make_model, make_stock, tmp_path):
    """M05: the base is of another architecture, though every size agrees."""
    _, directory = adapter
    other = "llama" if architecture == "gpt_neo" else "gpt_neo"
    make_stock(make_model(other, dtype=torch.float32)).save_pretrained(tmp_path / "base")
    with pytest.raises(
        ValueError, match=f"spec_stream_{architecture} model, but the base model .* is a {other}"
    ):
        AutoModelForCausalLM.from_pretrained(directory)


def test_settings_survive_in_generation_config(whole, adapter):
    for _, directory in (whole, adapter):
        _check_settings_survive(directory)


def _check_settings_survive(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    update_settings(model, rank_accuracy=[[0.5, 0.1]] * 3, draft_nodes={"cpu": 4})
    model.save_pretrained(directory)
    again = AutoModelForCausalLM.from_pretrained(directory)
    assert saved_settings(again)["draft_nodes"] == {"cpu": 4}
    assert AutoConfig.from_pretrained(directory).streams == 3
