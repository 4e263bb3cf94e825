"""Continuations found in the context: by hand, and the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from huggingface.transformers.integrations.context_lookup import (
    BLOCK,
    lookup_continuation,
    lookup_continuation_reference,
)
from huggingface.transformers.integrations.triton_support import unavailable

from .compile_check import compile_kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(unavailable(DEVICE) is not None, reason="Triton cannot run here")


def found(lookup, known, length=4, longest=3, capacity=None, behind=0):
    """Returns what follows the last of `known`; `behind` fills the history past it."""
    history = torch.full((1, max(capacity or 0, len(known))), behind, device=DEVICE)
    history[0, : len(known)] = torch.tensor(known, device=DEVICE)
    lengths, root = (torch.tensor([value], device=DEVICE) for value in (len(known) - 1, known[-1]))
    out = torch.full((1, length), 99, device=DEVICE)
    lookup(history, lengths, root, out, longest)
    return out[0].tolist()


@pytest.mark.parametrize("lookup", [lookup_continuation, lookup_continuation_reference])
class TestByHand:
    def test_the_tokens_after_the_same_ending(self, lookup):
        assert found(lookup, [1, 2, 3, 4, 5, 6, 1, 2, 3]) == [4, 5, 6, 1]

    def test_the_latest_of_equally_long_repeats(self, lookup):
        assert found(lookup, [1, 2, 3, 7, 1, 2, 3, 8, 9, 9, 1, 2, 3]) == [8, 9, 9, 1]

    def test_a_longer_repeat_beats_a_later_one(self, lookup):
        assert found(lookup, [1, 2, 3, 7, 0, 2, 3, 8, 1, 2, 3]) == [7, 0, 2, 3]
        assert found(lookup, [1, 2, 3, 7, 0, 2, 3, 8, 1, 2, 3], longest=2) == [8, 1, 2, 3]

    def test_one_repeated_token_is_not_enough(self, lookup):
        assert found(lookup, [5, 6, 7, 8, 5]) == [-1] * 4

    def test_nothing_is_known_past_the_root(self, lookup):
        assert found(lookup, [1, 2, 9, 1, 2], capacity=9, behind=7) == [9, 1, 2, -1]

    def test_a_repeat_may_overlap_the_ending(self, lookup):
        assert found(lookup, [4, 4, 4, 4]) == [4, -1, -1, -1]

    def test_what_lies_past_the_root_is_not_searched(self, lookup):
        assert found(lookup, [1, 2], capacity=9, behind=2) == [-1] * 4

    @pytest.mark.parametrize("known", [[3], [3, 3], [0, 0, 0]])
    def test_short_histories(self, lookup, known):
        assert found(lookup, known) == ([0, -1, -1, -1] if len(known) == 3 else [-1] * 4)

    def test_a_history_of_one_block_and_one_token(self, lookup):
        known = [1, 2, 3, *range(10, BLOCK + 4), 1, 2, 3]
        assert found(lookup, known, length=3) == [10, 11, 12]


@needs_kernels
@settings(max_examples=30, deadline=None)
@given(
    history=st.lists(st.lists(st.integers(0, 2), min_size=40, max_size=40), min_size=1, max_size=3),
    length=st.integers(1, 9),
    longest=st.integers(2, 5),
    data=st.data(),
)
def test_the_kernel_equals_the_reference(history, length, longest, data):
    batch = len(history)
    tokens = torch.tensor(history, device=DEVICE)
    lengths = torch.tensor([data.draw(st.integers(0, 39)) for _ in range(batch)], device=DEVICE)
    root = tokens.gather(1, lengths[:, None])[:, 0]
    ours, theirs = (torch.full((batch, length), 99, device=DEVICE) for _ in range(2))
    lookup_continuation(tokens, lengths, root, ours, longest)
    lookup_continuation_reference(tokens, lengths, root, theirs, longest)
    assert ours.tolist() == theirs.tolist()


def test_the_kernel_compiles_without_spills():
    pytest.importorskip("triton")
    signature = {name: "*i64" for name in ("history", "lengths", "root", "out")} | {
        "capacity": "i32",
        "length": "i32",
    }
    usages = compile_kernel(
        "huggingface.transformers.integrations.context_lookup",
        "_lookup_kernel",
        signature,
        {"LONGEST": 3, "SHORTEST": 2, "BLOCK": BLOCK, "COLUMNS": 16},
        num_warps=8,
    )
    assert all(usage.fits for usage in usages), usages
