"""Every technique through one shared matrix: its tokens, how many, where they end, what is told of them."""

import json
import shutil

import pytest
import torch

from models import Limits
from tests.models.loaders import BATCHED, EXACT, PROMPT, cached_bytes, loaded, upstream_tokens


@pytest.mark.parametrize("name", EXACT)
def test_greedy_tokens_are_upstreams(name, architecture, stock_checkpoint, stream_checkpoint):
    answer = loaded(name, stream_checkpoint).generate([PROMPT], Limits(max_new_tokens=24))[0]
    assert answer.token_ids == upstream_tokens(architecture, stock_checkpoint, PROMPT, 24)
    assert answer.finish_reason in ("length", "eos")
    assert 0 < answer.ttft_s < answer.total_s
    assert sum(step["emitted"] for step in answer.steps) <= len(answer.token_ids) - 1
    assert answer.prompt_tokens == len(PROMPT)


@pytest.mark.parametrize("name", ["half", "flash"])
def test_half_precision_techniques_run(name, stream_checkpoint):
    model = loaded(name, stream_checkpoint)
    answer = model.generate([PROMPT], Limits(max_new_tokens=8))[0]
    assert (model.dtype, len(answer.token_ids)) == ("bfloat16", 8)
    if name == "flash":  # what ran is recorded
        assert answer.fallbacks == ["flash: plain-PyTorch reference"]


@pytest.mark.parametrize("name", BATCHED)
def test_batch_gives_each_prompt_its_own_tokens(name, stream_checkpoint):
    model = loaded(name, stream_checkpoint)
    prompts = [PROMPT, "a", "two words", PROMPT[::-1]]
    together = model.generate(prompts, Limits(max_new_tokens=16))
    alone = [model.generate([prompt], Limits(max_new_tokens=16))[0] for prompt in prompts]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert len({answer.total_s for answer in together}) == 1


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("new_tokens", [0, 1, 2])
def test_exact_number_of_tokens(name, new_tokens, stream_checkpoint):
    limits = Limits(max_new_tokens=new_tokens, ignore_eos=True)
    answer = loaded(name, stream_checkpoint).generate([PROMPT], limits)[0]
    assert len(answer.token_ids) == new_tokens
    assert answer.finish_reason == "length"
    assert (answer.ttft_s is None) == (new_tokens == 0)


@pytest.mark.parametrize("name", EXACT)
def test_text_ends_with_the_end_token_counted(name, stock_checkpoint, tmp_path):
    tokens = (
        loaded("naive", stock_checkpoint)
        .generate([PROMPT], Limits(max_new_tokens=12, ignore_eos=True))[0]
        .token_ids
    )
    # Make a token that greedy decoding emits the end-of-text token.
    end = tokens[5]
    directory = shutil.copytree(stock_checkpoint, tmp_path / "ends")
    for file in ("config.json", "generation_config.json"):
        values = json.loads((directory / file).read_text())
        (directory / file).write_text(json.dumps(values | {"eos_token_id": end}))
    model = loaded("naive" if name == "spec_stream" else name, directory)
    cut = tokens[: tokens.index(end) + 1]
    answer = model.generate([PROMPT], Limits(max_new_tokens=12))[0]
    assert (answer.token_ids, answer.finish_reason) == (cut, "eos")
    assert model.generate([PROMPT], Limits(max_new_tokens=12, ignore_eos=True))[0].token_ids == tokens


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("length", [94, 95, 96, 97, 300])
def test_long_prompts_keep_their_end(name, length, stream_checkpoint):
    prompt = ("abcdefghij" * 30)[:length]
    model = loaded(name, stream_checkpoint)
    answer = model.generate([prompt], Limits(max_new_tokens=6, ignore_eos=True))[0]
    assert (answer.prompt_tokens, answer.truncated, len(answer.token_ids)) == (90, True, 6)
    assert (
        answer.token_ids
        == model.generate([prompt[-90:]], Limits(max_new_tokens=6, ignore_eos=True))[0].token_ids
    )


@pytest.mark.parametrize("name", EXACT)
def test_decoding_ends_at_the_last_position(name, stream_checkpoint):
    prompts = ["x" * 93, "y" * 5] if name in BATCHED else ["x" * 93]
    limits = Limits(max_new_tokens=10, ignore_eos=True, on_long="error")
    answers = loaded(name, stream_checkpoint).generate(prompts, limits)
    assert (len(answers[0].token_ids), answers[0].finish_reason, answers[0].truncated) == (3, "limit", False)
    if len(answers) > 1:
        assert (len(answers[1].token_ids), answers[1].finish_reason, answers[1].call) == (10, "length", 1)


def test_more_new_tokens_than_positions(stream_checkpoint):
    answer = loaded("naive", stream_checkpoint).generate(
        [PROMPT], Limits(max_new_tokens=500, ignore_eos=True)
    )[0]
    assert (answer.prompt_tokens, len(answer.token_ids), answer.finish_reason) == (1, 95, "limit")


def test_on_long_without_room(stream_checkpoint):
    model = loaded("kv_cache", stream_checkpoint)
    prompts = ["z" * 96, "fine"]
    skipped, fine = model.generate(prompts, Limits(max_new_tokens=3, on_long="skip"))
    assert skipped.finish_reason == "error"
    assert "96 positions" in skipped.error
    assert len(fine.token_ids) == 3
    with pytest.raises(ValueError, match="truncate_left"):
        model.generate(prompts, Limits(max_new_tokens=3, on_long="error"))


def test_empty_prompt_starts_from_the_opening_token(stream_checkpoint):
    answer = loaded("naive", stream_checkpoint).generate([""], Limits(max_new_tokens=3))[0]
    assert (answer.prompt_tokens, answer.error) == (1, None)


def test_empty_prompt_without_opening_token_costs_its_row_alone(stream_checkpoint):
    model = loaded("naive", stream_checkpoint)
    model.tokenizer.bos_token = None
    empty, fine = model.generate(["", "fine"], Limits(max_new_tokens=3))
    assert "no beginning-of-text" in empty.error
    assert fine.error is None


@pytest.mark.parametrize("text", ["\ud800 half a pair", "\x00", "\ufffd", "日本語 שלום 👩‍👩‍👧"])
def test_unusual_text(text, stream_checkpoint):
    answer = loaded("kv_cache", stream_checkpoint).generate([text], Limits(max_new_tokens=4))[0]
    json.dumps(answer.to_json()).encode()
    assert answer.error is None


@pytest.mark.parametrize("name", ["naive", "static", "prompt_lookup", "assisted", "spec_stream"])
def test_sampling_is_seeded_and_keeps_to_top_k(name, stream_checkpoint):
    model = loaded(name, stream_checkpoint)
    draw = [
        model.generate([PROMPT], Limits(max_new_tokens=12, temperature=1.5, seed=seed))[0].token_ids
        for seed in (1, 1, 2)
    ]
    assert draw[0] == draw[1] != draw[2]
    greedy = model.generate([PROMPT], Limits(max_new_tokens=12))[0].token_ids
    assert (
        model.generate([PROMPT], Limits(max_new_tokens=12, temperature=1.5, top_k=1))[0].token_ids == greedy
    )


def test_sampling_has_no_hidden_top_k(stock_checkpoint):
    """Upstream's own default is the 50 likeliest tokens; ours is all of them."""
    model = loaded("naive", stock_checkpoint)
    ids = model.tokenizer.encode(PROMPT)
    seen = {
        model.generate([PROMPT], Limits(max_new_tokens=1, temperature=100.0, seed=seed))[0].token_ids[0]
        for seed in range(150)
    }
    likeliest = set(model.model(torch.tensor([ids])).logits[0, -1].topk(50).indices.tolist())
    assert seen - likeliest


def test_scores_agree_with_greedy_decoding(stream_checkpoint):
    for name in ("naive", "spec_stream"):
        model = loaded(name, stream_checkpoint)
        tokens = model.generate([PROMPT], Limits(max_new_tokens=10))[0].token_ids
        scores = model.score(PROMPT, tokens)
        assert max(scores.gaps) < 1e-4
        assert len(scores.margins) == len(scores.logprobs) == len(tokens)
        wrong = [(token + 1) % 257 for token in tokens]
        assert min(model.score(model.tokenizer.encode(PROMPT), wrong).gaps[:1]) > 0
        assert model.score(PROMPT, []).logprobs == []


def test_scores_after_a_cut_prompt(stream_checkpoint):
    model, limits, prompt = loaded("naive", stream_checkpoint), Limits(max_new_tokens=6), "qwertyuiop" * 20
    tokens = model.generate([prompt], limits)[0].token_ids
    assert max(model.score(prompt, tokens, limits).gaps) < 1e-4


@pytest.mark.parametrize("name", ["naive", "no_cache", "prompt_lookup", "assisted", "spec_stream"])
def test_phases_are_recorded_where_asked(name, stream_checkpoint):
    answer = loaded(name, stream_checkpoint).generate([PROMPT], Limits(max_new_tokens=6), record_phases=True)[
        0
    ]
    assert answer.phases_s["prefill"] > 0
    assert answer.phases_s["forward"] > 0
    assert sum(answer.phases_s.values()) <= answer.total_s * 1.01


def test_memory_is_reported(stream_checkpoint):
    model = loaded("naive", stream_checkpoint)
    model.generate([PROMPT], Limits(max_new_tokens=4, ignore_eos=True))
    config = model.model.config
    assert model.kv_bytes == cached_bytes(config, len(PROMPT) + 3)
    assert model.weight_bytes == sum(p.numel() * 4 for p in model.model.parameters())
    model.generate(["a"], Limits(max_new_tokens=1))  # what is told is the last request's
    assert model.kv_bytes == cached_bytes(config, 1)
    none = loaded("no_cache", stream_checkpoint)
    none.generate([PROMPT], Limits(max_new_tokens=4))
    assert none.kv_bytes == 0
