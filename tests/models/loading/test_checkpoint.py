"""Configurations that are refused before anything is built."""

import pytest

from tests.models.loaders import edited, loaded


@pytest.mark.parametrize(
    "values",
    [
        {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
        {"_attn_implementation_internal": "someone/kernel"},
        {"trust_remote_code": True},
        {"text_config": {"auto_map": {"AutoConfig": "evil.Config"}}},
    ],
)
def test_config_that_asks_for_code_is_refused(values, stock_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="nothing was run"):
        loaded("naive", edited(stock_checkpoint, tmp_path, **values))


def test_unknown_architecture_is_refused(stock_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="model_type 'no_such_model'"):
        loaded("naive", edited(stock_checkpoint, tmp_path, model_type="no_such_model"))


def test_missing_directory_is_one_clear_line():
    with pytest.raises(ValueError, match=r"^no usable config.json in ./nowhere") as caught:
        loaded("naive", "./nowhere")
    assert "\n" not in str(caught.value)


def test_a_config_that_contradicts_itself_is_one_line(tmp_path, stock_checkpoint):
    layers = {"num_layers": 6} if "gpt_neo" in str(stock_checkpoint) else {"num_attention_heads": 0}
    place = edited(stock_checkpoint, tmp_path, **layers)
    with pytest.raises(ValueError, match="config.json|cannot be loaded"):
        loaded("static", place)
