"""Sampling draws from the target's own distribution (gate G5)."""

from __future__ import annotations

import math

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

from huggingface.transformers.generation.draft_tree import DraftTree, TreeShape
from huggingface.transformers.generation.tree_tuning import DraftPlan
from huggingface.transformers.generation.verification import Rule, verify

DRAWS = 200_000


def _p_value(observed: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Returns the chi-square p-value by the Wilson-Hilferty approximation; cells under 5 expected counts are pooled."""
    expected = probabilities * observed.sum()
    big = expected >= 5
    cells = [(observed[big] - expected[big]) ** 2 / expected[big]]
    rest = expected[~big].sum()
    freedom = int(big.sum()) - 1
    if rest >= 5:
        cells.append(((observed[~big].sum() - rest) ** 2 / rest)[None])
        freedom += 1
    statistic = float(torch.cat(cells).sum())
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


def _two_token_counts(target, tree: DraftTree, rule: Rule) -> torch.Tensor:
    """Returns an (8, 8) histogram of the first two tokens of 200k steps; where a step ends after one, the second is drawn."""
    path_tokens = [
        [int(tree.tokens[0, at]) for at in tree.shape.path(n)[1:]] for n in range(tree.shape.nodes)
    ]
    logits = torch.stack([target(tuple(path)) for path in path_tokens])
    scores = rule.scores(logits[None], [])
    chosen = rule.pick(scores.expand(DRAWS, -1, -1))
    tokens = tree.tokens.expand(DRAWS, -1)
    got = verify(chosen, DraftTree(tree.shape, tokens))
    first = got.tokens[:, 0]
    following = torch.stack([target((t,)) for t in range(8)])[first][:, None]
    fresh = rule.pick(rule.scores(following, []))[:, 0]
    second = torch.where(got.counts > 1, got.tokens[:, 1], fresh)
    return torch.bincount(first * 8 + second, minlength=64).view(8, 8)


def _target(path: tuple[int, ...]) -> torch.Tensor:
    """An 8-token language whose next token depends on all before."""
    seed = sum((token + 1) * 11**i for i, token in enumerate(path))
    return torch.randn(8, generator=torch.Generator().manual_seed(seed)) * 1.2


def _want(rule: Rule) -> torch.Tensor:
    first = rule.scores(_target(())[None, None], [])[0, 0].softmax(-1)
    rows = [rule.scores(_target((token,))[None, None], [])[0, 0].softmax(-1) for token in range(8)]
    return first[:, None] * torch.stack(rows)


def test_a_tree_leaves_the_distribution_alone():
    torch.manual_seed(0)
    tree = DraftTree(TreeShape((-1, 0, 0, 1, 1, 2)), torch.tensor([[0, 3, 5, 1, 6, 2]]))
    rule = Rule(LogitsProcessorList(), do_sample=True)
    counts = _two_token_counts(_target, tree, rule)
    assert _p_value(counts.flatten().double(), _want(rule).flatten().double()) > 1e-4


def test_a_biased_rule_is_found_out():
    """The test above can fail: following a child whether or not the target picked it shows at once."""
    torch.manual_seed(0)
    tree = DraftTree(TreeShape((-1, 0, 0)), torch.tensor([[0, 3, 5]]))
    rule = Rule(LogitsProcessorList(), do_sample=True)
    counts = _two_token_counts(_target, tree, rule)
    counts[3] += 2_000
    counts[0] -= 2_000
    assert _p_value(counts.flatten().double(), _want(rule).flatten().double()) < 1e-4


def test_temperature_and_top_k_hold_on_a_tree():
    torch.manual_seed(0)
    rule = Rule(LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(3)]), do_sample=True)
    tree = DraftTree(TreeShape((-1, 0, 0, 1, 2)), torch.tensor([[0, 3, 5, 1, 6]]))
    counts = _two_token_counts(_target, tree, rule)
    want = _want(rule)
    assert int(counts[want == 0].sum()) == 0
    assert _p_value(counts.flatten().double(), want.flatten().double()) > 1e-4


def test_whole_loop_draws_from_the_target(architecture, make_model):
    """End to end: two sampled tokens against their exact joint distribution."""
    model = make_model(architecture, dtype=torch.float32, vocab_size=8)
    prompt = torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        first = model(prompt).logits[0, -1].softmax(-1)
        rows = [
            model(torch.cat([prompt, torch.tensor([[t]])], dim=1)).logits[0, -1].softmax(-1) for t in range(8)
        ]
    want = first[:, None] * torch.stack(rows)
    torch.manual_seed(1)
    counts = torch.zeros(64)
    plan = DraftPlan(TreeShape((-1, 0, 0, 1), 2))
    for _ in range(10):
        out = model.generate(
            prompt.repeat(2000, 1),
            attention_mask=torch.ones(2000, 3),
            do_sample=True,
            top_k=0,
            max_new_tokens=3,
            min_new_tokens=0,
            eos_token_id=99,
            pad_token_id=0,
            plan=plan,
        )
        counts += torch.bincount(out[:, 3] * 8 + out[:, 4], minlength=64)
    assert _p_value(counts.double(), want.flatten().double()) > 1e-4


def test_a_tiny_temperature_is_greedy(architecture, make_model):
    model = make_model(architecture)
    prompt = torch.tensor([[3, 1, 4]])
    options = {"attention_mask": torch.ones(1, 3), "max_new_tokens": 12, "pad_token_id": 0, "draft_nodes": 8}
    cold = model.generate(prompt, do_sample=True, temperature=1e-4, **options)
    assert torch.equal(cold, model.generate(prompt, do_sample=False, **options))


def test_p_value_by_enumeration():
    """The approximation against a case with a known tail: chi-square 6.63 with one degree of freedom has p = 0.01."""
    n = 10_000
    shift = math.sqrt(6.635 * n / 4)
    observed = torch.tensor([n / 2 + shift, n / 2 - shift])
    p = _p_value(observed.double(), torch.tensor([0.5, 0.5]).double())
    assert abs(p - 0.01) < 0.002
