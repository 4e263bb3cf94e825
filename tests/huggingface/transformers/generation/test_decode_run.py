"""Which run a call of `generate` gets, and what it says of why."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from huggingface.transformers.generation import decode_run
from huggingface.transformers.generation.decode_run import (
    CapturedRun,
    DecodeOptions,
    DecodeRun,
    EagerRun,
    start_run,
)
from huggingface.transformers.generation.draft_tree import TreeShape
from huggingface.transformers.generation.tree_tuning import DraftPlan
from huggingface.transformers.generation.verification import Rule
from huggingface.transformers.quantizers.configuration import PackedWeightsConfig

from .host_runner import HostRunner, use_host_runner

PROMPT = torch.tensor([[3, 1, 4, 1, 5]])
TREE = DraftPlan(TreeShape((-1, 0, 0, 1), 2), beam=8)


@pytest.fixture
def own(make_model):
    """Returns `own(architecture)`: a model that no other test sees."""
    return lambda *args, **fields: copy.deepcopy(make_model(*args, **fields))


@pytest.fixture
def captured(own, architecture, monkeypatch):
    """A model whose `generate` takes the captured path on a CPU."""
    use_host_runner(monkeypatch)
    return own(architecture)


def generate(model, prompt=PROMPT, **more):
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": 99, **more}
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, return_dict_in_generate=True, **options)


class _OnCuda:
    """A model that says it is on a GPU; enough to start a run, which reads no weight."""

    device = torch.device("cuda")

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)


def start(model, config: GenerationConfig | None = None, **options) -> DecodeRun:
    """Returns the run of a call with these options; no step of it."""
    config = config or GenerationConfig(max_length=12, eos_token_id=99, pad_token_id=0)
    rule = Rule(LogitsProcessorList())
    given = DecodeOptions(**{"plan": TREE, **options})
    return start_run(model, PROMPT, None, config, StoppingCriteriaList(), given, rule)


def test_a_cpu_runs_eagerly_and_that_is_no_fallback(architecture, own):
    statistics = generate(own(architecture)).statistics
    assert (statistics.runner, statistics.fallbacks) == ("eager", [])
    assert (statistics.capture_s, statistics.capture_bytes) == (0.0, 0)


def test_on_a_gpu_the_reason_is_recorded(own, monkeypatch):
    monkeypatch.setattr(decode_run, "uncaptured_reason", lambda *args: "the moon is full")
    run = start(_OnCuda(own("gpt_neo")))
    assert isinstance(run, EagerRun)
    assert run.statistics.runner == "eager"
    assert run.statistics.fallbacks == ["steps are launched one by one: the moon is full"]


@pytest.mark.parametrize(
    "config, options, reason",
    [
        ({"output_scores": True}, {}, "scores and logits"),
        ({"output_logits": True}, {}, "scores and logits"),
        ({}, {"acceptance_ratio": 0.5, "known_tokens": [[1, 2]]}, "acceptance sweep"),
    ],
    ids=str,
)
def test_what_a_graph_cannot_do_is_a_reason(config, options, reason, own, monkeypatch):
    monkeypatch.setattr(decode_run, "uncaptured_reason", lambda *args: None)
    whole = GenerationConfig(max_length=12, eos_token_id=99, pad_token_id=0, **config)
    run = start(_OnCuda(own("gpt_neo")), whole, **options)
    assert isinstance(run, EagerRun)
    assert len(run.statistics.fallbacks) == 1
    assert reason in run.statistics.fallbacks[0]


def test_eager_steps_that_were_asked_for_are_no_fallback(own, monkeypatch):
    monkeypatch.setattr(decode_run, "uncaptured_reason", lambda *args: None)
    run = start(_OnCuda(own("gpt_neo")), capture=False)
    assert isinstance(run, EagerRun)
    assert run.statistics.fallbacks == []


def test_where_nothing_speaks_against_it_steps_are_captured(own, monkeypatch):
    monkeypatch.setattr(decode_run, "uncaptured_reason", lambda *args: None)
    assert isinstance(start(_OnCuda(own("gpt_neo"))), CapturedRun)


def test_slower_products_are_recorded_where_a_step_has_several_rows(own, monkeypatch):
    monkeypatch.setattr(decode_run, "uncaptured_reason", lambda *args: None)
    monkeypatch.setattr(decode_run, "gluon_unavailable", lambda: "no Gluon")
    fallbacks = start(_OnCuda(own("gpt_neo"))).statistics.fallbacks
    assert fallbacks == ["products of a few rows, or of packed weights, are slower: no Gluon"]
    plain = {"plan": DraftPlan.plain(), "drafts": "none"}
    model = own("gpt_neo")
    assert start(_OnCuda(model), **plain).statistics.fallbacks == []
    model.config.quantization_config = PackedWeightsConfig(8)
    assert start(_OnCuda(model), **plain).statistics.fallbacks == fallbacks


def test_the_reason_is_asked_of_the_plan_of_the_call(own, monkeypatch):
    asked = []
    monkeypatch.setattr(decode_run, "uncaptured_reason", lambda model, plan, rule: asked.append(plan) or "no")
    start(_OnCuda(own("gpt_neo")))
    start(_OnCuda(own("gpt_neo")), drafts="none")
    assert asked == [TREE, DraftPlan.plain()]


def test_captured_and_eager_calls_agree(captured):
    eager = generate(captured, plan=TREE, capture=False)
    got = generate(captured, plan=TREE)
    assert (eager.statistics.runner, got.statistics.runner) == ("eager", "cuda graph")
    assert torch.equal(got.sequences, eager.sequences)
    assert got.statistics.finish_reasons == eager.statistics.finish_reasons
    assert got.statistics.kv_bytes > 0
    assert got.statistics.draft_nodes == TREE.shape.nodes
    for step in got.statistics.steps:
        assert 1 <= step.emitted[0] <= step.accepted[0] + 1 <= TREE.shape.streams + 1
        assert (step.drafted, step.rows) == (3, 12)


@pytest.mark.parametrize("drafts", ["streams", "none"])
def test_preparing_decodes_nothing(captured, drafts, monkeypatch):
    """It captures; the call that follows finds the graphs made."""
    out = generate(captured, drafts=drafts, plan=TREE, prepare_only=True)
    assert torch.equal(out.sequences, PROMPT)
    assert out.statistics.steps == []
    assert out.statistics.runner == "cuda graph"
    made = dict(captured.__dict__["_graph_runners"])
    monkeypatch.setattr(HostRunner, "_capture", None)
    got = generate(captured, drafts=drafts, plan=TREE)
    assert got.sequences.shape[1] == PROMPT.shape[1] + 10
    assert captured.__dict__["_graph_runners"] == made


def test_preparing_an_eager_call_runs_no_model(architecture, own, monkeypatch):
    model = own(architecture)
    monkeypatch.setattr(model, "stream_forward", None)
    out = generate(model, plan=TREE, prepare_only=True)
    assert torch.equal(out.sequences, PROMPT)
    assert out.statistics.steps == []


class _Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.ends = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ends += 1


def test_a_streamer_gets_every_token_once(captured):
    streamer = _Recorder()
    out = generate(captured, plan=TREE, streamer=streamer)
    assert streamer.tokens == out.sequences[0].tolist()
    assert streamer.ends == 1


@pytest.mark.parametrize("plan", [TREE, DraftPlan.plain()], ids=["tree", "plain"])
def test_a_sequence_that_ends_early_is_cut_there(captured, plan):
    """An EOS inside an accepted path; the other sequence of the batch goes on as if alone."""
    prompts = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
    free = generate(captured, prompts, plan=plan, capture=False).sequences
    eos = int(free[0, 8])
    want = generate(captured, prompts, plan=plan, capture=False, eos_token_id=eos)
    got = generate(captured, prompts, plan=plan, eos_token_id=eos)
    assert torch.equal(got.sequences, want.sequences)
    assert got.statistics.finish_reasons == want.statistics.finish_reasons
    assert got.statistics.finish_reasons[0] == "eos"
    (runner,) = captured.__dict__["_graph_runners"].values()
    assert runner.step_buffers.state.finished[0]  # so that its rows of the cache no longer grow


def test_phases_of_a_call_add_up(captured):
    statistics = generate(captured, plan=TREE, record_phases=True).statistics
    assert statistics.phases_s is not None
    assert sum(statistics.phases_s.values()) <= statistics.total_s
    assert all(step.phases_s is not None for step in statistics.steps)
