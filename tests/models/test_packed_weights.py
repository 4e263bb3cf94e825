"""The techniques `int8` and `int4`: their recipes, and answers of real checkpoints, alone and with streams."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoConfig

from huggingface.transformers.integrations.quantized_linear import QuantizedLinear
from models import Machine, Recipe, fold, unavailable
from models.answer import Limits
from models.awq import unreadable
from models.loading import load
from models.loading.packed import check_unquantized, loading_options, packed_config
from tests.architectures import inner_field, with_heads_of

CPU = Machine("cpu")
WEIGHTS = ["int8", "int4"]
PROMPTS = ["one two three", "and another prompt"]
LIMITS = Limits(max_new_tokens=12, ignore_eos=True)


def test_what_they_decide():
    assert fold("int8").weights == "int8"
    assert fold("int4").weights == "int4-group128"
    assert fold("int4", {"group_size": 32}).weights == "int4-group32"
    assert fold("int4", {"int4_scheme": "naive"}).weights == "int4-naive"
    whole = fold("int4+spec_stream", machine=CPU)
    assert (whole.weights, whole.decoder, whole.drafts) == ("int4-group128", "engine", "streams")
    assert whole.without_drafts().weights == whole.weights


def test_the_heads_format_is_part_of_the_weights_name(tmp_path):
    flags = {"lm_head": "int8"}
    assert fold("int8", flags).weights == "int8-head8"
    assert fold("int4", flags | {"int4_scheme": "naive"}).weights == "int4-naive-head8"
    assert fold("awq", flags).weights == "awq-group128-head8"
    assert fold("int8", {"lm_head": "kept"}) == fold("int8")
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"default": {"bits": 4}, "modules": {}}))
    weights = fold("int4", flags | {"precision_plan": str(plan)}).weights
    assert weights.startswith("int4-plan-head8:{")
    for name in ("int8-head8", "int4-group64-head8", weights):
        assert packed_config(name).lm_head == "int8"
    assert packed_config("int4-group64").lm_head is None


@pytest.mark.parametrize("weights", ["int8", "int4", "awq"])
def test_a_head_in_8_bits(weights, text, stream_checkpoint):
    """Streams draft through it; it is a copy where it is tied, and smaller where it is not."""

    def load_with(names, **flags):
        flags |= {"group_size": 32, "calibration_text": str(text)}
        return load(fold(names, flags, CPU), str(stream_checkpoint), "cpu", draft_nodes=5)

    def tokens(loaded):
        return [answer.token_ids for answer in loaded.generate(PROMPTS, LIMITS)]

    kept, packed = load_with(weights), load_with(weights, lm_head="int8")
    drafted = load_with(f"{weights}+spec_stream", lm_head="int8")
    assert tokens(drafted) == tokens(packed)
    head = packed.model.get_output_embeddings()
    assert isinstance(head, QuantizedLinear)
    embeddings = packed.model.get_input_embeddings().weight
    tied = kept.model.get_output_embeddings().weight is kept.model.get_input_embeddings().weight
    change = head.weight.nbytes + head.weight_scale.nbytes - (0 if tied else embeddings.nbytes)
    assert packed.weight_bytes - kept.weight_bytes == change


def test_weights_are_packed_on_the_device_they_run_on():
    options = loading_options("int4-group128", torch.bfloat16, "cuda:0")
    assert options["device_map"] == {"": "cuda:0"}
    assert options["quantization_config"].bits == 4
    assert loading_options(None, torch.bfloat16, "cuda:0") == {}


def test_a_packed_head_says_the_same_to_every_decoder(stock_checkpoint):
    flags = {"lm_head": "int8"}

    def tokens(names, **options):
        loaded = load(fold(names, flags, CPU), str(stock_checkpoint), "cpu", **options)
        assert isinstance(loaded.model.get_output_embeddings(), QuantizedLinear)
        return [answer.token_ids for answer in loaded.generate(PROMPTS, LIMITS)]

    assert tokens("int8+kv_cache") == tokens("int8")
    assert tokens("int8+kv_cache", random_weights=True) == tokens("int8", random_weights=True)


def test_a_checkpoint_with_a_packed_head_is_another():
    saved = packed_config("int8-head8").to_dict()
    check_unquantized(saved, "int8-head8", "here")
    with pytest.raises(ValueError, match=r"quantised already \(8 bits, group size None, LM head in int8\)"):
        check_unquantized(saved, "int8", "here")


@pytest.mark.parametrize("flags", [{"group_size": 48}, {"int4_scheme": "best"}, {"lm_head": "int4"}])
def test_value_out_of_range_names_the_flag(flags):
    with pytest.raises(ValueError, match=f"--{next(iter(flags))} got"):
        fold("int4", flags)


def test_weights_are_decided_once():
    with pytest.raises(ValueError, match=r"int4\+int8: both decide 'weights'"):
        fold("int4+int8")


@pytest.mark.parametrize("name", ["bnb_int8", "bnb_nf4", "torchao_int4"])
def test_a_peer_without_its_package_says_what_installs_it(name, monkeypatch):
    machine = Machine("cuda")
    monkeypatch.setattr("models.technique.importlib.util.find_spec", lambda package: None)
    extra = name.partition("_")[0]
    assert f'-e ".[{extra}]" installs it' in unavailable(name, machine)
    monkeypatch.setattr("models.technique.importlib.util.find_spec", lambda package: object())
    assert unavailable(name, machine) is None
    assert "CUDA device" in unavailable("torchao_int4", CPU)


@pytest.mark.parametrize("name", ["bnb_int8", "bnb_nf4", "torchao_int4"])
def test_peers_are_upstreams_decoder(name):
    assert fold(name).decoder == "stock"
    with pytest.raises(ValueError, match=rf"{name}\+static: both decide 'decoder'"):
        fold(f"{name}+static")


def test_bitsandbytes_where_it_is_installed(stock_checkpoint):
    """In 8 bits; its 4-bit product on a CPU takes no fewer than 64 inputs, and these layers have 32."""
    pytest.importorskip("bitsandbytes")
    tokens, packed = answers("bnb_int8", stock_checkpoint)
    assert all(len(row) == LIMITS.max_new_tokens for row in tokens)
    assert packed < answers("static", stock_checkpoint)[1]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "calibration.txt"
    path.write_text("The cat sat on the mat, the dog beside it. " * 20)
    return path


def test_awq_is_named_by_what_it_read(text):
    recipe = fold("awq", {"calibration_text": str(text), "group_size": 64})
    scheme, digest, path = str(recipe.weights).split(":", 2)
    assert (scheme, len(digest), path) == ("awq-group64", 12, str(text))
    with pytest.raises(ValueError, match=r"awq\+kv_cache: awq scales models of our engine"):
        fold("awq+kv_cache", {"calibration_text": str(text)})
    text.write_text("something else")
    assert fold("awq", {"calibration_text": str(text), "group_size": 64}) != recipe


def test_awq_needs_text(tmp_path, stock_checkpoint):
    assert "--calibration_text" in unreadable(fold("awq").weights, None)
    for name, content in (("empty.txt", "  "), ("missing.txt", None)):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"--calibration_text .*{name}"):
            fold("awq", {"calibration_text": str(tmp_path / name)})
    with pytest.raises(ValueError, match="name a file with --calibration_text"):
        load(fold("awq", machine=CPU), str(stock_checkpoint), "cpu")


def test_awq_stays_exact_with_streams(text, stream_checkpoint):
    def tokens(names, **options):
        recipe = fold(names, {"calibration_text": str(text), "group_size": 32}, CPU)
        loaded = load(recipe, str(stream_checkpoint), "cpu", **options)
        return [answer.token_ids for answer in loaded.generate(PROMPTS, LIMITS)], loaded.weight_bytes

    plain, size = tokens("awq")
    assert tokens("awq+spec_stream", draft_nodes=5)[0] == plain
    assert size == answers("int4", stream_checkpoint)[1]


def test_peers_need_a_checkpoint(stock_checkpoint):
    with pytest.raises(ValueError, match="leave out --random_weights"):
        answers("bnb_nf4", stock_checkpoint, random_weights=True)


def answers(names: str, checkpoint, **options) -> tuple[list[list[int]], int]:
    """Returns the tokens of the answers, and the bytes of the weights."""
    loaded = load(fold(names, {"group_size": 32}, CPU), str(checkpoint), "cpu", **options)
    return [answer.token_ids for answer in loaded.generate(PROMPTS, LIMITS)], loaded.weight_bytes


@pytest.mark.parametrize("weights", WEIGHTS)
def test_streams_change_no_token_of_a_quantised_model(weights, stream_checkpoint):
    plain, _ = answers(weights, stream_checkpoint)
    drafted, _ = answers(f"{weights}+spec_stream", stream_checkpoint, draft_nodes=5)
    assert drafted == plain
    assert all(len(tokens) == LIMITS.max_new_tokens for tokens in plain)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("decoder", ["static", "kv_cache"])
def test_both_decoders_say_the_same(decoder, weights, stock_checkpoint):
    """Upstream's generate on the packed weights, and ours."""
    assert answers(f"{weights}+{decoder}", stock_checkpoint)[0] == answers(weights, stock_checkpoint)[0]


def test_fewer_bytes(architecture, stock_checkpoint, tmp_path):
    """Of layers as wide as real ones at least: narrower ones are filled up to 128 inputs at 4 bits."""
    config = AutoConfig.from_pretrained(stock_checkpoint)
    for name, value in {**with_heads_of(architecture, 64), inner_field(architecture): 256}.items():
        setattr(config, name, value)
    if architecture == "mistral":
        config.hidden_size = 128
    config.save_pretrained(tmp_path)
    names = ("static", "int8", "int4")
    plain, half, quarter = (answers(name, tmp_path, random_weights=True)[1] for name in names)
    assert plain > half > quarter


@pytest.mark.parametrize("weights", WEIGHTS)
def test_random_weights_are_packed_too(weights, stock_checkpoint):
    _, plain = answers("static", stock_checkpoint, random_weights=True)
    tokens, packed = answers(weights, stock_checkpoint, random_weights=True)
    assert packed < plain
    assert tokens == answers(f"{weights}+spec_stream", stock_checkpoint, random_weights=True)[0]


def test_a_checkpoint_that_is_quantised_already_is_refused(stock_checkpoint, tmp_path):
    directory = tmp_path / "other"
    shutil.copytree(stock_checkpoint, directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ValueError, match=r"quantised already \(gptq\)"):
        load(fold("int8", machine=CPU), str(directory), "cpu")


def test_a_recipe_of_another_version_is_refused(stock_checkpoint):
    recipe = Recipe(weights="int3").resolved(CPU)
    with pytest.raises(ValueError, match="'int3', which this version does not know"):
        load(recipe, str(stock_checkpoint), "cpu")
