"""Our decoder: draft trees and who chose them, drafts of a given rate."""

import json
import shutil

import pytest
import torch

from huggingface.transformers.generation import tree_tuning
from huggingface.transformers.generation.utils import SpecGenerationMixin
from models import Limits
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

    def measured(model, shapes, context, batch):
        batches.append(batch)
        return {nodes: 1.0 if nodes == 4 else 10.0 for nodes in shapes}

    monkeypatch.setattr(tree_tuning, "measure_steps", measured)
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


def test_the_model_prepares_before_the_clock_starts(stream_checkpoint):
    model = loaded("spec_stream", stream_checkpoint, draft_nodes=5)
    asked, generate = [], model.model.generate
    model.model.prepare_decoding = lambda **how: asked.append(how)

    def timed(*args, **kwargs):
        asked.append("generate")
        return generate(*args, **kwargs)

    model.model.generate = timed
    model.generate(["abc", "de"], Limits(max_new_tokens=6))
    expected = {"batch": 2, "drafts": "streams", "draft_nodes": 5, "prompt_tokens": 3, "max_new_tokens": 6}
    assert asked == [expected, "generate"]
