"""Measuring steps: rounds by the test's own clock, and captured steps on a pretended device."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch

from huggingface.transformers.generation import draft_settings, fused_step, graph_runner, step_cost
from huggingface.transformers.generation.step_cost import (
    LEAST_ROUNDS,
    MOST_ROUNDS,
    REPLAYS,
    WARMUP_ROUNDS,
    captured_step_seconds,
    interleaved_medians,
)
from huggingface.transformers.generation.tree_tuning import DraftPlan, make_plan, tune

OWN_SEED = 78
"""Models are shared between tests by seed; these get packed weights."""


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


class PretendedGraph:
    """Replays by doing the work again, and counts."""

    captured: list[PretendedGraph] = []

    def __init__(self):
        self.captured.append(self)
        self.replays = 0

    def replay(self):
        self.replays += 1


class PretendedEvent:
    """Two of them lie 8 ms apart."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        return 8.0


@pytest.fixture
def pretended_device(monkeypatch):
    """CUDA's graphs on a CPU: the steps' kernels are their references; returns the pools of the captured graphs."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    pools = []

    @contextlib.contextmanager
    def graph(captured, pool, stream):
        pools.append(pool)
        yield

    monkeypatch.setattr(PretendedGraph, "captured", [])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", PretendedGraph)
    monkeypatch.setattr(torch.cuda, "Event", PretendedEvent)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(graph_runner, "capture_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    return pools


@pytest.fixture
def steps(monkeypatch):
    """The steps that were built."""
    built, original = [], fused_step.FusedStep.__init__

    def noted(self, *args):
        original(self, *args)
        built.append(self)

    monkeypatch.setattr(fused_step.FusedStep, "__init__", noted)
    return built


def test_captured_steps_start_at_the_context_and_share_a_pool(
    make_model, pretended_device, steps, monkeypatch
):
    monkeypatch.setattr(step_cost, "MOST_ROUNDS", 1)
    model = make_model("gpt_neo", dtype=torch.float32, seed=OWN_SEED)
    plans = [DraftPlan.plain(), make_plan(model, 4, 3, 2), make_plan(model, 6, 2, 2)]
    assert captured_step_seconds(model, plans, 20, 2) == dict.fromkeys(plans, 0.008 / REPLAYS)
    assert [step.nodes for step in steps] == [6, 4, 1]  # the largest first
    assert all(step.state.lengths.tolist() == [20, 20] for step in steps)
    assert not any(step.state.finished.any() for step in steps)
    assert pretended_device == ["pool"] * 3
    assert [graph.replays for graph in PretendedGraph.captured] == [REPLAYS * (WARMUP_ROUNDS + 1)] * 3
    layers = model.__dict__["_fused_layers"]
    captured_step_seconds(model, plans[:1], 20, 1)
    assert model.__dict__["_fused_layers"] is layers  # as captured decoding keeps them


def test_a_whole_step_is_captured(make_model, pretended_device, steps, monkeypatch):
    done = []
    for phase in ("forward", "verify", "commit", "draft"):
        original = getattr(fused_step.FusedStep, phase)
        monkeypatch.setattr(
            fused_step.FusedStep,
            phase,
            lambda self, original=original, phase=phase: (done.append(phase), original(self)),
        )
    model = make_model("gpt_neo", dtype=torch.float32, seed=OWN_SEED)
    captured_step_seconds(model, [make_plan(model, 4, 3, 2)], 20, 1)
    assert done == ["forward", "verify", "commit", "draft"] * 2  # once to compile, once captured


@pytest.mark.parametrize("fields", [{}, {"pruning_rank": 3}], ids=["whole", "pruned"])
def test_real_steps_are_timed_and_draw_nothing(architecture, fields, make_model, monkeypatch):
    monkeypatch.setattr(step_cost, "MOST_ROUNDS", 1)
    model = make_model(architecture, dtype=torch.float32, seed=OWN_SEED, **fields)
    drawn = torch.get_rng_state()
    try:
        tuning = tune(model, (1, 2, 7), batch=2)
        assert [one.plan.shape.nodes for one in tuning.candidates] == [1, 2, 7]
        assert all(one.step_s > 0 for one in tuning.candidates)
        assert torch.equal(drawn, torch.get_rng_state())
    finally:
        delattr(model.generation_config, draft_settings.CONFIG_KEY)
