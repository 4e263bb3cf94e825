"""The technique `awq` on a checkpoint in AWQ's own format: read as it is; all other techniques refuse it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from huggingface.transformers.integrations.quantized_linear import QuantizedLinear
from huggingface.transformers.models.spec_stream import load_streaming
from models import TECHNIQUES, Limits, fold
from models.awq import unreadable
from models.loading import load
from tests.huggingface.transformers.quantizers.awq_writer import edit_config, write_awq
from tests.models.conftest import save_tokenizer, tiny_config
from tests.models.loaders import CPU, PROMPT

LIMITS = Limits(max_new_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A folder of `plain`, `awq` (with `dense` inside, the weights that it stands for), and `streams` over `awq`."""
    root = tmp_path_factory.mktemp("awq")
    torch.manual_seed(1)
    LlamaForCausalLM(tiny_config("llama")).save_pretrained(root / "plain")
    save_tokenizer(root / "plain")
    write_awq(root / "plain", root / "awq")
    fields = {"streams": 2, "stream_layers": 1, "transition_rank": 4, "lora_rank": 2}
    streams = load_streaming(str(root / "plain"), stream_fields=fields)
    streams.config.base_model_name_or_path = "../awq"
    streams.save_pretrained(root / "streams")
    save_tokenizer(root / "streams")
    return root


def tokens(names: str, place: Path, **options) -> list[int]:
    loaded = load(fold(names, options.pop("flags", None), CPU), str(place), "cpu", **options)
    return loaded.generate([PROMPT], LIMITS)[0].token_ids


def test_it_is_read_without_a_search(checkpoints, tmp_path):
    loaded = load(fold("awq", machine=CPU), str(checkpoints / "awq"), "cpu")
    assert any("groups of 32: no scales were searched" in note for note in loaded.fallbacks)
    assert sum(isinstance(module, QuantizedLinear) for module in loaded.model.modules()) == 14
    answer = loaded.generate([PROMPT], LIMITS)[0]
    assert answer.token_ids == tokens("static", checkpoints / "awq" / "dense")
    text = tmp_path / "text.txt"
    text.write_text("some calibration text that nobody reads")
    flags = {"calibration_text": str(text)}
    assert tokens("awq", checkpoints / "awq", flags=flags) == answer.token_ids


def test_its_head_can_be_packed(checkpoints):
    flags = {"lm_head": "int8"}
    model = load(fold("awq", flags, CPU), str(checkpoints / "awq"), "cpu").model
    assert isinstance(model.get_output_embeddings(), QuantizedLinear)
    plain = tokens("awq", checkpoints / "streams", flags=flags)
    assert tokens("awq+spec_stream", checkpoints / "streams", flags=flags, draft_nodes=5) == plain


def test_streams_change_no_token(checkpoints):
    plain = tokens("awq", checkpoints / "awq")
    assert tokens("awq+spec_stream", checkpoints / "streams", draft_nodes=5) == plain
    assert tokens("awq", checkpoints / "streams") == plain


@pytest.mark.parametrize("name", sorted(set(TECHNIQUES) - {"awq", "assisted", "flash"}))
@pytest.mark.parametrize("place", ["awq", "streams"])
def test_others_say_what_to_do(name, place, checkpoints):
    recipe = fold(name, machine=CPU)
    with pytest.raises(ValueError, match="in AWQ's format, which the technique awq reads: use awq"):
        load(recipe, str(checkpoints / place), "cpu")
    assert "use awq" in unreadable(recipe.weights, "awq")


def test_a_config_that_we_do_not_read_is_told_before_the_model_loads(checkpoints, tmp_path, monkeypatch):
    place = write_awq(checkpoints / "plain", tmp_path / "other")
    edit_config(place, group_size=16)
    monkeypatch.setattr(
        "models.loading.weights.load_streaming", lambda *_, **__: pytest.fail("it was loaded")
    )
    with pytest.raises(ValueError, match="group size 16"):
        load(fold("awq", machine=CPU), str(place), "cpu")


def test_random_weights_are_not_awq(checkpoints):
    with pytest.raises(ValueError, match="leave out --random_weights"):
        load(fold("awq", machine=CPU), str(checkpoints / "awq"), "cpu", random_weights=True)


def test_what_a_run_is_told(checkpoints, tmp_path):
    assert unreadable("awq-group32:0123:/text", None) is None
    assert unreadable("awq-group32", "awq") is None
    assert unreadable("plain", None) is None
    assert unreadable("int4-group32", "packed_weights") is None
    assert "--calibration_text" in str(unreadable("awq-group32", "packed_weights"))
