"""The model of a recipe: its class, its weights, and weights that are refused."""

import shutil

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from huggingface.transformers.models.spec_stream import load_streaming
from models import Limits, Recipe
from models.loading import load
from tests.architectures import a_projection, inner_field
from tests.models.loaders import PROMPT, STOCK_CLASSES, edited, loaded


def test_naive_is_upstreams_own_class(architecture, stream_checkpoint):
    model = loaded("naive", stream_checkpoint)
    assert type(model.model) is STOCK_CLASSES[architecture]
    assert model.model.dtype == torch.float32
    assert not [name for name, _ in model.model.named_parameters() if name.startswith("streams.")]
    assert model.model.config._attn_implementation == ("eager" if architecture == "gpt_neo" else "sdpa")


def test_flash_function_keeps_tokens_in_float32(architecture, stock_checkpoint):
    recipe = Recipe(decoder="stock", dtype="float32", attention="flash")
    answers = load(recipe, stock_checkpoint, "cpu").generate(["short", PROMPT], Limits(max_new_tokens=12))
    naive = loaded("naive", stock_checkpoint).generate(["short", PROMPT], Limits(max_new_tokens=12))
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in naive]


def test_sdpa_asked_of_stock_gpt_neo_is_recorded(architecture, stock_checkpoint):
    model = loaded("kv_cache", stock_checkpoint, flags={"attn_implementation": "sdpa"})
    expected = ["GPTNeoForCausalLM has no sdpa upstream: eager"] if architecture == "gpt_neo" else []
    assert model.fallbacks == expected


@pytest.mark.parametrize("name", ["naive", "spec_stream"])
def test_random_weights_need_a_config_alone(name, stock_checkpoint, tmp_path):
    shutil.copy(stock_checkpoint / "config.json", tmp_path)
    model = loaded(name, tmp_path, random_weights=True)
    answer = model.generate([PROMPT], Limits(max_new_tokens=8, ignore_eos=True))[0]
    base = loaded("kv_cache", tmp_path, random_weights=True).generate(
        [PROMPT], Limits(max_new_tokens=8, ignore_eos=True)
    )[0]
    assert answer.token_ids == base.token_ids
    assert answer.fallbacks == ["no tokenizer: bytes as tokens"]


def test_random_streams_leave_the_main_weights_alone(stream_checkpoint, tmp_path):
    shutil.copy(stream_checkpoint / "config.json", tmp_path)
    limits = Limits(max_new_tokens=8, ignore_eos=True)
    naive, ours = (loaded(name, tmp_path, random_weights=True) for name in ("naive", "spec_stream"))
    assert naive.generate([PROMPT], limits)[0].token_ids == ours.generate([PROMPT], limits)[0].token_ids
    assert ours.model.config.streams == 2


@pytest.mark.parametrize("name", ["naive", "static", "spec_stream"])
def test_streams_beside_their_base_model(name, stock_checkpoint, stream_checkpoint, tmp_path):
    """A checkpoint of streams alone: the main weights come from the base model that its config names."""
    model = load_streaming(str(stream_checkpoint))
    model.config.base_model_name_or_path = str(stock_checkpoint)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(stream_checkpoint).save_pretrained(tmp_path)
    limits = Limits(max_new_tokens=12)
    assert loaded(name, tmp_path).generate([PROMPT], limits)[0].token_ids == (
        loaded("naive", stock_checkpoint).generate([PROMPT], limits)[0].token_ids
    )


def test_static_runs_on_a_stock_directory(stock_checkpoint):
    answer = loaded("static", stock_checkpoint).generate([PROMPT], Limits(max_new_tokens=8))[0]
    assert (
        answer.token_ids
        == loaded("naive", stock_checkpoint).generate([PROMPT], Limits(max_new_tokens=8))[0].token_ids
    )


def test_spec_stream_without_streams_points_at_the_trainer(stock_checkpoint):
    with pytest.raises(ValueError, match="train_spec_stream.py"):
        loaded("spec_stream", stock_checkpoint)


@pytest.mark.parametrize("name", ["naive", "static"])
def test_truncated_weights_are_refused(name, stock_checkpoint, tmp_path):
    directory = shutil.copytree(stock_checkpoint, tmp_path / "torn")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="corrupt"):
        loaded(name, directory)


@pytest.mark.parametrize("name", ["naive", "static"])
def test_pickled_weights_are_never_opened(name, stock_checkpoint, tmp_path):
    directory = shutil.copytree(stock_checkpoint, tmp_path / "pickled")
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch sentinel'\ntR.")
    with pytest.raises(ValueError, match="safetensors"):
        loaded(name, directory)
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("name", ["naive", "static"])
def test_missing_main_weights_are_named(name, stock_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    directory = shutil.copytree(stock_checkpoint, tmp_path / "lacking")
    weights = load_file(directory / "model.safetensors")
    lost = a_projection(weights, "k_proj")
    save_file(
        {k: v for k, v in weights.items() if k != lost}, directory / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=lost.replace(".", r"\.")):
        loaded(name, directory)


def test_undefined_logits_are_refused(stock_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    directory = shutil.copytree(stock_checkpoint, tmp_path / "nan")
    weights = load_file(directory / "model.safetensors")
    key = a_projection(weights, "v_proj")
    weights[key] = torch.full_like(weights[key], torch.nan)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="not finite"):
        loaded("naive", directory)


@pytest.mark.parametrize("name", ["naive", "static"])
def test_weights_of_other_shapes_are_listed(name, architecture, stock_checkpoint, tmp_path):
    place = edited(stock_checkpoint, tmp_path, **{inner_field(architecture): 48})
    with pytest.raises(ValueError, match=r"\(.*64.*\) instead of \(.*48.*\).* of other shapes in all"):
        loaded(name, place)


def test_streams_of_other_shapes_are_listed(stream_checkpoint, tmp_path):
    place = edited(stream_checkpoint, tmp_path, transition_rank=3)
    hidden = AutoConfig.from_pretrained(stream_checkpoint).hidden_size
    wrong = rf"streams.transition_in.weight \(4, {hidden}\) instead of \(3, {hidden}\)"
    with pytest.raises(ValueError, match=wrong):
        loaded("spec_stream", place)


def test_a_base_of_other_shapes_is_one_line(architecture, stock_checkpoint, stream_checkpoint, tmp_path):
    base = edited(stock_checkpoint, tmp_path)
    values = {"base_model_name_or_path": str(base), inner_field(architecture): 48}
    place = edited(stream_checkpoint, tmp_path / "streams", **values)
    with pytest.raises(ValueError, match="restore both together|shapes"):
        loaded("spec_stream", place)
