"""Tokenizers that do not belong to the model."""

import shutil

import pytest

from tests.models.loaders import edited, loaded


def test_tokenizer_of_another_model_is_refused_with_both_sizes(stock_checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"257 tokens.*vocabulary has 100"):
        loaded("naive", edited(stock_checkpoint, tmp_path, vocab_size=100))


def test_checkpoint_without_tokenizer_is_refused(stock_checkpoint, tmp_path):
    for file in ("config.json", "model.safetensors"):
        shutil.copy(stock_checkpoint / file, tmp_path)
    with pytest.raises(ValueError, match="no usable tokenizer"):
        loaded("naive", tmp_path)
