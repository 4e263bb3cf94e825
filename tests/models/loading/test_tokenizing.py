"""Tokenizers that do not belong to the model."""

import shutil

import pytest

from models.loading.tokenizing import encode_continuation
from tests.models.loaders import edited, loaded


def test_tokenizer_of_another_model_is_refused_with_both_sizes(stock_checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"257 tokens.*vocabulary has 100"):
        loaded("naive", edited(stock_checkpoint, tmp_path, vocab_size=100))


def test_checkpoint_without_tokenizer_is_refused(stock_checkpoint, tmp_path):
    for file in ("config.json", "model.safetensors"):
        shutil.copy(stock_checkpoint / file, tmp_path)
    with pytest.raises(ValueError, match="no usable tokenizer"):
        loaded("naive", tmp_path)


class Opening:
    """Letters as tokens; a text opens with 1."""

    def encode(self, text, add_special_tokens=True):
        return [1] * add_special_tokens + [ord(letter) for letter in text]


class Gluing(Opening):
    """Takes a colon and a space for one token, so that a prompt's last token changes with what follows."""

    def encode(self, text, add_special_tokens=True):
        glued = [2 if letter == "\0" else ord(letter) for letter in text.replace(": ", "\0")]
        return [1] * add_special_tokens + glued


def test_a_continuation_has_no_opening_token():
    assert encode_continuation(Opening(), "ab", " c") == [ord(" "), ord("c")]
    assert encode_continuation(Gluing(), "ab:", " c") == [ord(" "), ord("c")]
    assert encode_continuation(Opening(), "", "c") == [ord("c")]
