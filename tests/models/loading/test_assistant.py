"""The assistant: loaded like the model, counted with it, refused before the model is built."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import Limits
from models.loading import loaded_model
from tests.architectures import a_projection
from tests.models.loaders import ASSISTANT, PROMPT, STOCK_CLASSES, cached_bytes, loaded


@pytest.fixture
def unbuilt(monkeypatch):
    """Fails if the main model is built: what is wrong with the assistant must be told before."""

    def build(*_):
        pytest.fail("the model was built before the assistant was looked at")

    monkeypatch.setattr(loaded_model, "build_model", build)


def changed(checkpoint, tmp_path, **values):
    directory = shutil.copytree(checkpoint / ASSISTANT, tmp_path / "helper")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))
    return directory


def assistant_of(model):
    return model._decoder.assistant


def test_it_is_upstreams_own_class_in_the_models_dtype(architecture, stream_checkpoint):
    for flags, dtype in (({}, torch.float32), ({"dtype": "bfloat16"}, torch.bfloat16)):
        model = loaded("assisted", stream_checkpoint, flags=flags)
        assert type(assistant_of(model)) is STOCK_CLASSES[architecture]
        assert assistant_of(model).dtype == model.model.dtype == dtype
        assert not assistant_of(model).training


def test_streams_of_an_assistant_are_dropped(architecture, stock_checkpoint, stream_checkpoint):
    model = loaded("assisted", stock_checkpoint, assistant=stream_checkpoint)
    assert type(assistant_of(model)) is STOCK_CLASSES[architecture]
    assert not [name for name, _ in assistant_of(model).named_parameters() if name.startswith("streams.")]
    answer = model.generate([PROMPT], Limits(max_new_tokens=16))[0]
    assert answer.token_ids == loaded("naive", stock_checkpoint).generate([PROMPT], Limits(16))[0].token_ids


def test_weights_and_cache_count_the_assistants(stream_checkpoint):
    model, alone = loaded("assisted", stream_checkpoint), loaded("kv_cache", stream_checkpoint)
    assert model.weight_bytes == 2 * alone.weight_bytes  # the same shapes
    limits = Limits(max_new_tokens=4, ignore_eos=True)
    for one in (model, alone):
        one.generate([PROMPT], limits)
    config, ours = alone.model.config, len(PROMPT) + 3
    assert alone.kv_bytes == cached_bytes(config, ours)
    assistants = model.kv_bytes - alone.kv_bytes
    if alone.kv_bytes == cached_bytes(config, ours, windows=False):
        # The assistant reads neither the last token nor the last that it drafted.
        assert assistants in [cached_bytes(config, ours - unread) for unread in (1, 2, 3)]
    else:  # how much of the drafts sliding layers still hold is upstream's matter
        assert cached_bytes(config, ours - 3) <= assistants < cached_bytes(config, ours, windows=False)


def test_it_needs_no_tokenizer(stream_checkpoint):
    assert not (stream_checkpoint / ASSISTANT / "tokenizer.json").exists()
    assert loaded("assisted", stream_checkpoint).fallbacks == []


def test_what_it_falls_back_to_is_told(architecture, stock_checkpoint):
    found = loaded("assisted", stock_checkpoint, flags={"attn_implementation": "sdpa"}).fallbacks
    reason = "GPTNeoForCausalLM has no sdpa upstream: eager"
    assert found == ([reason, f"assistant: {reason}"] if architecture == "gpt_neo" else [])


def test_random_weights_need_its_config_alone(stock_checkpoint, tmp_path):
    (tmp_path / ASSISTANT).mkdir()
    for place in (".", ASSISTANT):
        shutil.copy(stock_checkpoint / "config.json", tmp_path / place)
    model = loaded("assisted", tmp_path, random_weights=True)
    limits = Limits(max_new_tokens=8, ignore_eos=True)
    expected = loaded("kv_cache", tmp_path, random_weights=True).generate([PROMPT], limits)[0]
    assert model.generate([PROMPT], limits)[0].token_ids == expected.token_ids


def test_another_vocabulary_is_refused_with_both_sizes(stream_checkpoint, tmp_path, unbuilt):
    other = changed(stream_checkpoint, tmp_path, vocab_size=300)
    with pytest.raises(ValueError, match=r"300 tokens, the model one of 257"):
        loaded("assisted", stream_checkpoint, assistant=other)


def test_no_assistant_names_the_flag(stream_checkpoint, unbuilt):
    with pytest.raises(ValueError, match="--assistant_model"):
        loaded("assisted", stream_checkpoint, assistant=None)


def test_a_missing_directory_is_one_clear_line(stream_checkpoint, unbuilt):
    with pytest.raises(ValueError, match=r"^no usable config.json in ./nowhere"):
        loaded("assisted", stream_checkpoint, assistant="./nowhere")


def test_a_config_that_asks_for_code_is_refused(stream_checkpoint, tmp_path, unbuilt):
    place = changed(stream_checkpoint, tmp_path, auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(ValueError, match="nothing was run"):
        loaded("assisted", stream_checkpoint, assistant=place)


def test_torn_weights_are_refused(stream_checkpoint, tmp_path, unbuilt):
    place = changed(stream_checkpoint, tmp_path)
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="helper are corrupt"):
        loaded("assisted", stream_checkpoint, assistant=place)


def test_undefined_logits_are_blamed_on_the_assistant(stream_checkpoint, tmp_path):
    place = changed(stream_checkpoint, tmp_path)
    weights = load_file(place / "model.safetensors")
    key = a_projection(weights, "v_proj")
    weights[key] = torch.full_like(weights[key], torch.nan)
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="the assistant's logits are not finite"):
        loaded("assisted", stream_checkpoint, assistant=place)


def test_only_assisted_loads_it(stream_checkpoint):
    assert loaded("prompt_lookup", stream_checkpoint, assistant="./nowhere")._decoder.assistant is None
