"""Strided perplexity against upstream's documented recipe and against a pass a token."""

import math

import pytest
import torch

from huggingface.transformers.generation import perplexity
from huggingface.transformers.generation.perplexity import (
    Likelihood,
    Window,
    continuation_likelihood,
    continuation_likelihoods,
    text_likelihood,
    windows,
)
from huggingface.transformers.generation.scoring import score_tokens
from tests.huggingface.transformers.conftest import VOCAB

WINDOW = 16
STRIDES = [1, 3, 8, 15, 16]
LENGTHS = [1, 2, 9, 15, 16, 17, 24, 33, 40, 61]


def a_text(length, seed=0):
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def recipe(model, token_ids, window, stride):
    """Upstream's recipe, labels shifted by hand: mean loss and number of judged tokens of each window."""
    text, end_before, parts = torch.tensor([token_ids]), 0, []
    for begin in range(0, len(token_ids), stride):
        end = min(begin + window, len(token_ids))
        labels = text[:, begin:end].clone()
        labels[:, : -(end - end_before)] = -100
        loss = model(text[:, begin:end], labels=labels).loss.item()
        parts.append((loss, int((labels[:, 1:] != -100).sum()), int((labels != -100).sum()) - 1))
        end_before = end
        if end == len(token_ids):
            break
    return parts


@torch.no_grad()
def nll_of(model, context, token):
    return -model(torch.tensor([context])).logits[0, -1].double().log_softmax(-1)[token].item()


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("length", [length for length in LENGTHS if length > 1])
def test_equals_the_recipe(architecture, make_model, stride, length):
    model, text = make_model(architecture), a_text(length)
    judged = [(loss, tokens) for loss, tokens, _ in recipe(model, text, WINDOW, stride) if tokens]
    found = text_likelihood(model, text, WINDOW, stride)
    assert found.tokens == sum(tokens for _, tokens in judged)
    mean = sum(loss * tokens for loss, tokens in judged) / found.tokens
    assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-5)


def test_equals_the_recipe_as_it_is_written(architecture, make_model):
    """Upstream multiplies a later window's mean by one token fewer than it judged: no more than 1e-3 where windows are long."""
    model, text = make_model(architecture, max_position_embeddings=512), a_text(3000)
    parts = [(loss, counted) for loss, _, counted in recipe(model, text, 512, 256)]
    written = math.exp(sum(loss * n for loss, n in parts) / sum(n for _, n in parts))
    assert text_likelihood(model, text, 512, 256).perplexity == pytest.approx(written, rel=1e-3)


@pytest.mark.parametrize("stride", [3, 16])
def test_each_token_is_judged_once_after_what_its_window_holds(architecture, make_model, stride):
    model, text = make_model(architecture), a_text(41)
    total, seen = 0.0, []
    for one in windows(len(text), WINDOW, stride):
        for place in range(one.end - one.judged, one.end):
            total += nll_of(model, text[one.begin : place], text[place])
            seen.append(place)
    unjudged = {0} if stride < WINDOW else {0, 16, 32}
    assert seen == [place for place in range(41) if place not in unjudged]
    found = text_likelihood(model, text, WINDOW, stride)
    assert (found.nll, found.tokens) == (pytest.approx(total, rel=1e-5), len(seen))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("stride", STRIDES)
def test_batches_of_windows_change_nothing(architecture, make_model, stride, length):
    model, text = make_model(architecture), a_text(length)
    alone = text_likelihood(model, text, WINDOW, stride, batch_size=1)
    for size in (2, 3, None):
        found = text_likelihood(model, text, WINDOW, stride, batch_size=size)
        assert (found.nll, found.tokens) == (pytest.approx(alone.nll, rel=1e-6), alone.tokens)


def test_many_windows_go_through_in_few_passes(make_model):
    model, passes = make_model("llama"), []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: passes.append(1), with_kwargs=True)
    text_likelihood(model, a_text(160), WINDOW, 8)
    hook.remove()
    assert len(passes) == 2  # the first window judges more tokens than the others


def test_the_drawn_example():
    assert list(windows(10, 6, 3)) == [Window(0, 6, 5), Window(3, 9, 3), Window(6, 10, 1)]
    assert list(windows(13, 6, 6)) == [Window(0, 6, 5), Window(6, 12, 5)]  # a lone last token has no context
    assert list(windows(4, 6, 3)) == [Window(0, 4, 3)]


def test_one_token_has_nothing_to_follow(make_model):
    found = text_likelihood(make_model("llama"), [3], WINDOW, 8)
    assert (found, found.perplexity) == (Likelihood(0.0, 0), None)


def test_an_empty_text_is_refused(make_model):
    with pytest.raises(ValueError, match="the text is empty"):
        text_likelihood(make_model("llama"), [], WINDOW, 8)


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (0, 1), (8, 0), (8, 9), (8, -1)])
def test_windows_that_cannot_be_are_refused(window, stride):
    with pytest.raises(ValueError, match="window"):
        list(windows(10, window, stride))


def test_only_the_continuation_is_judged(architecture, make_model):
    model, prompt, tokens = make_model(architecture), a_text(7), a_text(5, seed=1)
    found = continuation_likelihood(model, prompt, tokens)
    logprobs = score_tokens(model, prompt, tokens).logprobs.double()
    assert (found.nll, found.tokens) == (pytest.approx(-logprobs.sum().item(), rel=1e-6), 5)
    assert continuation_likelihood(model, prompt, []) == Likelihood(0.0, 0)
    with pytest.raises(ValueError, match="at least one token"):
        continuation_likelihood(model, [], tokens)


def test_pooling_is_over_tokens():
    pooled = Likelihood(2.0, 1) + Likelihood(1.0, 5)
    assert pooled.perplexity == pytest.approx(math.exp(0.5))
    assert Likelihood(1e6, 1).perplexity == math.inf
    assert (Likelihood(0.0, 0) + Likelihood(0.0, 0)).perplexity is None


def test_pairs_that_share_a_pass_are_judged_as_alone(architecture, make_model, monkeypatch):
    model = make_model(architecture)
    pairs = [
        (a_text(size, seed=size), a_text(judged, seed=9)) for size, judged in ((7, 5), (1, 3), (4, 1), (9, 0))
    ]
    alone = [continuation_likelihood(model, *pair) for pair in pairs]
    for tokens in (1, 20, 1000):  # a pass a pair, some together, all together
        monkeypatch.setattr(perplexity, "BATCH_TOKENS", tokens)
        found = continuation_likelihoods(model, pairs)
        assert [one.tokens for one in found] == [5, 3, 1, 0]
        assert [one.nll for one in found] == pytest.approx([one.nll for one in alone], rel=1e-5)
    assert continuation_likelihoods(model, []) == []
