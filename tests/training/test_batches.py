from __future__ import annotations

import numpy as np
import pytest
import torch

from training.batches import IGNORE, Collator
from training.tokens import Encoded, pack

# Two examples: prompt 10 11 12, completion 20 21 22 0 (0 ends); prompt 13, completion 23 0.
EXAMPLES = pack([Encoded([[10, 11, 12], [13]], [[20, 21, 22, 0], [23, 0]])], ("hand",))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return Collator(EXAMPLES, streams=2, pad_id=9)([0, 1])


def test_rows_are_padded_on_the_right(batch):
    assert batch["input_ids"].tolist() == [[10, 11, 12, 20, 21, 22, 0], [13, 23, 0, 9, 9, 9, 9]]
    assert batch["lengths"].tolist() == [7, 3]


def test_main_rows_guess_the_next_token_of_the_completion(batch):
    assert batch["completion_rows"].tolist() == [2, 3, 4, 5, 7, 8]
    assert batch["completion_labels"].tolist() == [20, 21, 22, 0, 23, 0]


def test_prompt_rows_guess_prompt_tokens_only(batch):
    assert batch["prompt_rows"].tolist() == [0, 1]
    assert batch["prompt_labels"].tolist() == [11, 12]


def test_streams_start_at_the_last_prompt_token_and_stop_with_the_text(batch):
    assert batch["stream_parents"].tolist() == [[2, 3, 4], [0, 0, 0]]
    assert batch["anchor_slots"].tolist() == [0, 1, 2, 3]
    assert batch["anchor_rows"].tolist() == [2, 3, 4, 7]
    # Stream 1 of row i guesses token i + 2, stream 2 token i + 3; nothing after the end.
    assert batch["stream_labels"].tolist() == [[21, 22], [22, 0], [0, IGNORE], [0, IGNORE]]
    assert batch["stream_parent_tokens"].tolist() == [[20, 21], [21, 22], [22, 0], [23, 0]]


def test_an_answer_of_the_end_token_alone_has_no_anchor():
    batch = Collator(pack([Encoded([[5, 6]], [[0]])], ("x",)), streams=3, pad_id=0)([0])
    assert batch["stream_labels"].shape == (0, 3)
    assert batch["stream_parents"].tolist() == [[1]]
    assert batch["completion_labels"].tolist() == [0]


def test_labels_follow_the_definition_on_random_examples():
    draw = np.random.default_rng(0)
    prompts = [draw.integers(1, 99, size=draw.integers(1, 9)).tolist() for _ in range(20)]
    answers = [[*draw.integers(1, 99, size=draw.integers(0, 9)).tolist(), 0] for _ in range(20)]
    collator = Collator(pack([Encoded(prompts, answers)], ("x",)), streams=3, pad_id=0)
    batch = collator(list(range(20)))
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = prompt + answer
        for row in range(len(prompt) - 1, len(ids) - 2):
            expected.append([ids[row + 1 + j] if row + 1 + j < len(ids) else IGNORE for j in (1, 2, 3)])
    assert batch["stream_labels"].tolist() == expected
