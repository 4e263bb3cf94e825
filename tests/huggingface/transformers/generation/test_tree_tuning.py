"""Tuning the tree: costs are the test's own, so that nothing here depends on a machine's speed."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GenerationConfig

from huggingface.transformers.generation import tree_tuning
from huggingface.transformers.generation.draft_settings import (
    CONFIG_KEY,
    DraftSettings,
    saved_settings,
    update_settings,
)
from huggingface.transformers.generation.draft_tree import TreeShape
from huggingface.transformers.generation.step_cost import REPLAYS
from huggingface.transformers.generation.tree_tuning import (
    BEAM,
    CAPTURED_SIZES,
    CAPTURED_TIE,
    SIZES,
    TRUST,
    Candidate,
    DraftPlan,
    batch_class,
    choose,
    make_plan,
    plan_for,
    setting_name,
    tune,
    tuned_nodes,
)
from huggingface.transformers.quantizers.configuration import PackedWeightsConfig

ACCURACY = [[0.8, 0.1], [0.8, 0.1], [0.8, 0.1]]
MANY_RANKS = [[0.6, 0.2, 0.1, 0.05, 0.02, 0.01]] * 3
OWN_SEED = 77
"""Models are shared between tests by seed; these get settings and packed weights."""


@pytest.fixture
def model(make_model):
    """A calibrated model whose settings are put back."""
    model = make_model("gpt_neo", dtype=torch.float32, seed=OWN_SEED)
    update_settings(model, rank_accuracy=ACCURACY, draft_nodes={})
    yield model
    delattr(model.generation_config, CONFIG_KEY)


class Costs:
    """Stands in for measuring: a step costs what `step` says of its plan; `asked` are the calls.

    Attributes:
        memory: rows of the largest step that fits.
    """

    def __init__(self):
        self.step = lambda plan: 1.0
        self.memory = 10**6
        self.asked = []

    def __call__(self, model, plans, context, batch):
        self.asked.append((list(plans), context, batch))
        if max(plan.rows for plan in plans) > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {plan: self.step(plan) for plan in plans}

    def sizes(self, call=0):
        return [plan.shape.nodes for plan in self.asked[call][0]]


@pytest.fixture
def costs(monkeypatch):
    """Costs of steps launched one by one."""
    costs = Costs()
    monkeypatch.setattr(tree_tuning, "eager_step_seconds", costs)
    return costs


@pytest.fixture
def captured(monkeypatch, model):
    """Costs of captured steps, which the model's device is said to have."""
    costs = Costs()
    monkeypatch.setattr(tree_tuning, "captures_steps", lambda model: True)
    monkeypatch.setattr(tree_tuning, "captured_step_seconds", costs)
    update_settings(model, rank_accuracy=MANY_RANKS)
    return costs


def candidate(nodes, speed, streams=3, beam=BEAM):
    """A candidate of a given speed; `nodes` 1 is plain decoding."""
    shape = TreeShape(tuple([-1] + [0] * (nodes - 1)), streams)
    plan = DraftPlan.plain() if nodes == 1 else DraftPlan(shape, beam=beam)
    return Candidate(plan, 1.0, speed)


def test_the_fastest_is_chosen():
    assert choose([candidate(1, 1.0), candidate(4, 1.2), candidate(8, 1.5)]).plan.shape.nodes == 8


def test_a_tie_goes_to_the_fewest_rows():
    def chosen(larger, streams=3):
        return choose([candidate(1, 1.0), candidate(4, 1.5, streams), candidate(8, larger)]).plan.shape.nodes

    assert chosen(1.5 * 1.01) == 4
    assert chosen(1.5 * 1.04) == 8
    assert chosen(1.5 * 1.01, streams=10) == 8  # 44 rows against 32
    tree, chain = candidate(4, 1.49), candidate(4, 1.5, beam=1)
    assert choose([candidate(1, 1.0), tree, chain]) is chain  # no smaller: the faster


def test_how_near_a_tie_is_can_be_told():
    near = [candidate(1, 1.0), candidate(4, 1.5), candidate(8, 1.5 * 1.01)]
    assert choose(near, CAPTURED_TIE).plan.shape.nodes == 8
    assert choose(near).plan.shape.nodes == 4


@pytest.mark.parametrize(("speed", "nodes"), [(0.7, 1), (1.0, 1), (1.029, 1), (1.031, 4)])
def test_plain_decoding_stays_unless_drafting_gains_three_percent(speed, nodes):
    assert choose([candidate(4, speed), candidate(1, 1.0)]).plan.shape.nodes == nodes


def test_tune_chooses_by_cost_and_keeps_the_choice(model, costs):
    flat = tune(model, (1, 2, 8))
    assert (flat.nodes, flat.entry, tuned_nodes(model)) == (8, 8, 8)
    assert (costs.sizes(), *costs.asked[0][1:]) == (
        [1, 2, 8],
        56,
        1,
    )  # 64 positions, 3 streams beyond a path of 3
    costs.step = lambda plan: float(plan.shape.nodes)
    assert tune(model, (8, 2, 1)).nodes == 1
    assert saved_settings(model)["draft_nodes"] == {setting_name(model): 1}
    assert saved_settings(model)["rank_accuracy"] == ACCURACY
    assert (plan_for(model), plan_for(model).source) == (DraftPlan.plain(), "tuned")
    assert [one.speed for one in flat.candidates[:2]] == pytest.approx([1.0, 1.8])


def test_plain_decoding_is_always_measured(model, costs):
    costs.step = lambda plan: (
        1.0 if plan.shape.nodes == 1 else 1.76
    )  # .8 more tokens a step: 1.023 times as fast
    assert tune(model, (2,)).nodes == 1
    assert costs.sizes() == [1, 2]


def test_budgets_beyond_the_largest_tree_are_one_size(model, costs):
    update_settings(model, rank_accuracy=[[0.5, 0.1]])  # a root and two children at most
    assert tune(model, (1, 2, 16, 32)).nodes == 3
    assert costs.sizes() == [1, 2, 3]


def test_default_sizes_on_a_cpu_are_small(model, costs):
    update_settings(model, rank_accuracy=[[0.5, 0.2, 0.1, 0.1]] * 3)
    tune(model)
    assert costs.sizes() == [nodes for nodes in SIZES if nodes <= 32]


def test_batches_are_tuned_as_powers_of_two(model, costs):
    assert [batch_class(batch) for batch in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]
    tuning = tune(model, (4,), batch=3)
    assert (tuning.batch, costs.asked[0][2]) == (4, 4)
    assert (tuned_nodes(model, 4), tuned_nodes(model, 2), tuned_nodes(model)) == (4, None, None)
    assert plan_for(model, batch=3).source == "tuned"
    assert plan_for(model, batch=2).source == "default"
    tune(model, (2,))
    # What was tuned for fewer sequences is better than a guess.
    assert [plan_for(model, batch=batch).shape.nodes for batch in (1, 2, 4, 32)] == [2, 2, 4, 4]


@pytest.mark.parametrize(
    "packed, label",
    [
        ({"bits": 8}, "int8"),
        ({"bits": 4}, "int4"),
        ({"bits": 4, "group_size": 128}, "int4-group128"),
        ({"bits": 4, "group_size": 32, "zero_point": True, "lm_head": "int8"}, "int4-group32-zero-head8"),
        ({"bits": 4, "group_size": 64, "modules": {"one": "plain"}}, "int4-group64-mixed"),
    ],
)
def test_packed_weights_are_tuned_on_their_own(packed, label, model, costs, monkeypatch):
    plain = setting_name(model)
    assert plain == f"cpu, {torch.get_num_threads()} threads, float32"  # as checkpoints have it
    costs.step = lambda plan: 1.0 if plan.shape.nodes in (1, 4) else 100.0
    tune(model, (4,))
    assert plan_for(model).source == "tuned"
    monkeypatch.setattr(model.config, "quantization_config", PackedWeightsConfig(**packed), raising=False)
    assert setting_name(model) == f"{plain}, {label}"
    assert setting_name(model, 3) == f"{plain}, {label}, batch 4"
    assert (plan_for(model).source, tuned_nodes(model)) == ("default", None)
    costs.step = lambda plan: 1.0 if plan.shape.nodes in (1, 2) else 100.0
    assert tune(model, (2,)).setting == f"{plain}, {label}"
    assert saved_settings(model)["draft_nodes"] == {plain: 4, f"{plain}, {label}": 2}
    assert tuned_nodes(model) == 2


def test_trees_beyond_the_memory_are_left_out(model, costs):
    costs.memory = 16
    assert [one.plan.shape.nodes for one in tune(model, (1, 4, 8, 12)).candidates] == [1, 4]
    costs.memory = 0
    with pytest.raises(torch.OutOfMemoryError):
        tune(model, (8, 12))


def test_captured_trees_have_all_streams_and_a_chain_to_beat(model, captured):
    tuning = tune(model)
    plans, context, batch = captured.asked[0]
    assert (context, batch) == (64 - 4 * (REPLAYS + 1), 1)
    trees = {plan.shape.nodes: plan.shape.streams for plan in plans if plan.beam == BEAM}
    assert trees == {2: 1, **{nodes: 3 for nodes in CAPTURED_SIZES if nodes > 2}}
    assert [(plan.shape.nodes, plan.shape.streams) for plan in plans if plan.beam == 1] == [(4, 3)]
    assert plans[0] == DraftPlan.plain()
    assert [one.plan for one in tuning.candidates if one.plan.beam == 1][0].shape.is_chain


def test_half_the_streams_are_tried_at_the_two_fastest_sizes(model, captured):
    captured.step = lambda plan: 1.0 if plan.shape.nodes in (24, 32) else 10.0
    tune(model)
    assert [(plan.shape.nodes, plan.shape.streams) for plan in captured.asked[1][0]] == [(24, 2), (32, 2)]


def test_streams_at_fewer_nodes_are_tried_at_the_two_fastest(model, captured):
    captured.step = lambda plan: 1.0 if plan.shape.nodes in (4, 24, 32) else 10.0
    tune(model)
    lighter = {(plan.shape.nodes, plan.shape.streams, plan.carriers) for plan in captured.asked[2][0]}
    assert lighter == {(32, 3, 16), (32, 3, 12), (32, 3, 8), (24, 3, 12), (24, 3, 9), (24, 3, 6)}
    assert len(captured.asked) == 3


def test_the_choice_of_captured_steps_is_saved_with_streams_and_beam(model, captured):
    captured.step = lambda plan: 0.5 * plan.shape.streams if plan.shape.nodes == 24 else 10.0
    tuning = tune(model)
    entry = {"nodes": 24, "streams": 2, "beam": BEAM}
    assert (tuning.nodes, tuning.entry) == (24, entry)
    assert saved_settings(model)["draft_nodes"] == {setting_name(model): entry}
    assert tuned_nodes(model) == 24
    assert plan_for(model) == tuning.chosen.plan
    captured.step = lambda plan: 10.0 if plan.shape.nodes != 24 else 1.0 if plan.carriers == 12 else 2.0
    tuning = tune(model)
    assert tuning.entry == {"nodes": 24, "streams": 3, "beam": BEAM, "carriers": 12}
    assert plan_for(model) == tuning.chosen.plan
    captured.step = lambda plan: 1.0 if plan.beam == 1 else 3.0 * plan.shape.nodes
    assert tune(model).entry == {"nodes": 4, "streams": 3, "beam": 1}
    assert plan_for(model).shape == TreeShape.chain(3, 3)
    captured.step = lambda plan: float(plan.shape.nodes)
    assert tune(model).entry == {"nodes": 1, "streams": 0, "beam": 1}
    assert plan_for(model) == DraftPlan.plain()


def test_larger_batches_try_smaller_trees(model, captured):
    def largest(batch):
        return max(one.plan.shape.nodes for one in tune(model, batch=batch).candidates)

    assert [largest(batch) for batch in (8, 16, 32, 64, 128, 512, 1024)] == [64, 32, 16, 8, 4, 1, 1]


def test_sizes_that_no_captured_tree_can_have_are_refused(model, captured):
    with pytest.raises(ValueError, match="at most 64 nodes, got 65"):
        tune(model, (8, 65))
    tune(model, (3,))
    assert [(plan.shape.nodes, plan.beam) for plan in captured.asked[0][0]] == [(1, None), (3, BEAM), (3, 1)]


def test_captured_trees_beyond_the_memory_are_left_out(model, captured):
    captured.memory = 40
    assert max(one.plan.shape.nodes for one in tune(model).candidates) == 8


def test_entries_are_read_old_and_new(model):
    name = setting_name(model)
    update_settings(model, rank_accuracy=MANY_RANKS, trust=0.6)
    update_settings(model, draft_nodes={name: 6, f"{name}, batch 4": {"nodes": 8, "streams": 2, "beam": 4}})
    assert (tuned_nodes(model), tuned_nodes(model, 4), tuned_nodes(model, 2)) == (6, 8, None)
    fixed, grown = plan_for(model), plan_for(model, batch=4)
    assert (fixed.shape.nodes, fixed.beam) == (6, None)
    assert (grown.shape.nodes, grown.shape.streams, grown.beam, grown.trust) == (8, 2, 4, 0.6)
    update_settings(model, draft_nodes={name: {"nodes": 8, "streams": 9}})  # of a model with more streams
    assert (plan_for(model).shape.streams, plan_for(model).beam) == (3, BEAM)
    assert plan_for(model, 5) == make_plan(model, 5, 3, None)
    assert plan_for(model, 1) == DraftPlan.plain()


def test_on_a_device_with_captured_steps_numbers_are_grown_trees_with_all_streams(model, monkeypatch):
    monkeypatch.setattr(tree_tuning, "_default_beam", lambda model: BEAM)
    update_settings(model, rank_accuracy=MANY_RANKS, draft_nodes={setting_name(model): 20})  # an old entry
    for plan in (plan_for(model, 20), plan_for(model)):
        assert (plan.shape.nodes, plan.shape.streams, plan.beam, plan.trust) == (20, 3, BEAM, TRUST)
    assert plan_for(model, 2).shape == TreeShape((-1, 0), 1)  # deeper than one node needs no stream
    assert plan_for(model, 20, batch=64).shape.nodes == 20
    sizes = [plan_for(model, batch=batch).shape.nodes for batch in (16, 32, 512, 2000)]
    assert sizes == [20, 16, 1, 1]  # tuned for one sequence, cut to what a large batch bears


def test_carriers_are_some_of_the_nodes(model):
    shape = TreeShape((-1, 0, 0), 1)
    assert [DraftPlan(shape, carriers=carriers).rows for carriers in (1, 2, 3, None)] == [4, 5, 6, 6]
    for carriers in (0, -3, 4):
        with pytest.raises(ValueError, match=f"some of the tree's 3 nodes, got {carriers}"):
            DraftPlan(shape, carriers=carriers)
    assert make_plan(model, 9, 3, 1, carriers=8).carriers is None  # a chain of 4 nodes
    assert make_plan(model, 9, 3, BEAM, carriers=5).carriers == 5


def test_a_grown_tree_counts_no_more_children_than_its_beam(model):
    update_settings(model, rank_accuracy=[[0.3, 0.2, 0.2, 0.1]])
    assert make_plan(model, 9, 1, 2).shape.nodes == 3


def test_plans_that_differ_in_their_source_alone_are_equal(model):
    assert make_plan(model, 5, 3, 4, "given") == make_plan(model, 5, 3, 4, "tuned")
    assert hash(make_plan(model, 5, 3, 4, "given")) == hash(make_plan(model, 5, 3, 4, "tuned"))
    assert make_plan(model, 5, 3, 4) != make_plan(model, 5, 3, 2)


def test_settings_are_shared_by_copies_and_saved_as_they_are(tmp_path):
    config = GenerationConfig(**{CONFIG_KEY: DraftSettings(rank_accuracy=[[0.5, 0.25]], trust=0.5)})
    assert getattr(copy.deepcopy(config), CONFIG_KEY) is getattr(config, CONFIG_KEY)
    config.save_pretrained(tmp_path)
    saved = getattr(GenerationConfig.from_pretrained(tmp_path), CONFIG_KEY)
    assert saved == {"rank_accuracy": [[0.5, 0.25]], "trust": 0.5}
