"""Our decoder: draft trees and who chose them, drafts of a given rate."""

import json
import shutil
import time
import types

import pytest
import torch

from huggingface.transformers.generation import graph_runner, tree_tuning
from huggingface.transformers.generation.utils import SpecGenerationMixin
from models import Limits
from models.loading import engine_decoder
from models.loading.calls import Prompts
from tests.models.loaders import PROMPT, loaded


def test_acceptance_ratio_keeps_the_output(stream_checkpoint):
    model = loaded("spec_stream", stream_checkpoint)
    limits = Limits(max_new_tokens=20, ignore_eos=True)
    steps = {}
    for ratio in (0.0, 1.0):
        answer = model.generate([PROMPT], limits, acceptance_ratio=ratio)[0]
        assert answer.token_ids == model.generate([PROMPT], limits)[0].token_ids
        steps[ratio] = len(answer.steps)
    assert steps[1.0] < steps[0.0] == 19
    with pytest.raises(ValueError, match="spec_stream"):
        loaded("naive", stream_checkpoint).generate([PROMPT], limits, acceptance_ratio=0.5)


def test_tuned_trees_of_the_checkpoint_stay_and_its_sampling_defaults_go(stream_checkpoint, tmp_path):
    directory = shutil.copytree(stream_checkpoint, tmp_path / "tuned")
    file = directory / "generation_config.json"
    tuned = {"rank_accuracy": [[0.9, 0.05], [0.5, 0.1]]}
    brought = {"spec_stream": tuned, "repetition_penalty": 5.0, "do_sample": True, "top_k": 3}
    values = json.loads(file.read_text()) | brought
    values.pop(
        "_from_model_config", None
    )  # set while nothing but defaults was saved; with it upstream drops own keys
    file.write_text(json.dumps(values))
    model = loaded("spec_stream", directory)
    assert model.model.generation_config.spec_stream == tuned
    limits = Limits(max_new_tokens=16)
    expected = loaded("naive", stream_checkpoint).generate([PROMPT], limits)[0].token_ids
    assert model.generate([PROMPT], limits)[0].token_ids == expected
    assert loaded("naive", directory).generate([PROMPT], limits)[0].token_ids == expected


def test_draft_nodes_of_the_run_and_of_the_recipe(stream_checkpoint):
    by_run = loaded("spec_stream", stream_checkpoint, draft_nodes=3)
    by_run.generate([PROMPT], Limits(max_new_tokens=4))
    by_recipe = loaded("spec_stream", stream_checkpoint, flags={"draft_nodes": 2})
    by_recipe.generate([PROMPT], Limits(max_new_tokens=4))
    assert (by_run.draft_nodes, by_recipe.draft_nodes) == (3, 2)
    assert (by_run.draft_source, by_recipe.draft_source) == ("given", "given")


@pytest.fixture
def tunings(monkeypatch):
    """Batches that were tuned for; trees of four nodes cost least."""
    batches = []

    def measured(model, plans, context, batch):
        batches.append(batch)
        return {plan: 1.0 if plan.shape.nodes == 4 else 10.0 for plan in plans}

    monkeypatch.setattr(tree_tuning, "eager_step_seconds", measured)
    return batches


def test_tree_is_tuned_before_the_first_answer_of_a_batch_size(stream_checkpoint, tunings):
    model = loaded("spec_stream", stream_checkpoint, draft_nodes="auto")
    assert tunings == []  # workers load side by side, and would disturb each other
    for prompts in (["a"], ["a"], ["a", "b", "c"], ["a", "b", "c", "d"]):
        model.generate(prompts, Limits(max_new_tokens=4))
        assert (model.draft_nodes, model.draft_source) == (4, "tuned at load")
    assert tunings == [1, 4]


def test_tuned_sizes_and_random_weights_cost_no_tuning(stream_checkpoint, tunings, tmp_path):
    directory = shutil.copytree(stream_checkpoint, tmp_path / "tuned")
    file = directory / "generation_config.json"
    nodes = {f"cpu, {torch.get_num_threads()} threads, float32": 2}
    values = json.loads(file.read_text()) | {"spec_stream": {"draft_nodes": nodes}}
    values.pop("_from_model_config", None)
    file.write_text(json.dumps(values))
    limits = Limits(max_new_tokens=4, ignore_eos=True)
    for options, expected in (({}, (2, "tuned")), ({"random_weights": True}, (8, "default"))):
        model = loaded("spec_stream", directory, draft_nodes="auto", **options)
        model.generate([PROMPT], limits)
        assert (model.draft_nodes, model.draft_source) == expected
    plain = loaded("static", directory)
    plain.generate([PROMPT], limits)
    assert (plain.draft_nodes, plain.draft_source, tunings) == (None, None, [])


@pytest.fixture
def told(monkeypatch):
    """What the next calls say of their runner, one mapping a call."""
    answers = []
    original = SpecGenerationMixin.generate

    def generate(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        if kwargs.get("prepare_only"):
            return output
        for name, value in answers.pop(0).items():
            setattr(output.statistics, name, value)
        return output

    monkeypatch.setattr(SpecGenerationMixin, "generate", generate)
    return answers


def test_the_runner_and_its_graphs_are_told(stream_checkpoint, told):
    captured = {"runner": "cuda graph", "capture_s": 1.5, "capture_bytes": 64}
    replayed = {"runner": "cuda graph", "capture_s": 0.0, "capture_bytes": 0}
    other = {"runner": "eager", "fallbacks": ["no graph: why"], "capture_s": 0.0, "capture_bytes": 0}
    told += [captured, replayed, other, replayed]
    model, limits = loaded("spec_stream", stream_checkpoint), Limits(max_new_tokens=4)
    assert (model.runner, model.capture_s, model.capture_bytes) == (None, None, None)
    for prompts, expected in (
        (["a"], ("cuda graph", 1.5, 64)),
        (["a"], ("cuda graph", 1.5, 64)),  # a replay captures nothing; the graph cost what it cost
        (["a", "b"], ("eager", 0.0, 0)),
        (["a"], ("cuda graph", 1.5, 64)),
    ):
        answers = model.generate(prompts, limits)
        assert (model.runner, model.capture_s, model.capture_bytes) == expected
        assert [answer.fallbacks for answer in answers] == [
            ["no graph: why"] if expected[0] == "eager" else []
        ] * len(prompts)


def test_a_fallback_is_told_once(stream_checkpoint, told):
    model = loaded("static", stream_checkpoint)
    model.fallbacks.append("no graph: why")
    told.append({"fallbacks": ["no graph: why", "and more"]})
    assert model.generate(["a"], Limits(max_new_tokens=2))[0].fallbacks == ["no graph: why", "and more"]


def test_upstreams_loop_has_no_runner(stream_checkpoint):
    model = loaded("kv_cache", stream_checkpoint)
    model.generate(["a"], Limits(max_new_tokens=2))
    assert (model.runner, model.capture_s, model.capture_bytes) == (None, None, None)


@pytest.fixture
def calls(monkeypatch):
    """What `generate` was asked for and how often the clock was read before, one pair a call."""
    asked, read = [], []
    original = SpecGenerationMixin.generate

    def clock():
        read.append(None)
        return time.perf_counter()

    def generate(self, *args, **kwargs):
        asked.append((kwargs, len(read)))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(engine_decoder, "time", types.SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(SpecGenerationMixin, "generate", generate)
    return asked


@pytest.mark.parametrize("phases", [False, True])
def test_graphs_are_captured_before_the_clock_starts(stream_checkpoint, calls, phases):
    model = loaded("spec_stream", stream_checkpoint, draft_nodes=5)
    answers = model.generate(["abc", "de"], Limits(max_new_tokens=6), record_phases=phases)
    assert len(answers[0].token_ids) == 6
    (ahead, before), (timed, after) = calls
    assert (before, after) == (0, 1)
    assert ahead.pop("prepare_only") is True
    assert {name: timed[name] for name in ahead} == ahead  # else other graphs would be captured
    assert (ahead["record_phases"], ahead["draft_nodes"], ahead["drafts"]) == (phases, 5, "streams")


def test_a_sweep_captures_nothing(stream_checkpoint, calls):
    model = loaded("spec_stream", stream_checkpoint)
    model.generate([PROMPT], Limits(max_new_tokens=4, ignore_eos=True), acceptance_ratio=0.5)
    assert not any(kwargs.get("prepare_only") for kwargs, _ in calls)


def test_capturing_draws_nothing(stream_checkpoint, monkeypatch):
    model = loaded("spec_stream", stream_checkpoint)
    limits = Limits(max_new_tokens=12, ignore_eos=True, temperature=1.0, seed=3)
    expected = model.generate([PROMPT], limits)[0].token_ids
    original = SpecGenerationMixin.generate

    def generate(self, *args, **kwargs):
        if kwargs.get("prepare_only"):
            torch.rand(3)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SpecGenerationMixin, "generate", generate)
    assert model.generate([PROMPT], limits)[0].token_ids == expected


def test_one_node_is_plain_decoding(stream_checkpoint):
    model = loaded("spec_stream", stream_checkpoint, draft_nodes=1)
    answer = model.generate([PROMPT], Limits(max_new_tokens=8, ignore_eos=True))[0]
    assert (
        answer.token_ids
        == loaded("static", stream_checkpoint)
        .generate([PROMPT], Limits(max_new_tokens=8, ignore_eos=True))[0]
        .token_ids
    )
    assert (model.draft_nodes, model.draft_source) == (1, "given")
    assert {step["rows"] for step in answer.steps} == {1}


@pytest.fixture
def a_gpu(monkeypatch):
    """The decoder's model is said to be on a GPU with captured steps; returns what was freed and checked, in order."""
    done = []
    monkeypatch.setattr(graph_runner, "uncaptured_reason", lambda *_: None)
    monkeypatch.setattr(graph_runner, "release_runners", lambda model: done.append("freed"))
    monkeypatch.setattr(engine_decoder, "check_fits", lambda model, *sizes: done.append(sizes))
    return done


class Elsewhere:
    """A model as the memory check sees it, on another device."""

    device = torch.device("cuda")

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)


def test_a_new_batch_size_is_checked_after_the_graphs_of_others_are_freed(stream_checkpoint, a_gpu):
    decoder = loaded("spec_stream", stream_checkpoint, draft_nodes=5)._decoder
    decoder.model = Elsewhere(decoder.model)

    def prepare(batch, tokens, new_tokens=8):
        a_gpu.clear()
        ids = torch.zeros(batch, tokens, dtype=torch.int64)
        decoder.prepare(Prompts(ids, torch.ones_like(ids), new_tokens))
        return list(a_gpu)

    # 512 committed rows at least; five nodes and two steps of three tokens behind the end.
    assert prepare(2, 10) == ["freed", (2, 512, 11)]
    assert prepare(2, 40) == []  # its graphs are there and serve these prompts as well
    assert prepare(4, 10) == ["freed", (4, 512, 11)]
    assert prepare(2, 10) == []
    decoder.model.config.max_position_embeddings = 2048
    assert prepare(2, 600) == ["freed", (2, 1024, 11)]


def test_without_graphs_the_check_is_for_what_the_call_takes(stream_checkpoint, monkeypatch):
    checked = []
    monkeypatch.setattr(engine_decoder, "check_fits", lambda model, *sizes: checked.append(sizes))
    monkeypatch.setattr(graph_runner, "release_runners", lambda model: pytest.fail("there are no graphs"))
    model = loaded("static", stream_checkpoint)
    model.generate(["abcd"], Limits(max_new_tokens=3))
    assert checked == [(1, 7, 2)]
