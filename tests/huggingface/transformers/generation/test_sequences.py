"""What the host can say of a step's tokens before it has done anything with them."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from huggingface.transformers.generation.sequences import Sequences, StopRule

EOS = 0
TOKENS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=2, max_size=2)


def sequences(most: int, limit: int, criteria=()) -> Sequences:
    """Two sequences of three prompt tokens, one of which is padding in the second."""
    ids, mask = torch.tensor([[3, 1, 4], [0, 9, 2]]), torch.tensor([[1, 1, 1], [0, 1, 1]])
    return Sequences(ids, mask, StopRule(frozenset({EOS}), most, list(criteria)), limit)


@given(st.integers(1, 9), st.integers(4, 12), st.lists(TOKENS, min_size=1, max_size=5))
def test_whether_there_is_a_next_step_is_known_beforehand(most, limit, steps):
    run = sequences(most, limit)
    for tokens in steps:
        foreseen = run.go_on(tokens)
        run.extend(tokens)
        assert run.running() == foreseen


def test_criteria_of_the_caller_are_not_foreseen():
    run = sequences(9, 12, [lambda ids, scores: False])
    assert not run.go_on([[1], [1]])
    run.extend([[1], [1]])
    assert run.running()
