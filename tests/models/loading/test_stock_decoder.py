"""Upstream's decoder with its own speculation: what its steps are, and where drafts must stop."""

import pytest
import torch
from transformers import AutoConfig

from models import Limits
from models.loading.passes import watched_passes
from tests.models.loaders import ASSISTANT, POSITIONS, PROMPT, STOCK_CLASSES, loaded

SPECULATIVE = ("prompt_lookup", "assisted")
UNSURE = {"assistant_confidence_threshold": 0.0}  # draft on, however unsure


@pytest.mark.parametrize("name", SPECULATIVE)
def test_upstreams_speculation_refuses_a_batch(name, stream_checkpoint):
    with pytest.raises(ValueError, match="--batch_size 1"):
        loaded(name, stream_checkpoint).generate(["a", "b"], Limits(max_new_tokens=2))


@pytest.mark.parametrize("name", SPECULATIVE)
def test_a_step_is_a_pass_of_the_model(name, stream_checkpoint):
    """The assistant's passes are no decode steps, and the first pass, which drafts already, is none either."""
    model = loaded(name, stream_checkpoint, flags=UNSURE)
    for prompt in (PROMPT, "abcabcabcabcabcabc"):
        with watched_passes(model.model, timed=False) as passes:
            answer = model.generate([prompt], Limits(max_new_tokens=40, ignore_eos=True))[0]
        assert len(answer.steps) == len(passes.rows) - 1
        assert [step["nodes"] for step in answer.steps] == [rows - 1 for rows in passes.rows[1:]]
        assert all(0 <= step["accepted"] <= step["nodes"] for step in answer.steps)
        assert all(step["emitted"] == step["accepted"] + 1 for step in answer.steps)
        first = len(answer.token_ids) - sum(step["emitted"] for step in answer.steps)
        assert 1 <= first <= passes.rows[0] - len(prompt) + 1


def test_an_assistants_drafts_are_accepted_in_part(stream_checkpoint):
    model = loaded("assisted", stream_checkpoint, flags=UNSURE)
    steps = model.generate([PROMPT], Limits(max_new_tokens=40, ignore_eos=True))[0].steps
    drafted, accepted = (sum(step[key] for step in steps) for key in ("nodes", "accepted"))
    assert 0 < accepted < drafted
    assert len(steps) < 39


def test_an_assistant_that_is_the_model_is_always_right(stock_checkpoint):
    flags = UNSURE | {"num_assistant_tokens": 4}
    model = loaded("assisted", stock_checkpoint, assistant=stock_checkpoint, flags=flags)
    steps = model.generate([PROMPT], Limits(max_new_tokens=20, ignore_eos=True))[0].steps
    assert [(step["nodes"], step["accepted"], step["emitted"]) for step in steps] == [(4, 4, 5)] * 3


def test_the_options_reach_the_assistant(stock_checkpoint):
    def nodes(**flags):
        model = loaded("assisted", stock_checkpoint, assistant=stock_checkpoint, flags=UNSURE | flags)
        answer = model.generate(["abc"], Limits(max_new_tokens=60, ignore_eos=True))[0]
        return [step["nodes"] for step in answer.steps]

    assert set(nodes(num_assistant_tokens=3)[:-1]) == {3}
    growing = nodes(num_assistant_tokens=3, num_assistant_tokens_schedule="heuristic_transient")
    assert growing[:4] == [5, 7, 9, 11]
    sure_alone = nodes(num_assistant_tokens=8, assistant_confidence_threshold=1.0)
    assert set(sure_alone[:-1]) == {1}


@pytest.mark.parametrize("schedule", ["constant", "heuristic_transient"])
def test_an_answer_does_not_depend_on_those_before(schedule, stream_checkpoint):
    flags = {"num_assistant_tokens_schedule": schedule}
    limits = Limits(max_new_tokens=16, temperature=1.2, seed=5, ignore_eos=True)
    fresh = loaded("assisted", stream_checkpoint, flags=flags).generate([PROMPT], limits)[0]
    used = loaded("assisted", stream_checkpoint, flags=flags)
    for prompt in ("abc", PROMPT[::-1]):
        used.generate([prompt], limits)
    again = used.generate([PROMPT], limits)[0]
    assert (again.token_ids, again.steps) == (fresh.token_ids, fresh.steps)


def test_sampling_draws_from_the_models_distribution(stock_checkpoint):
    """Of two likely tokens each comes as often as the model says, though another model drafts."""
    model = loaded("assisted", stock_checkpoint, flags=UNSURE)
    draws, temperature = 400, 1.0
    counts: dict[int, int] = {}
    for seed in range(draws):
        limits = Limits(max_new_tokens=3, temperature=temperature, top_k=3, seed=seed, ignore_eos=True)
        token = model.generate(["abcabc"], limits)[0].token_ids[0]
        counts[token] = counts.get(token, 0) + 1
    ids = torch.tensor([model.tokenizer.encode("abcabc")])
    likeliest = model.model(ids).logits[0, -1].topk(3)
    expected = dict(
        zip(likeliest.indices.tolist(), (likeliest.values / temperature).softmax(-1).tolist(), strict=True)
    )
    assert set(counts) <= set(expected)
    # Four standard deviations of the likeliest share at so many draws.
    for token, share in expected.items():
        assert counts.get(token, 0) / draws == pytest.approx(
            share, abs=4 * (share * (1 - share) / draws) ** 0.5
        )


def shorter(checkpoint, architecture, positions, directory):
    """Saves a model as its own assistant with fewer positions."""
    model = STOCK_CLASSES[architecture].from_pretrained(checkpoint)
    if architecture in ("gpt2", "gpt_neo"):
        table = model.transformer.wpe
        table.weight = torch.nn.Parameter(table.weight[:positions].clone())
    model.config.max_position_embeddings = positions
    model.save_pretrained(directory)
    assert AutoConfig.from_pretrained(directory).max_position_embeddings == positions
    return directory


@pytest.mark.parametrize("prompt_tokens", [3, 38, 39, 40, 41, 42, 60])
def test_the_assistant_keeps_within_its_own_positions(
    prompt_tokens, architecture, stock_checkpoint, tmp_path
):
    helper = shorter(stock_checkpoint, architecture, 40, tmp_path)
    model = loaded("assisted", stock_checkpoint, assistant=helper, flags=UNSURE | {"num_assistant_tokens": 6})
    prompt, limits = "abcdefghij" * 6, Limits(max_new_tokens=30, ignore_eos=True, on_long="error")
    prompt = prompt[:prompt_tokens]
    with watched_passes(model._decoder.assistant, timed=False) as passes:
        answer = model.generate([prompt], limits)[0]
    expected = loaded("kv_cache", stock_checkpoint).generate([prompt], limits)[0]
    assert answer.token_ids == expected.token_ids
    read = passes.cache.get_seq_length() if passes.rows else 0
    # Two short of the text while it lasts; no position is left unused.
    assert read == (min(40, prompt_tokens + 28) if prompt_tokens <= 40 else 0)


@pytest.mark.parametrize("prompt_tokens", [60, POSITIONS - 3, POSITIONS - 2, POSITIONS - 1])
def test_assisted_reaches_the_last_position(prompt_tokens, stock_checkpoint):
    """The text may fill the last position; drafts end before it."""
    prompt = ("abcdefghij" * 10)[:prompt_tokens]
    limits = Limits(max_new_tokens=POSITIONS, ignore_eos=True, on_long="skip")
    model = loaded("assisted", stock_checkpoint, assistant=stock_checkpoint, flags=UNSURE)
    with watched_passes(model.model, timed=False) as passes:
        answer = model.generate([prompt], limits)[0]
    assert len(answer.token_ids) == POSITIONS - prompt_tokens
    assert answer.token_ids == loaded("kv_cache", stock_checkpoint).generate([prompt], limits)[0].token_ids
    assert passes.cache.get_seq_length() < POSITIONS


def test_phases_tell_drafting_from_checking(stream_checkpoint):
    model = loaded("assisted", stream_checkpoint, flags=UNSURE)
    answer = model.generate([PROMPT], Limits(max_new_tokens=20, ignore_eos=True), record_phases=True)[0]
    assert set(answer.phases_s) == {"prefill", "draft", "forward", "host"}
    assert all(seconds > 0 for seconds in answer.phases_s.values())
    assert sum(answer.phases_s.values()) == pytest.approx(answer.total_s)
    assert answer.phases_s["prefill"] == answer.ttft_s


def test_an_assistant_leaves_no_hooks_behind(stream_checkpoint):
    model = loaded("assisted", stream_checkpoint)
    model.generate([PROMPT], Limits(max_new_tokens=4))
    for one in (model.model, model._decoder.assistant):
        assert not one._forward_hooks
        assert not one._forward_pre_hooks
    assert (stream_checkpoint / ASSISTANT).is_dir()
