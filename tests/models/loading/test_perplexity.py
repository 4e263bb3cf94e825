"""Perplexity of every technique's own weights: the same text, the same windows, prompts and references."""

import math

import pytest
import torch
from transformers import AutoTokenizer

from models import Limits
from tests.models.loaders import EXACT, POSITIONS, PROMPT, STOCK_CLASSES, loaded

TEXT = " = A Title = \n\n\n\n\n" + " ".join(f"sentence {number} of some text ." for number in range(12))
PAIRS = [[PROMPT, " a pub ."], [PROMPT, " an inn by the river"], ["other", " words"]]


@torch.no_grad()
def stock_perplexity(architecture, checkpoint, window, stride):
    """A straight loop over upstream's own model."""
    model = STOCK_CLASSES[architecture].from_pretrained(checkpoint).eval()
    ids = AutoTokenizer.from_pretrained(checkpoint)(TEXT, return_tensors="pt").input_ids
    total, count, before = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - before)] = -100
        judged = int((labels[:, 1:] != -100).sum())
        total += model(ids[:, begin:end], labels=labels).loss.item() * judged
        count, before = count + judged, end
        if end == ids.shape[1]:
            break
    return math.exp(total / count), count


@pytest.mark.parametrize("name", EXACT)
def test_a_text_measures_as_upstream_measures_it(name, architecture, stock_checkpoint, stream_checkpoint):
    found = loaded(name, stream_checkpoint).text_perplexity(TEXT, 64, 24)
    expected, count = stock_perplexity(architecture, stock_checkpoint, 64, 24)
    assert (found.perplexity, found.tokens) == (pytest.approx(expected, rel=1e-4), count)
    assert (found.window, found.stride, found.skipped) == (64, 24, 0)


@pytest.mark.parametrize("name", ["half", "flash"])
def test_half_precision_measures_its_own_weights(name, architecture, stock_checkpoint, stream_checkpoint):
    found = loaded(name, stream_checkpoint).text_perplexity(TEXT, 64, 24).perplexity
    expected, _ = stock_perplexity(architecture, stock_checkpoint, 64, 24)
    assert found == pytest.approx(expected, rel=0.05)
    assert found != pytest.approx(expected, rel=1e-6)


def test_windows_default_to_the_positions_and_half_of_them(stream_checkpoint):
    model = loaded("naive", stream_checkpoint)
    found = model.text_perplexity(TEXT)
    assert (found.window, found.stride) == (POSITIONS, POSITIONS // 2)
    assert found == model.text_perplexity(TEXT, POSITIONS, POSITIONS // 2)
    assert model.text_perplexity(TEXT, 40).stride == 20
    with pytest.raises(ValueError, match="window of 97 tokens exceeds the model's 96 positions"):
        model.text_perplexity(TEXT, 97)


def test_a_limit_takes_the_first_tokens(stream_checkpoint):
    model = loaded("naive", stream_checkpoint)
    assert model.text_perplexity(TEXT, 64, 32, tokens=50) == model.text_perplexity(TEXT[:50], 64, 32)
    assert model.text_perplexity(TEXT, 64, 32, tokens=10**6) == model.text_perplexity(TEXT, 64, 32)


@pytest.mark.parametrize(("text", "message"), [("", "the text is empty"), ("a", "no token to judge")])
def test_a_text_with_nothing_to_judge_is_an_error(stream_checkpoint, text, message):
    with pytest.raises(ValueError, match=message):
        loaded("naive", stream_checkpoint).text_perplexity(text)


@pytest.mark.parametrize("name", ["naive", "spec_stream"])
def test_references_are_pooled_over_their_tokens(name, stream_checkpoint):
    model = loaded(name, stream_checkpoint)
    scores = [model.score(prompt, model.tokenizer.encode(text)).logprobs for prompt, text in PAIRS]
    logprobs = [value for part in scores for value in part]
    found = model.reference_perplexity(PAIRS)
    assert found.tokens == len(logprobs) == sum(len(text) for _, text in PAIRS)
    assert found.perplexity == pytest.approx(math.exp(-sum(logprobs) / len(logprobs)), rel=1e-5)
    assert (found.window, found.stride, found.skipped) == (None, None, 0)


def test_long_prompts_lose_their_beginning_and_long_references_their_end(stream_checkpoint):
    model = loaded("naive", stream_checkpoint)
    text = " the answer"
    kept = ("qwertyuiop" * 20)[-(POSITIONS - len(text)) :]
    found = model.reference_perplexity([["qwertyuiop" * 20, text]])
    assert found == model.reference_perplexity([[kept, text]])
    assert found.tokens == len(text)
    assert model.reference_perplexity([["ab", "c" * 300]]).tokens == POSITIONS - 1


def test_an_empty_prompt_opens_as_in_generation(stream_checkpoint):
    model = loaded("naive", stream_checkpoint)
    expected = model.score("", model.tokenizer.encode(" word"), Limits(max_new_tokens=5)).logprobs
    assert model.reference_perplexity([["", " word"]]).nll == pytest.approx(-sum(expected), rel=1e-5)
    model.tokenizer.bos_token = None
    found = model.reference_perplexity([["", " word"], *PAIRS])
    assert (found.skipped, found.nll) == (1, model.reference_perplexity(PAIRS).nll)
    with pytest.raises(ValueError, match="no token to judge"):
        model.reference_perplexity([["", " word"]])


def test_numbers_that_are_not_finite_are_an_error(stream_checkpoint):
    model = loaded("naive", stream_checkpoint)
    with torch.no_grad():
        next(model.model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite in float32"):
        model.text_perplexity(TEXT)
