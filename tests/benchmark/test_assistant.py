"""What `--assistant_model` names is looked at before anything loads."""

import json

import pytest

from benchmark.config import RunConfig
from benchmark.errors import RunError, UsageError
from benchmark.preparation import open_checkpoint, parameters_of
from benchmark.selection import Selection, estimates, needs_assistant, select
from models import fold
from tests.benchmark.builders import write_checkpoint

CPU = {"device": "cpu", "device_name": "x", "capability": None}


@pytest.fixture
def model(tmp_path):
    return write_checkpoint(tmp_path / "model", streams=4)


@pytest.fixture
def helper(tmp_path):
    return write_checkpoint(tmp_path / "helper", hidden_size=8)


def config(model, helper, *names, **values):
    place = None if helper is None else str(helper)
    return RunConfig(model_type=names, model_name_or_path=str(model), assistant_model=place, **values)


def write_tokens(path, tokens):
    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}}))


def test_it_is_opened_where_a_technique_drafts_with_it(model, helper):
    assert open_checkpoint(config(model, helper, "assisted")).assistant.path == helper
    assert open_checkpoint(config(model, helper, "all")).assistant.path == helper
    assert open_checkpoint(config(model, helper, "naive", "static")).assistant is None
    assert open_checkpoint(config(model, None, "assisted")).assistant is None
    assert not needs_assistant(config(model, None, "all"))


def test_the_fingerprint_follows_its_weights(model, helper):
    alone = open_checkpoint(config(model, None, "naive")).fingerprint
    before = open_checkpoint(config(model, helper, "assisted")).fingerprint
    weights = helper / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    after = open_checkpoint(config(model, helper, "assisted")).fingerprint
    assert len({alone, before, after}) == 3


@pytest.mark.parametrize("names", [("assisted",), ("naive", "assisted"), ("all",)])
def test_another_vocabulary_is_refused_with_both_sizes(model, helper, names):
    write_checkpoint(helper, vocab_size=90)
    with pytest.raises(
        UsageError, match=r"--assistant_model .* 90 tokens, the model one of 100; .*same family"
    ):
        open_checkpoint(config(model, helper, *names))


def test_other_tokens_under_the_same_ids_are_refused(model, helper):
    write_tokens(model, {"a": 0, "b": 1})
    open_checkpoint(config(model, helper, "assisted"))  # an assistant needs no tokenizer of its own
    write_tokens(helper, {"a": 0, "b": 1})
    open_checkpoint(config(model, helper, "assisted"))
    write_tokens(helper, {"b": 0, "a": 1})
    with pytest.raises(UsageError, match="other tokens"):
        open_checkpoint(config(model, helper, "assisted"))


def test_what_is_no_checkpoint_is_refused_with_the_flag(model, helper):
    for place in (helper / "config.json", helper / "absent"):
        with pytest.raises(UsageError, match="^--assistant_model"):
            open_checkpoint(config(model, place, "assisted"))
    (helper / "config.json").unlink()
    with pytest.raises(RunError, match="helper has no config.json"):
        open_checkpoint(config(model, helper, "assisted"))


def test_torn_weights_and_code_are_refused(model, helper):
    weights = helper / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(RunError, match="corrupt"):
        open_checkpoint(config(model, helper, "assisted"))
    open_checkpoint(config(model, helper, "assisted", random_weights=True))
    write_checkpoint(helper, auto_map={"AutoModel": "evil.py"})
    with pytest.raises(RunError, match="auto_map"):
        open_checkpoint(config(model, helper, "assisted"))


def test_only_its_own_worker_needs_memory_for_it(model, helper):
    chosen: Selection = select(config(model, helper, "naive", "assisted"), CPU, {"streams": 4})
    without, with_it = (estimates(chosen.contenders, 1000, False, extra) for extra in (0, 400))
    assert with_it["naive"] == without["naive"]
    assert with_it["assisted"] - without["assisted"] == 400 * 4 * 1.25
    assert parameters_of(open_checkpoint(config(model, helper, "assisted")).assistant) == 4


def test_its_path_is_in_no_recipe(helper):
    assert str(helper) not in json.dumps(fold("assisted", {"assistant_model": str(helper)}).to_json())
