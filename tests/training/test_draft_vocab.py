from __future__ import annotations

import numpy as np
import pytest
import torch

from training.batches import Collator
from training.draft_vocab import check_draft_vocab, choose_draft_vocab, frequent_tokens
from training.ranks import NO_TOKEN, RANKS, stream_ranks
from training.tokens import Encoded, pack

from .conftest import make_model


def test_completions_count_before_prompts_and_those_before_ids():
    part = Encoded([[7, 7, 7, 3], [7, 9]], [[5, 2], [2, 4]])
    examples = pack([part], ("one",))
    assert frequent_tokens(examples, 1, 12).tolist() == [2]
    assert frequent_tokens(examples, 3, 12).tolist() == [2, 4, 5]
    assert frequent_tokens(examples, 4, 12).tolist() == [2, 4, 5, 7]
    assert frequent_tokens(examples, 7, 12).tolist() == [0, 2, 3, 4, 5, 7, 9]


def test_a_size_replaces_the_list_and_none_keeps_it(tokenizer, token_set):
    model = make_model(tokenizer)
    choose_draft_vocab(model, 50, token_set)
    chosen = model.streams.draft_vocab
    assert chosen.tolist() == frequent_tokens(token_set, 50, len(tokenizer)).tolist()
    choose_draft_vocab(model, None, token_set)
    assert model.streams.draft_vocab is chosen
    choose_draft_vocab(model, 0, token_set)
    assert model.streams.draft_vocab is None


def test_too_large_a_size_is_refused(tokenizer):
    with pytest.raises(ValueError, match=f"exceeds the model's {len(tokenizer)} tokens"):
        check_draft_vocab(make_model(tokenizer), len(tokenizer) + 1)


def test_ranks_count_the_tokens_that_may_be_drafted(tokenizer, token_set):
    """A token that may not be drafted is never right; the others rise past those that may not."""
    model = make_model(tokenizer)
    batch = Collator(token_set, 2, 0)([0, 1, 2])
    labels = batch["stream_labels"]
    whole = stream_ranks(model, batch)
    used = labels[labels >= 0].unique()
    kept = used[::2]
    others = torch.from_numpy(np.setdiff1d(np.arange(len(tokenizer)), used.numpy()))[:20]
    model.set_draft_vocab(torch.cat([kept, others]))
    ranks = stream_ranks(model, batch)
    known = torch.isin(labels, kept)
    assert (ranks[known] <= whole[known]).all()
    assert (ranks[known] < whole[known]).any()
    assert set(ranks[(labels >= 0) & ~known].tolist()) == {RANKS}
    assert torch.equal(ranks == NO_TOKEN, whole == NO_TOKEN)
