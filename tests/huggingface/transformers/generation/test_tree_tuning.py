"""Tuning the tree: costs and clock are the test's own, so that nothing here depends on a machine's speed."""

from __future__ import annotations

import itertools

import pytest
import torch

from huggingface.transformers.generation import tree_tuning
from huggingface.transformers.generation.tree_tuning import (
    LEAST_ROUNDS,
    MOST_ROUNDS,
    SIZES,
    WARMUP_ROUNDS,
    batch_class,
    choose_tree,
    interleaved_medians,
    plan_for,
    saved_settings,
    setting_name,
    tune,
    tuned_nodes,
    update_settings,
)

ACCURACY = [[0.8, 0.1], [0.8, 0.1], [0.8, 0.1]]
OWN_SEED = 77
"""Models are shared between tests by seed; these get settings and packed weights."""


class FakeClock:
    """Passes as much time a step as the test says."""

    def __init__(self, step_s: float):
        self.now = 0.0
        self.step_s = step_s

    def __call__(self) -> float:
        return self.now

    def step(self, nodes: int) -> float:
        self.now += self.step_s
        return float(nodes)


@pytest.fixture
def model(make_model):
    """A calibrated model whose settings are put back."""
    model = make_model("gpt_neo", dtype=torch.float32, seed=OWN_SEED)
    update_settings(model, rank_accuracy=ACCURACY, draft_nodes={})
    yield model
    delattr(model.generation_config, tree_tuning.CONFIG_KEY)


@pytest.fixture
def costs(monkeypatch):
    """Steps cost what the function in the list says; each call of `measure_steps` is noted behind it."""
    told = [lambda nodes: 1.0]

    def measured(model, shapes, context, batch):
        told.append((sorted(shapes), context, batch))
        return {nodes: told[0](nodes) for nodes in shapes}

    monkeypatch.setattr(tree_tuning, "measure_steps", measured)
    return told


def test_sizes_take_turns_and_a_busy_moment_meets_all_of_them():
    order = []

    def step(nodes):
        order.append(nodes)
        busy = 24 <= len(order) < 33  # three whole rounds
        return nodes * (50.0 if busy else 1.0)

    assert interleaved_medians([1, 2, 4], step, FakeClock(0.0)) == {1: 1.0, 2: 2.0, 4: 4.0}
    assert order == [1, 2, 4] * (WARMUP_ROUNDS + MOST_ROUNDS)


def test_first_rounds_do_not_count():
    turns = itertools.count()
    cold = WARMUP_ROUNDS * 2
    assert interleaved_medians([1, 2], lambda nodes: 9.0 if next(turns) < cold else 1.0) == {1: 1.0, 2: 1.0}


@pytest.mark.parametrize(
    ("step_s", "rounds"),
    [(0.0, MOST_ROUNDS), (0.25, 7), (60.0, LEAST_ROUNDS)],
    ids=["fast", "slow", "slowest"],
)
def test_slow_models_get_fewer_rounds(step_s, rounds):
    clock = FakeClock(step_s)
    steps = []

    def step(nodes):
        steps.append(nodes)
        return clock.step(nodes)

    interleaved_medians([1, 2], step, clock)
    assert len(steps) == 2 * (WARMUP_ROUNDS + rounds)


def test_a_tie_goes_to_the_smaller_tree():
    """One node more is worth .8 more tokens of 1: the second size is 1 % and then 4 % faster."""
    assert choose_tree(ACCURACY, {1: 1.0, 2: 1.8 / 1.01}, 3)[0].nodes == 1
    assert choose_tree(ACCURACY, {1: 1.0, 2: 1.8 / 1.04}, 3)[0].nodes == 2


def test_tune_chooses_by_cost_and_keeps_the_choice(model, costs):
    flat = tune(model, (1, 2, 8))
    assert (flat.nodes, tuned_nodes(model)) == (8, 8)
    assert costs[1] == ([1, 2, 8], 56, 1)  # 64 positions, room for 3 streams beyond a path of 3
    costs[0] = lambda nodes: float(nodes)
    assert tune(model, (8, 2, 1)).nodes == 1
    assert saved_settings(model)["draft_nodes"] == {setting_name(model): 1}
    assert saved_settings(model)["rank_accuracy"] == ACCURACY
    assert (plan_for(model).shape.nodes, plan_for(model).source) == (1, "tuned")
    assert flat.speeds() == pytest.approx({1: 1.0, 2: 1.8, 8: flat.tokens_per_step[8]})


def test_budgets_beyond_the_largest_tree_are_one_size(model, costs):
    update_settings(model, rank_accuracy=[[0.5, 0.1]])  # a root and two children at most
    assert tune(model, (1, 2, 16, 32)).nodes == 3
    assert costs[1][0] == [1, 2, 3]


def test_default_sizes_on_a_cpu_are_small(model, costs):
    update_settings(model, rank_accuracy=[[0.5, 0.2, 0.1, 0.1]] * 3)
    tune(model)
    assert costs[1][0] == [nodes for nodes in SIZES if nodes <= 32]


def test_batches_are_tuned_as_powers_of_two(model, costs):
    assert [batch_class(batch) for batch in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]
    tuning = tune(model, (4,), batch=3)
    assert (tuning.batch, costs[1][2]) == (4, 4)
    assert (tuned_nodes(model, 4), tuned_nodes(model, 2), tuned_nodes(model)) == (4, None, None)
    assert plan_for(model, batch=3).source == "tuned"
    assert plan_for(model, batch=2).source == "default"
    tune(model, (2,))
    assert plan_for(model, batch=2).shape.nodes == 2  # better than a guess


def test_sizes_beyond_the_memory_are_left_out(model, monkeypatch):
    def measured(model, shapes, context, batch):
        if max(shapes) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return dict.fromkeys(shapes, 1.0)

    monkeypatch.setattr(tree_tuning, "measure_steps", measured)
    assert tune(model, (1, 4, 8, 12)).step_s == {1: 1.0, 4: 1.0}
    with pytest.raises(torch.OutOfMemoryError):
        tune(model, (8, 12))


@pytest.mark.parametrize("fields", [{}, {"pruning_rank": 3}], ids=["whole", "pruned"])
def test_real_steps_are_timed_and_draw_nothing(architecture, fields, make_model, monkeypatch):
    monkeypatch.setattr(tree_tuning, "MOST_ROUNDS", 1)
    model = make_model(architecture, dtype=torch.float32, seed=OWN_SEED, **fields)
    drawn = torch.get_rng_state()
    try:
        tuning = tune(model, (1, 2, 7), batch=2)
        assert set(tuning.step_s) == {1, 2, 7}
        assert all(seconds > 0 for seconds in tuning.step_s.values())
        assert torch.equal(drawn, torch.get_rng_state())
    finally:
        delattr(model.generation_config, tree_tuning.CONFIG_KEY)
