from __future__ import annotations

import numpy as np
import pytest
import torch

from huggingface.transformers.generation.draft_tree import TreeShape
from huggingface.transformers.generation.tree_tuning import DraftPlan
from huggingface.transformers.generation.tree_worth import grow_tree
from training.batches import Collator
from training.calibration import calibrate, ranks_by_text
from training.ranks import NO_TOKEN, RANKS, acceptance_length, rank_accuracy, rank_paths, stream_ranks
from training.targets import Continuer, own_continuations, unique_prompts

# Root, two children, and one grandchild below the first.
TREE = TreeShape((-1, 0, 0, 1), 2)


def continuer_of(model) -> Continuer:
    return Continuer(model, eos_id=0, pad_id=0, max_new_tokens=12, batch_size=4)


def test_a_table_counts_what_the_streams_before_let_through():
    ranks = np.array([[0, 0], [0, 2], [1, RANKS], [RANKS, 0], [0, NO_TOKEN]])
    table = rank_accuracy(ranks)
    assert table[0][:2] == pytest.approx([0.6, 0.2])
    assert table[1][:3] == pytest.approx([1 / 3, 0, 1 / 3], abs=1e-5)
    assert all(sum(row) <= 1 + 1e-5 for row in table)


def test_paths_of_a_tree():
    assert rank_paths(TREE) == {(0,), (1,), (0, 0)}


def test_acceptance_by_hand():
    # Six tokens after the first: root + path (0, 0) gives 3, then rank 5 gives 1, then rank 1 gives 2.
    ranks = np.array([[0, 0], [9, 9], [9, 9], [5, 0], [1, 0], [9, 9]])
    assert acceptance_length([ranks], TREE) == pytest.approx(6 / 3)
    assert acceptance_length([np.zeros((0, 2), np.int64)], TREE) is None


def test_the_end_of_the_text_stops_a_path():
    assert acceptance_length([np.array([[0, NO_TOKEN], [0, 0]])], TREE) == pytest.approx(2.0)


def test_ranks_equal_a_sort(tiny_model, token_set):
    batch = Collator(token_set, 2, 0)([0, 1, 2])
    ranks = stream_ranks(tiny_model, batch)
    _, hidden = tiny_model.stream_forward(batch["input_ids"], batch["stream_parents"])
    kept = hidden.flatten(0, 1)[batch["anchor_slots"]]
    order = tiny_model.stream_logits(kept, batch["stream_parent_tokens"]).argsort(-1, descending=True)
    for place, labels in enumerate(batch["stream_labels"].tolist()):
        for j, label in enumerate(labels):
            expected = NO_TOKEN if label < 0 else min(order[place, j].tolist().index(label), RANKS)
            assert ranks[place, j] == expected


def test_own_choice_takes_the_models_own_next_token(tiny_model, token_set):
    batch = Collator(token_set, 2, 0)([0, 4])
    main, hidden = tiny_model.stream_forward(batch["input_ids"], batch["stream_parents"])
    best = tiny_model.get_output_embeddings()(main).argmax(-1).flatten()
    logits = tiny_model.stream_logits(
        hidden.flatten(0, 1)[batch["anchor_slots"]], batch["stream_parent_tokens"]
    )
    hits = (logits.argmax(-1) == best[batch["anchor_rows"][:, None] + torch.tensor([1, 2])]).tolist()
    ranks = stream_ranks(tiny_model, batch, own_choice=True).tolist()
    for row, hit in zip(ranks, hits, strict=True):
        assert [rank == 0 for rank in row] == [
            h and rank != NO_TOKEN for h, rank in zip(hit, row, strict=True)
        ]


def test_predicted_acceptance_is_what_decoding_does(tiny_model, token_set):
    """The ranks of teacher-forced passes foretell every step of the decode loop."""
    continuer = continuer_of(tiny_model)
    texts = own_continuations(continuer, unique_prompts(token_set, 6))
    ranks = list(ranks_by_text(continuer, texts))
    tree, _ = grow_tree(rank_accuracy(np.concatenate(ranks)), 12, 2)
    tokens = steps = 0
    for index in range(len(texts)):
        output = tiny_model.generate(
            input_ids=torch.tensor([texts.example(index)[0]]),
            attention_mask=torch.ones(1, len(texts.example(index)[0]), dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            plan=DraftPlan(tree),
            eos_token_id=0,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        assert output.sequences[0].tolist() == sum(texts.example(index), [])
        tokens += len(texts.example(index)[1]) - 1
        steps += len(output.statistics.steps)
    assert acceptance_length(ranks, tree) == pytest.approx(tokens / steps)


def test_calibration_is_sane(tiny_model, token_set):
    measured = calibrate(continuer_of(tiny_model), token_set, 5)
    assert list(measured.sets) == ["things"]
    assert measured.sets["things"].prompts == 5
    assert len(measured.rank_accuracy) == 2
    for row in measured.rank_accuracy:
        assert len(row) == RANKS
        assert 0 <= sum(row) <= 1 + 1e-5
    lengths = list(measured.sets["things"].acceptance_length.values())
    assert all(1 <= value <= 3 for value in lengths)
    assert lengths == sorted(lengths)
    assert measured.as_dict()["rank_accuracy"] == measured.rank_accuracy


def test_no_held_out_prompts_no_calibration(tiny_model, token_set):
    assert calibrate(continuer_of(tiny_model), unique_prompts(token_set, 0), 5) is None
