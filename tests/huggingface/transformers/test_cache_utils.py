"""The tree cache holds, after any steps, what a fresh prefill of the committed tokens would hold (gate G6)."""

from __future__ import annotations

import random

import pytest
import torch

from huggingface.transformers.cache_utils import StaticTreeCache
from huggingface.transformers.generation.decode_step import DecodeState, decode_step
from huggingface.transformers.generation.draft_sources import StreamSource
from huggingface.transformers.generation.draft_tree import TreeShape
from huggingface.transformers.generation.step_record import PhaseTimer
from huggingface.transformers.generation.verification import Rule

CPU = torch.device("cpu")


def _random_shape(rng: random.Random) -> TreeShape:
    parents, depths = [-1], [0]
    for node in range(1, rng.randint(1, 9)):
        parent = rng.choice([p for p in range(node) if depths[p] < 3])
        parents.append(parent)
        depths.append(depths[parent] + 1)
    return TreeShape(tuple(parents), 3)


@pytest.mark.parametrize("pruning", [0, 3])
def test_steps_leave_the_cache_of_a_fresh_prefill(architecture, pruning, make_model):
    """Keys, values and the streams' states; a batch of two whose rows accept different numbers."""
    model = make_model(architecture, pruning_rank=pruning)
    rng = random.Random(3)
    prompts = torch.tensor([[3, 1, 4, 1, 5], [2, 6, 5, 0, 0]])
    lengths = torch.tensor([5, 3])
    cache = StaticTreeCache.for_model(model, 2, capacity=60, scratch=60)
    with torch.no_grad():
        hidden, streams = model.stream_forward(prompts, (lengths - 1)[:, None], cache)
        last = hidden.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[2]))
        root = model.get_output_embeddings()(last).argmax(-1)[:, 0]
        state = DecodeState(root, lengths, torch.zeros(2, dtype=torch.bool), streams[:, 0], [], 5, 3)
        tokens = [prompts[0].tolist(), prompts[1, :3].tolist()]
        for _ in range(8):
            roots = state.root.tolist()
            shape = _random_shape(rng)
            keep = max(1, shape.nodes // 2) if pruning else None
            out = decode_step(
                model, cache, state, shape, Rule([]), StreamSource(), PhaseTimer(CPU, False), keep
            )
            for row, (count, *new) in enumerate(out.packed.tolist()):
                tokens[row] += [roots[row], *new[: count - 1]]
            state.longest, state.shortest = int(state.lengths.max()), int(state.lengths.min())
            assert state.lengths.tolist() == [len(row) for row in tokens]
            _check_rows(model, cache, state, tokens)


def _check_rows(model, cache, state, tokens) -> None:
    for row, sequence in enumerate(tokens):
        fresh = StaticTreeCache.for_model(model, 1, capacity=60, scratch=8)
        ids = torch.tensor([sequence])
        _, streams = model.stream_forward(ids, torch.tensor([[len(sequence) - 1]]), fresh)
        for ours, theirs in zip(cache.layers, fresh.layers, strict=True):
            kept = slice(0, len(sequence))
            torch.testing.assert_close(ours.keys[row, :, kept], theirs.keys[0, :, kept])
            torch.testing.assert_close(ours.values[row, :, kept], theirs.values[0, :, kept])
        torch.testing.assert_close(state.stream_hidden[row], streams[0, 0])


def test_commit_equals_out_of_place(make_model):
    """S05: overlapping sources and targets, bit for bit, with two lists."""
    rng = torch.Generator().manual_seed(0)
    cache = StaticTreeCache(3, 2, 2, 2, 4, capacity=12, scratch=8, dtype=torch.float32, device=CPU)
    for _ in range(50):
        for block in (cache.below, cache.above):
            block.copy_(torch.rand(block.shape, generator=rng))
        cache.base = 6
        lengths = torch.tensor([6, int(torch.randint(1, 7, (), generator=rng))])
        paths = [torch.randint(0, 8, (2, 3), generator=rng).sort(1).values for _ in range(2)]
        before = [cache.below.clone(), cache.above.clone()]
        cache.commit(*paths, lengths)
        for block, old, path in zip((cache.below, cache.above), before, paths, strict=True):
            want = old.clone()
            for row in range(2):
                for i in range(3):
                    want[:, :, row, :, lengths[row] + i] = old[:, :, row, :, 6 + path[row, i]]
            assert torch.equal(block, want)


def test_no_room_is_an_error():
    with pytest.raises(ValueError, match="at least one row"):
        StaticTreeCache(1, 1, 1, 1, 4, capacity=0, scratch=4, dtype=torch.float32, device=CPU)
    cache = StaticTreeCache(1, 1, 1, 1, 4, capacity=4, scratch=4, dtype=torch.float32, device=CPU)
    cache.base = 4
    cache.check_step(4)
    with pytest.raises(ValueError, match="more scratch"):
        cache.check_step(5)
