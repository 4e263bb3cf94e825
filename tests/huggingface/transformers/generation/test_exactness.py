"""Greedy output equals ordinary decoding of the same weights, whatever is drafted (gates G1, G2, G9)."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from huggingface.transformers.cache_utils import StaticTreeCache
from huggingface.transformers.generation import decode_step as step_module
from huggingface.transformers.generation.draft_tree import TreeShape
from huggingface.transformers.generation.tree_tuning import DraftPlan

VOCAB = 13
EOS = 0
LIMIT = 64


@functools.lru_cache(maxsize=100_000)
def _reference(stock, prompt: tuple[int, ...], length: int) -> tuple[int, ...]:
    """Returns upstream's greedy continuation of one prompt, EOS included."""
    if length == 0:
        return ()
    ids = torch.tensor([prompt])
    out = stock.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, pad_token_id=EOS
    )
    return tuple(out[0, len(prompt) :].tolist())


def _batch(prompts: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    ids, masks = [], []
    for prompt in prompts:
        pad = [EOS] * (longest - len(prompt))
        on, off = [1] * len(prompt), [0] * len(pad)
        ids.append(pad + prompt if side == "left" else prompt + pad)
        masks.append(off + on if side == "left" else on + off)
    return torch.tensor(ids), torch.tensor(masks)


def _decode(model, prompts, length, side="left", **options):
    ids, mask = _batch(prompts, side)
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=length,
        do_sample=False,
        pad_token_id=EOS,
        return_dict_in_generate=True,
        **options,
    )
    rows = [row[ids.shape[1] :] for row in out.sequences.tolist()]
    return [_until_eos(row) for row in rows], out.statistics


def _until_eos(row: list[int]) -> tuple[int, ...]:
    return tuple(row[: row.index(EOS) + 1] if EOS in row else row)


@st.composite
def shapes(draw) -> TreeShape:
    """Any tree of up to 10 nodes and at most 3 deep, duplicate depths and skewed branches included."""
    parents, depths = [-1], [0]
    for node in range(1, draw(st.integers(1, 10))):
        parent = draw(st.integers(0, node - 1).filter(lambda p: depths[p] < 3))
        parents.append(parent)
        depths.append(depths[parent] + 1)
    return TreeShape(tuple(parents), max(depths))


prompt = st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=LIMIT - 1)
short_prompt = st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=14)
CASES = settings(max_examples=140, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_any_tree_any_prompt(architecture, implementation, make_model, make_stock):
    """G1: random trees, ragged batches padded on either side, EOS anywhere, up to the last position."""
    model = make_model(architecture, implementation=implementation)
    stock = make_stock(model)

    @CASES
    @given(st.lists(short_prompt, min_size=1, max_size=4), shapes(), st.integers(0, 12), st.booleans())
    def check(prompts, shape, length, left):
        if left is False and length == 0:
            return
        got, statistics = (
            _decode(model, prompts, length, "left" if left else "right", plan=DraftPlan(shape))
            if length
            else ([()] * len(prompts), None)
        )
        assert got == [_reference(stock, tuple(p), length) for p in prompts]
        if statistics is not None:
            _check_accounting(statistics, got, shape)

    check()


def _check_accounting(statistics, got, shape) -> None:
    """G8: what the steps say they emitted is what came out after the first token."""
    for row, tokens in enumerate(got):
        assert sum(step.emitted[row] for step in statistics.steps) == len(tokens) - 1
    for step in statistics.steps:
        assert step.rows <= shape.rows
        for emitted, accepted in zip(step.emitted, step.accepted, strict=True):
            assert 0 <= emitted <= accepted + 1 <= shape.depth + 1


@pytest.mark.parametrize("pruning", [0, 3])
def test_up_to_the_last_position(architecture, pruning, make_model, make_stock):
    """The tree shrinks near the position limit and decoding ends there (I02, I03); also with pruned trees."""
    model = make_model(architecture, pruning_rank=pruning)
    stock = make_stock(model)

    @settings(CASES, max_examples=70)
    @given(prompt, shapes())
    def check(tokens, shape):
        keep = max(1, shape.nodes // 2) if pruning else None
        length = LIMIT - len(tokens)
        got, statistics = _decode(model, [tokens], 2 * LIMIT, plan=DraftPlan(shape, keep))
        assert got == [_reference(stock, tuple(tokens), length)]
        assert statistics.finish_reasons[0] == ("eos" if got[0][-1] == EOS else "limit")

    check()


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_degenerate_drafts(architecture, ratio, make_model, make_stock):
    """G2: with always-right drafts the steps are as few as can be, with always-wrong ones each emits one token."""
    model = make_model(architecture)
    stock = make_stock(model)
    for seed in range(10):
        tokens = random.Random(seed).choices(range(1, VOCAB), k=5)
        known = _reference(stock, tuple(tokens), 20)
        for depth in (1, 2, 3):
            shape = TreeShape.chain(depth, depth)
            got, statistics = _decode(
                model,
                [tokens],
                20,
                plan=DraftPlan(shape),
                acceptance_ratio=ratio,
                known_tokens=[list(known)],
            )
            assert got == [known]
            reach = depth + 1 if ratio else 1
            assert len(statistics.steps) == -(-(len(known) - 1) // reach)


def test_tree_of_one_node_and_no_drafts(architecture, make_model, make_stock):
    model = make_model(architecture)
    stock = make_stock(model)
    for options in ({"drafts": "none"}, {"draft_nodes": 1}):
        got, statistics = _decode(model, [[3, 4, 5], [7]], 15, **options)
        assert got == [_reference(stock, p, 15) for p in ((3, 4, 5), (7,))]
        assert statistics.acceptance_length in (None, 1.0)


def test_exact_ties_go_to_the_lowest_id(architecture, make_model):
    """S03: with all logits equal both paths emit token 0."""
    model = make_model(architecture, seed=5)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.get_output_embeddings().weight.data.zero_()
    try:
        for options in ({"drafts": "none"}, {"draft_nodes": 6}):
            got, _ = _decode(model, [[3, 4]], 5, eos_token_id=None, **options)
            assert got == [(0,)]
    finally:
        model.load_state_dict(state)


class _BrokenCommit:
    """Copies the rows of the step's first nodes instead of those of the accepted path."""

    def __call__(self, cache, paths_below, paths_above, lengths):
        order = torch.arange(paths_below.shape[1]).expand_as(paths_below)
        StaticTreeCache.__dict__["_real_commit"](cache, order, order, lengths)


def _mismatches(model, stock) -> int:
    wrong = 0
    shape = TreeShape((-1, 0, 0, 0, 1, 2, 2, 3), 2)
    for seed in range(40):
        tokens = random.Random(seed).choices(range(1, VOCAB), k=9)
        got, _ = _decode(model, [tokens], 14, plan=DraftPlan(shape))
        wrong += got != [_reference(stock, tuple(tokens), 14)]
    return wrong


@pytest.mark.parametrize("fault", ["mask", "position", "commit"])
def test_the_gate_sees_broken_code(architecture, fault, make_model, make_stock, monkeypatch):
    """G9, S13: break masks, positions or the commit on purpose, and the comparison above must fail."""
    model = make_model(architecture)
    stock = make_stock(model)
    assert _mismatches(model, stock) == 0
    if fault == "mask":
        original = step_module.visible_in_step
        monkeypatch.setattr(
            step_module,
            "visible_in_step",
            lambda block, *args: original(torch.ones_like(block).tril(), *args),
        )
    elif fault == "position":
        original_below = model.run_below
        monkeypatch.setattr(
            model,
            "run_below",
            lambda tokens, positions, *args: original_below(tokens, (positions - 1).clamp(min=0), *args),
        )
        original_above = model.run_above
        monkeypatch.setattr(
            model,
            "run_above",
            lambda hidden, positions, *args, **kw: original_above(
                hidden, (positions - 1).clamp(min=0), *args, **kw
            ),
        )
    else:
        monkeypatch.setattr(StaticTreeCache, "_real_commit", StaticTreeCache.commit, raising=False)
        broken = _BrokenCommit()
        monkeypatch.setattr(StaticTreeCache, "commit", lambda *args: broken(*args))
    assert _mismatches(model, stock) > 0
