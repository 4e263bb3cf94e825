"""What captured decoding notices of a model between two calls."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from huggingface.transformers.generation.draft_tree import TreeShape
from huggingface.transformers.generation.graph_runner import release_runners
from huggingface.transformers.generation.tree_tuning import DraftPlan
from huggingface.transformers.models.spec_stream.fused_layers import fused_layers_of
from huggingface.transformers.models.spec_stream.model_state import state_of, weights_of
from tests.architectures import with_heads_of
from tests.huggingface.transformers.generation import host_runner

IDS = torch.tensor([[3, 1, 4, 1, 5]])
GROWN = DraftPlan(TreeShape((-1, 0, 0, 0), 3), beam=4)


@pytest.fixture
def fresh(make_model):
    """Returns `fresh(architecture, **fields)`: a model of one's own."""
    return lambda *args, **fields: copy.deepcopy(make_model(*args, **fields))


@pytest.fixture
def model(architecture, fresh):
    """Heads of a size that the kernels know."""
    return fresh(architecture, **with_heads_of(architecture, 16))


def generate(model, **options):
    mask = torch.ones_like(IDS)
    return model.generate(
        IDS, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0, **options
    )


def test_every_write_to_the_streams_is_noticed(architecture, fresh):
    """Whichever parameter; captured steps and laid out weights are told apart by it."""
    model = fresh(architecture)
    model.streams.register_parameter("none", None)
    model.streams.register_module("nothing", None)
    seen = {weights_of(model)}
    for count, parameter in enumerate(model.streams.parameters(), start=2):
        with torch.no_grad():
            parameter.mul_(1.5)
        seen.add(weights_of(model))
        assert len(seen) == count
    assert weights_of(model.float()) not in seen


@pytest.mark.parametrize("what", ["parameter", "data", "module", "head", "cast"])
def test_replaced_weights_are_noticed(model, what):
    before = weights_of(model)
    assert weights_of(model) == before
    name = model.layer_names.contract
    layer = model.decoder_layers()[2]
    linear = layer.get_submodule(name)
    if what == "parameter":
        linear.weight = nn.Parameter(linear.weight.detach().clone())
    elif what == "data":
        linear.weight.data = linear.weight.detach().clone()
    elif what == "module":
        *path, last = name.split(".")
        setattr(layer.get_submodule(".".join(path)), last, copy.deepcopy(linear))
    elif what == "head":
        model.set_output_embeddings(copy.deepcopy(model.get_output_embeddings()))
    else:
        model.float()
    after = weights_of(model)
    assert after != before
    assert weights_of(model) == after


def test_laying_weights_out_is_no_change(model):
    before = weights_of(model)
    layers = fused_layers_of(model)
    assert weights_of(model) == before
    assert fused_layers_of(model) is layers


def test_replaced_weights_are_what_the_next_call_decodes_with(model, monkeypatch):
    host_runner.use_host_runner(monkeypatch)
    generate(model, plan=GROWN)
    for index in range(4):
        for name in (model.layer_names.output, model.layer_names.contract):
            linear = model.decoder_layers()[index].get_submodule(name)
            torch.manual_seed(index)
            linear.weight = nn.Parameter(torch.randn_like(linear.weight))
    want = generate(model, drafts="none", capture=False)
    assert torch.equal(generate(model, plan=GROWN), want)


@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_hooks_are_a_reason_but_the_streams_own(model, kind):
    assert state_of(model).reason is None
    part = model.decoder_layers()[1]
    add = part.register_forward_hook if kind == "forward" else part.register_forward_pre_hook
    handle = add(lambda *args: None)
    assert "would not call the hook" in state_of(model).reason
    handle.remove()
    assert state_of(model).reason is None
    # One of the streams' own gives way to another: as many as before.
    hooks = next(m._forward_hooks for m in model.decoder_layers()[-1].modules() if m._forward_hooks)
    hooks.popitem()
    add(lambda *args: None)
    assert "would not call the hook" in state_of(model).reason


def test_what_upstream_leaves_behind_is_none(model):
    """A forward pass that is asked for hidden states puts hooks on the layers, which stay."""
    model(IDS, output_hidden_states=True)
    assert state_of(model).reason is None


def test_a_hook_that_moves_weights_is_a_reason(model):
    """As accelerate leaves them on modules that it wraps."""
    model.get_output_embeddings()._hf_hook = object()
    assert "would not call the hook" in state_of(model).reason


def test_weights_on_several_devices_are_a_reason(model):
    model.get_input_embeddings().weight = nn.Parameter(torch.empty(13, 16, device="meta"))
    assert state_of(model).reason == "the model's weights are on cpu and meta"


def test_a_copy_has_a_state_of_its_own(model):
    number = state_of(model).number
    assert state_of(copy.deepcopy(model)).number != number
    assert state_of(pickle.loads(pickle.dumps(model))).number != number  # noqa: S301 - our own bytes
    assert state_of(model).number == number


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class UnheldRunner(host_runner.HostRunner):
    """Its graphs hold no buffers, as those of a device do not."""

    def _capture(self, work):
        work()
        return super()._capture(lambda: None)


def _runner(model):
    from transformers import LogitsProcessorList

    from huggingface.transformers.generation import graph_runner
    from huggingface.transformers.generation.verification import Rule

    rule = Rule(LogitsProcessorList())
    return graph_runner.runner_for(model, graph_runner.geometry_of(model, 1, 5, 9, GROWN, rule, False), rule)


@pytest.fixture
def unheld(monkeypatch):
    host_runner.use_host_runner(monkeypatch)
    monkeypatch.setattr(host_runner.graph_runner, "GraphRunner", UnheldRunner)


@torch.no_grad()
def test_released_runners_and_dead_models_leave_nothing(fresh, unheld, no_collector):
    """Without waiting for the garbage collector: the next model wants the memory now."""
    model = fresh("llama")
    runner = _runner(model)
    left = [
        weakref.ref(one) for one in (runner, runner.step_buffers.cache.below, model.__dict__["_fused_layers"])
    ]
    del runner
    release_runners(model)
    assert [one() for one in left] == [None] * 3
    runner = _runner(model)
    left = [weakref.ref(one) for one in (runner.step_buffers.cache.below, model.lm_head.weight)]
    del runner, model
    assert [one() for one in left] == [None] * 2


@torch.no_grad()
def test_a_model_that_moves_lets_go_of_what_was_captured(fresh, unheld):
    model = fresh("llama")
    _runner(model)
    model.float()
    assert "_graph_runners" not in model.__dict__
    assert "_fused_layers" not in model.__dict__


@torch.no_grad()
def test_runners_of_other_weights_are_dropped(fresh, unheld):
    model = fresh("llama")
    first, layers = _runner(model), model.__dict__["_fused_layers"]
    model.streams.embedding.weight.add_(0.5)
    second = _runner(model)
    assert list(model.__dict__["_graph_runners"].values()) == [second]
    assert second is not first
    assert model.__dict__["_fused_layers"] is layers


@pytest.mark.parametrize("captured", [False, True])
def test_inference_mode_may_come_and_go(fresh, captured, monkeypatch):
    if captured:
        host_runner.use_host_runner(monkeypatch)
    model = fresh("llama")
    plan = GROWN if captured else DraftPlan(TreeShape((-1, 0, 0, 1), 3))
    want = generate(model, drafts="none", capture=False)
    with torch.inference_mode():
        assert torch.equal(generate(model, plan=plan), want)
    assert torch.equal(generate(model, plan=plan), want)


@pytest.mark.parametrize("captured", [False, True])
def test_a_model_made_in_inference_mode_decodes(fresh, captured, monkeypatch):
    if captured:
        host_runner.use_host_runner(monkeypatch)
    want = generate(fresh("llama"), drafts="none")
    with torch.inference_mode():
        model = fresh("llama")
    plan = GROWN if captured else DraftPlan(TreeShape((-1, 0, 0, 1), 3))
    for _ in range(2):
        assert torch.equal(generate(model, plan=plan), want)
