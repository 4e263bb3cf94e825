"""`generate` as users know it: processors, stop rules, streamers, return types, errors."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer, TextStreamer

from huggingface.transformers.generation.draft_tree import TreeShape
from huggingface.transformers.generation.tree_tuning import DraftPlan

PROMPT = torch.tensor([[3, 1, 4, 1, 5]])
PLAN = DraftPlan(TreeShape((-1, 0, 0, 1, 1, 2, 3), 3))


def _options(**more):
    mask = torch.ones_like(PROMPT)
    return {"attention_mask": mask, "max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, **more}


class _Ban(LogitsProcessor):
    """Forbids the token two places back, so that it has to see the prefix."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -2:-1], float("-inf"))


@pytest.mark.parametrize(
    "more",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 9},
        {"bad_words_ids": [[2], [7, 8]]},
        {"logits_processor": LogitsProcessorList([_Ban()])},
        {"eos_token_id": [0, 6, 9]},
    ],
    ids=lambda more: next(iter(more)),
)
def test_processors_and_stop_ids_as_upstream(architecture, more, make_model, make_stock):
    model = make_model(architecture)
    want = make_stock(model).generate(PROMPT, **_options(**more))
    assert torch.equal(model.generate(PROMPT, plan=PLAN, **_options(**more)), want)


@pytest.mark.parametrize("more", [{"encoder_repetition_penalty": 1.7}, {"encoder_no_repeat_ngram_size": 2}])
def test_processors_of_a_whole_batch_take_one_prompt(more, make_model, make_stock):
    model = make_model("gpt_neo")
    with pytest.raises(ValueError, match="prompts of all 2 sequences"):
        model.generate(PROMPT.repeat(2, 1), **_options(attention_mask=None, **more))
    want = make_stock(model).generate(PROMPT, **_options(**more))
    assert torch.equal(model.generate(PROMPT, plan=PLAN, **_options(**more)), want)


def test_a_repetition_penalty_knows_each_sequences_padding(architecture, make_model, make_stock):
    model = make_model(architecture)
    # Some releases of upstream count padding as said; here it is a token of the prompt.
    ids, mask = torch.tensor([[3, 1, 4, 1, 5], [9, 9, 9, 9, 2]]), torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
    got = model.generate(ids, plan=PLAN, **_options(attention_mask=mask, repetition_penalty=1.7))
    for row, prompt in enumerate((ids[:1], ids[1:, 3:])):
        alone = _options(attention_mask=torch.ones_like(prompt), repetition_penalty=1.7)
        want = make_stock(model).generate(prompt, **alone)[0, prompt.shape[1] :]
        assert torch.equal(got[row, 5 : 5 + len(want)], want)


def test_constraints_are_asked_for_the_sequence(make_model, make_stock):
    """Not for the node of the tree, nor for the place in a step."""
    model = make_model("gpt_neo")
    allowed = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    options = _options(attention_mask=None, prefix_allowed_tokens_fn=lambda row, tokens: allowed[row])
    got = model.generate(PROMPT.repeat(2, 1), plan=PLAN, **options)
    want = make_stock(model).generate(PROMPT.repeat(2, 1), **options)
    assert torch.equal(got, want)
    assert set(got[1, 5:].tolist()) <= set(allowed[1])


WATERMARK = SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)


@pytest.mark.parametrize(
    "more", [{"guidance_scale": 1.5}, {"watermarking_config": WATERMARK}], ids=["guidance", "mark"]
)
@pytest.mark.parametrize("batch, how", [(1, {"plan": PLAN}), (2, {"drafts": "none"})])
def test_what_remembers_takes_one_sequence_and_no_drafts(batch, how, more, make_model):
    options = _options(attention_mask=None, **more, **how)
    with pytest.raises(ValueError, match="drafts='none'"):
        make_model("gpt_neo").generate(PROMPT.repeat(batch, 1), **options)


def test_processors_hold_with_pruned_trees(make_model, make_stock):
    model = make_model("gpt_neo", pruning_rank=3)
    more = {"repetition_penalty": 1.7}
    want = make_stock(model).generate(PROMPT, **_options(**more))
    plan = DraftPlan(PLAN.shape, keep=4)
    assert torch.equal(model.generate(PROMPT, plan=plan, **_options(**more)), want)


@pytest.mark.parametrize(
    "own", [[MaxLengthCriteria(9)], [EosTokenCriteria([2, 5])], [MaxLengthCriteria(25), EosTokenCriteria(12)]]
)
def test_own_criteria_take_the_place_of_the_configurations(architecture, own, make_model, make_stock):
    model = make_model(architecture)
    options = _options(stopping_criteria=StoppingCriteriaList(own), eos_token_id=[1, 3])
    want = make_stock(model).generate(PROMPT, **options)
    assert torch.equal(model.generate(PROMPT, plan=PLAN, **options), want)


@pytest.mark.parametrize(
    "given",
    [
        {"position_ids": torch.arange(5)[None] + 7},
        {"token_type_ids": torch.zeros(1, 5, dtype=torch.int64)},
        {"inputs_embeds": torch.zeros(1, 5, 16)},
        {"custom_generate": lambda *args: None},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"output_hidden_states": True, "return_dict_in_generate": True},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_the_loop_does_not_read_is_refused(given, make_model):
    with pytest.raises(ValueError, match=next(iter(given))):
        make_model("gpt_neo").generate(PROMPT, **_options(**given))


def _letters() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of 13 letters."""
    vocab = {letter: place for place, letter in enumerate("abcdefghijklm")}
    letters = Tokenizer(BPE(vocab, merges=[]))
    letters.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters)


@pytest.mark.parametrize("where", ["call", "config"])
def test_stop_strings_find_the_tokenizer(where, make_model, make_stock):
    model, tokenizer = make_model("gpt_neo"), _letters()
    whole = make_stock(model).generate(PROMPT, **_options())
    stop = [tokenizer.convert_ids_to_tokens(int(whole[0, 9]))]
    given = {"attention_mask": torch.ones_like(PROMPT), "tokenizer": tokenizer}
    if where == "call":
        given |= _options(stop_strings=stop)
    else:
        given["generation_config"] = GenerationConfig(max_new_tokens=14, pad_token_id=0, stop_strings=stop)
    want = make_stock(model).generate(PROMPT, **given)
    assert want.shape[1] < whole.shape[1]
    assert torch.equal(model.generate(PROMPT, plan=PLAN, **given), want)


class _StopAtLength(StoppingCriteria):
    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("length", range(6, 12))
def test_criteria_cut_inside_an_accepted_path(architecture, length, make_model, make_stock):
    model = make_model(architecture)
    more = {"stopping_criteria": StoppingCriteriaList([_StopAtLength(length)]), "eos_token_id": 99}
    want = make_stock(model).generate(PROMPT, **_options(**more))
    known = make_stock(model).generate(PROMPT, **_options(eos_token_id=99))[0, PROMPT.shape[1] :].tolist()
    out = model.generate(
        PROMPT,
        plan=PLAN,
        acceptance_ratio=1.0,
        known_tokens=[known],
        return_dict_in_generate=True,
        **_options(**more),
    )
    assert torch.equal(out.sequences, want)
    assert out.statistics.finish_reasons == ["criteria"]


@pytest.mark.parametrize("place", range(1, 9))
def test_eos_anywhere_in_an_accepted_path(architecture, place, make_model, make_stock):
    """I05: the token at `place` becomes EOS; text ends there and counters leave out what came later."""
    model = make_model(architecture)
    known = make_stock(model).generate(PROMPT, **_options(eos_token_id=99))[0, PROMPT.shape[1] :].tolist()
    eos = known[place]
    out = model.generate(
        PROMPT,
        plan=PLAN,
        acceptance_ratio=1.0,
        known_tokens=[known],
        return_dict_in_generate=True,
        **_options(eos_token_id=eos),
    )
    want = known[: known.index(eos) + 1]
    assert out.sequences[0, PROMPT.shape[1] :].tolist() == want
    assert sum(step.emitted[0] for step in out.statistics.steps) == len(want) - 1
    assert out.statistics.finish_reasons == ["eos"]


@pytest.mark.parametrize("length", [0, 1, 2])
def test_few_new_tokens(architecture, length, make_model, make_stock):
    model = make_model(architecture)
    if length == 0:
        with pytest.raises(ValueError, match="max_new_tokens"):
            model.generate(PROMPT, plan=PLAN, **_options(max_new_tokens=0))
        return
    want = make_stock(model).generate(PROMPT, **_options(max_new_tokens=length))
    assert torch.equal(model.generate(PROMPT, plan=PLAN, **_options(max_new_tokens=length)), want)


class _Recorder(BaseStreamer):
    def __init__(self):
        self.puts, self.ends = [], 0

    def put(self, value):
        self.puts.append(value.flatten().tolist())

    def end(self):
        self.ends += 1


def test_streamer_gets_every_token_once(architecture, make_model):
    model = make_model(architecture)
    streamer = _Recorder()
    out = model.generate(PROMPT, plan=PLAN, streamer=streamer, **_options())
    assert sum(streamer.puts, []) == out[0].tolist()
    assert streamer.puts[0] == PROMPT[0].tolist()
    assert streamer.ends == 1


class _ByteTokenizer:
    """Token 1..4 are the four bytes of an emoji, others a letter and a space."""

    def decode(self, tokens, **kwargs):
        emoji = "\U0001f600".encode()
        data = b"".join(bytes([emoji[t - 1]]) if 1 <= t <= 4 else b"x " for t in tokens)
        return data.decode("utf-8", "replace")


def test_streamed_text_has_no_half_characters(capsys, make_model):
    model = make_model("gpt_neo")
    known = [1, 2, 3, 4, 9, 1, 2, 3, 4, 9, 9, 9]

    class Fixed(LogitsProcessor):
        def __call__(self, input_ids, scores):
            at = input_ids.shape[1] - PROMPT.shape[1]
            forced = torch.full_like(scores, float("-inf"))
            forced[:, known[min(at, len(known) - 1)]] = 0.0
            return forced

    model.generate(
        PROMPT,
        plan=PLAN,
        acceptance_ratio=1.0,
        known_tokens=[known],
        streamer=TextStreamer(_ByteTokenizer(), skip_prompt=True),
        logits_processor=LogitsProcessorList([Fixed()]),
        **_options(max_new_tokens=len(known), eos_token_id=99),
    )
    printed = capsys.readouterr().out
    assert "\ufffd" not in printed
    assert printed.count("\U0001f600") == 2


def test_scores_and_logits_as_upstream(architecture, make_model, make_stock):
    model = make_model(architecture)
    more = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    want = make_stock(model).generate(PROMPT, **_options(**more))
    got = model.generate(PROMPT, plan=PLAN, **_options(**more))
    torch.testing.assert_close(
        torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4, check_dtype=False
    )
    assert len(got.scores) == len(want.scores)


def test_phases_are_recorded_only_on_demand(make_model):
    model = make_model("gpt_neo")
    plain = model.generate(PROMPT, plan=PLAN, **_options(return_dict_in_generate=True)).statistics
    timed = model.generate(
        PROMPT, plan=PLAN, record_phases=True, **_options(return_dict_in_generate=True)
    ).statistics
    assert plain.phases_s is None
    assert set(timed.phases_s) == {"prefill", "draft", "forward", "verify", "commit", "host"}
    assert sum(timed.phases_s.values()) <= timed.total_s


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"drafts": "magic"}, "'streams' or 'none'"),
        ({"draft_nodes": 0}, "draft_nodes"),
        ({"acceptance_ratio": 1.5}, "acceptance_ratio"),
        ({"stop_strings": "x"}, "tokenizer"),
    ],
)
def test_wrong_arguments_say_what_to_do(more, message, make_model):
    with pytest.raises(ValueError, match=message):
        make_model("gpt_neo").generate(PROMPT, **_options(**more))


@pytest.mark.parametrize("length", [64, 65])
def test_prompt_without_room_is_refused_before_the_model_runs(architecture, length, make_model):
    model = make_model(architecture)
    prompt = torch.ones(1, length, dtype=torch.int64)
    with pytest.raises(ValueError, match="positions"):
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, pad_token_id=0)


def test_empty_prompt_in_a_batch_is_refused(make_model):
    mask = torch.tensor([[1, 1], [0, 0]])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        make_model("gpt_neo").generate(torch.ones_like(mask), attention_mask=mask, max_new_tokens=4)


def test_infinite_logits_are_reported(make_model):
    model = make_model("llama", seed=9)
    weight = model.get_output_embeddings().weight
    saved = weight.data.clone()
    weight.data[2] = float("inf")
    try:
        with pytest.raises(ValueError, match="bfloat16"):
            model.generate(PROMPT, **_options())
    finally:
        weight.data.copy_(saved)


def test_prompts_of_a_sweep_have_draws_of_their_own(make_model, make_stock):
    """At ratio 0.5 the accepted numbers differ from prompt to prompt, and repeat from run to run."""
    model = make_model("llama")
    stock = make_stock(model)

    def accepted(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        options = {**_options(eos_token_id=99), "attention_mask": torch.ones_like(ids), "max_new_tokens": 30}
        known = stock.generate(ids, **options)[0, len(prompt) :].tolist()
        out = model.generate(
            ids,
            plan=PLAN,
            acceptance_ratio=0.5,
            known_tokens=[known],
            return_dict_in_generate=True,
            **options,
        )
        return [step.accepted[0] for step in out.statistics.steps]

    runs = [accepted([3, 1, 4, token]) for token in range(1, 7)]
    assert len({tuple(run) for run in runs}) > 1
    assert accepted([3, 1, 4, 1]) == runs[0]
