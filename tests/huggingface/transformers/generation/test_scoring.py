"""Teacher-forced scores: one pass says what a pass a token would say."""

import pytest
import torch

from huggingface.transformers.generation.scoring import score_tokens

PROMPT, TOKENS = [3, 1, 4, 1, 5], [9, 2, 6, 5]


def test_scores_are_those_of_a_pass_a_token(architecture, make_model):
    model = make_model(architecture)
    found = score_tokens(model, PROMPT, TOKENS)
    for place, token in enumerate(TOKENS):
        with torch.no_grad():
            logits = model(torch.tensor([PROMPT + TOKENS[:place]])).logits[0, -1].float()
        first, second = logits.topk(2).values
        torch.testing.assert_close(found.logprobs[place], logits.log_softmax(-1)[token])
        torch.testing.assert_close(found.margins[place], first - second)
        torch.testing.assert_close(found.gaps[place], first - logits[token])


def test_the_likeliest_tokens_have_no_gap(architecture, make_model):
    model = make_model(architecture)
    ids = torch.tensor([PROMPT])
    greedy = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[
        0, len(PROMPT) :
    ].tolist()
    found = score_tokens(model, PROMPT, greedy)
    assert found.gaps.tolist() == [0.0] * 6
    assert (found.margins > 0).all()


def test_no_tokens_have_no_scores(architecture, make_model):
    found = score_tokens(make_model(architecture), PROMPT, [])
    assert [len(part) for part in (found.logprobs, found.margins, found.gaps)] == [0, 0, 0]


def test_a_first_token_must_follow_something(architecture, make_model):
    with pytest.raises(ValueError, match="at least one token"):
        score_tokens(make_model(architecture), [], TOKENS)
