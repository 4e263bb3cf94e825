from __future__ import annotations

import numpy as np
import pytest

from training.data import TextPair
from training.targets import unique_prompts
from training.tokens import END_OF_TEXT, Encoded, encode, encode_pairs, pack

from .conftest import text_pairs


@pytest.mark.parametrize(
    "text", ["This boat is red.", " naïve 🚤\n\ttab", "日本語 and\u0000 nul", "<s> x </s>"]
)
def test_any_text_comes_back(tokenizer, text):
    (ids,) = encode(tokenizer, [text], special_tokens=True)
    assert tokenizer.decode(ids) == text


def test_the_end_token_has_all_roles(tokenizer):
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == END_OF_TEXT
    assert tokenizer.eos_token_id == 0
    assert len(tokenizer) <= 300


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = [pair.prompt + pair.completion for pair in text_pairs(10)]
    assert encode(again, texts, True) == encode(tokenizer, texts, True)
    assert again.eos_token_id == tokenizer.eos_token_id


def test_prompt_and_completion_join_to_the_whole_text(tokenizer):
    pairs = text_pairs(5)
    encoded = encode_pairs(tokenizer, pairs, 96)
    whole = encode(tokenizer, [pair.prompt + pair.completion for pair in pairs], True)
    for prompt, completion, ids in zip(encoded.prompts, encoded.completions, whole, strict=True):
        assert prompt + completion == [*ids, tokenizer.eos_token_id]


def test_a_prompt_that_merges_with_its_completion_is_tokenised_apart(tokenizer):
    pair = TextPair("Thing: red appl", "e pie")
    encoded = encode_pairs(tokenizer, [pair], 96)
    assert encoded.prompts == encode(tokenizer, [pair.prompt], True)
    assert encoded.completions[0][:-1] == encode(tokenizer, [pair.completion], False)[0]


def test_long_prompts_are_skipped_and_long_completions_cut(tokenizer):
    short, long = TextPair("Thing: a", " b"), TextPair("word " * 50, " b")
    wordy = TextPair("Thing: a", " c" * 50)
    encoded = encode_pairs(tokenizer, [short, long, wordy], 30)
    assert (encoded.skipped_long, encoded.cut_completions) == (1, 1)
    assert len(encoded.prompts[1]) + len(encoded.completions[1]) == 30
    assert encoded.completions[1][-1] != tokenizer.eos_token_id


def test_packing_keeps_every_example():
    packed = pack([Encoded([[1, 2]], [[3]]), Encoded([[4], [5, 6, 7]], [[8, 9], [0]])], ("a", "b"))
    assert [packed.example(index) for index in range(3)] == [([1, 2], [3]), ([4], [8, 9]), ([5, 6, 7], [0])]
    assert packed.set_ids.tolist() == [0, 1, 1]
    assert packed.lengths.tolist() == [3, 3, 4]
    assert packed.tokens.dtype == np.int32


def test_repeated_prompts_are_kept_once_a_set():
    packed = pack([Encoded([[1], [1], [2]], [[3], [4], [5]]), Encoded([[1]], [[6]])], ("a", "b"))
    unique = unique_prompts(packed)
    assert [unique.example(index) for index in range(3)] == [([1], [3]), ([2], [5]), ([1], [6])]
    assert len(unique_prompts(packed, 1)) == 2
