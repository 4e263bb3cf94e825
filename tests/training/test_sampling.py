from __future__ import annotations

import numpy as np
import pytest
import torch

from training.sampling import LengthGroupedSampler, RowBudgetSampler, WeightedDraw


def sampler(weights=(1.0, 1.0), seed=0, group=4) -> LengthGroupedSampler:
    lengths = np.random.default_rng(1).integers(5, 200, size=400)
    set_ids = np.repeat([0, 1], 200)
    return LengthGroupedSampler(WeightedDraw(seed, np.array(weights)[set_ids], set_ids), lengths, group)


def test_an_epoch_holds_every_example_once():
    assert sorted(sampler()) == list(range(400))


def test_groups_are_of_like_length():
    drawn = sampler()
    order = np.array(list(drawn)).reshape(-1, 4)
    spread = np.ptp(drawn.lengths[order], axis=1).mean()
    assert spread < 10  # 78 if drawn at random


def test_the_longest_group_comes_first():
    drawn = sampler()
    assert drawn.lengths[next(iter(drawn))] == drawn.lengths.max()


def test_order_depends_on_seed_and_epoch_alone():
    one, two = sampler(), sampler()
    assert list(one) == list(two)
    torch.manual_seed(5)
    np.random.seed(5)
    assert list(one) == list(two)
    two.set_epoch(1)
    assert list(one) != list(two)
    assert list(one) != list(sampler(seed=1))


def test_weights_repeat_a_set():
    drawn = sampler(weights=(2.5, 0.5))
    order = np.array(list(drawn))
    assert len(order) == len(drawn) == 600
    counts = np.bincount(order, minlength=400)
    assert set(counts[:200].tolist()) == {2, 3}
    assert counts[:200].sum() == 500
    assert counts[200:].sum() == 100


ROWS = 2000
STREAM_COST = 1.5


def budget_sampler(weights=(1.0, 1.0), seed=0, rows=ROWS, devices=1) -> RowBudgetSampler:
    random = np.random.default_rng(1)
    lengths = random.integers(5, 200, size=400)
    anchors = np.minimum(random.integers(0, 60, size=400), lengths - 2)
    set_ids = np.repeat([0, 1], 200)
    draw = WeightedDraw(seed, np.array(weights)[set_ids], set_ids)
    return RowBudgetSampler(draw, lengths, anchors, STREAM_COST, rows, devices)


def cost(drawn: RowBudgetSampler, batch) -> float:
    indices = list(batch)
    return len(indices) * (drawn.lengths[indices].max() + STREAM_COST * drawn.anchors[indices].max())


def test_batches_keep_the_budget_and_hold_every_example_once():
    drawn = budget_sampler()
    batches = list(drawn)
    assert sorted(index for batch in batches for index in batch) == list(range(400))
    assert max(cost(drawn, batch) for batch in batches) <= ROWS


def test_batches_are_as_full_as_they_can_be():
    drawn = budget_sampler()
    useful = (drawn.lengths + STREAM_COST * drawn.anchors).sum()
    assert useful > 0.8 * sum(cost(drawn, batch) for batch in drawn)


def test_an_example_above_the_budget_is_a_batch_of_its_own():
    drawn = budget_sampler(rows=30)
    large = [batch for batch in drawn if cost(drawn, batch) > 30]
    assert large
    assert all(len(batch) == 1 for batch in large)


def test_the_longest_batch_comes_first():
    drawn = budget_sampler()
    assert drawn.lengths[list(next(iter(drawn)))].max() == drawn.lengths.max()


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_every_epoch_has_the_same_number_of_batches_and_an_order_of_its_own(epoch):
    one, two = budget_sampler(weights=(1.0, 0.5)), budget_sampler(weights=(1.0, 0.5))
    first = list(one)
    one.set_epoch(epoch)
    two.set_epoch(epoch)
    assert list(one) == list(two) != first
    assert len(list(one)) == len(first) == len(one)


def test_batches_of_one_step_cost_alike_on_all_devices():
    drawn = budget_sampler(devices=2)
    batches = list(drawn)
    assert len(batches) % 2 == 0
    pairs = [
        (max(drawn.lengths[list(a)]), max(drawn.lengths[list(b)]))
        for a, b in zip(batches[::2], batches[1::2], strict=True)
    ]
    assert np.median([abs(a - b) for a, b in pairs]) < 20  # 60 if drawn at random


def test_batches_depend_on_seed_alone():
    assert list(budget_sampler()) == list(budget_sampler())
    assert list(budget_sampler()) != list(budget_sampler(seed=1))
