"""Every technique through one shared matrix, and what loading refuses."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer, GPTNeoForCausalLM, LlamaForCausalLM

from huggingface.transformers.generation import tree_tuning
from huggingface.transformers.models.spec_stream import load_streaming
from models import TECHNIQUES, Limits, Machine, Recipe, fold
from models.loading import load

CPU = Machine("cpu")
PROMPT = "name[The Vaults], eatType[pub], priceRange[more than 30]"
EXACT = [name for name in TECHNIQUES if name not in ("half", "flash")]
STOCK_CLASSES = {"gpt_neo": GPTNeoForCausalLM, "llama": LlamaForCausalLM}


def loaded(name, checkpoint, **options):
    # Tuned trees depend on the machine's speed, and tests must not.
    options.setdefault("draft_nodes", 8)
    return load(fold(name, options.pop("flags", None), CPU), checkpoint, "cpu", **options)


def upstream_tokens(architecture, checkpoint, prompt, new_tokens):
    """What plain upstream code emits, nothing of ours involved."""
    model = STOCK_CLASSES[architecture].from_pretrained(checkpoint).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(checkpoint).encode(prompt)])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
    )
    tokens = output[0, ids.shape[1] :].tolist()
    return tokens[: tokens.index(0) + 1] if 0 in tokens else tokens


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


def test_flash_function_keeps_tokens_in_float32(architecture, stock_checkpoint):
    recipe = Recipe(decoder="stock", dtype="float32", attention="flash")
    answers = load(recipe, stock_checkpoint, "cpu").generate(["short", PROMPT], Limits(max_new_tokens=12))
    naive = loaded("naive", stock_checkpoint).generate(["short", PROMPT], Limits(max_new_tokens=12))
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in naive]


def test_naive_is_upstreams_own_class(architecture, stream_checkpoint):
    model = loaded("naive", stream_checkpoint)
    assert type(model.model) is STOCK_CLASSES[architecture]
    assert model.model.dtype == torch.float32
    assert not [name for name, _ in model.model.named_parameters() if name.startswith("streams.")]
    assert model.model.config._attn_implementation == {"gpt_neo": "eager", "llama": "sdpa"}[architecture]


@pytest.mark.parametrize("name", [name for name in EXACT if name != "prompt_lookup"])
def test_batch_gives_each_prompt_its_own_tokens(name, stream_checkpoint):
    model = loaded(name, stream_checkpoint)
    prompts = [PROMPT, "a", "two words", PROMPT[::-1]]
    together = model.generate(prompts, Limits(max_new_tokens=16))
    alone = [model.generate([prompt], Limits(max_new_tokens=16))[0] for prompt in prompts]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert len({answer.total_s for answer in together}) == 1


def test_prompt_lookup_refuses_a_batch(stream_checkpoint):
    with pytest.raises(ValueError, match="--batch_size 1"):
        loaded("prompt_lookup", stream_checkpoint).generate(["a", "b"], Limits(max_new_tokens=2))


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
    prompts = ["x" * 93] if name == "prompt_lookup" else ["x" * 93, "y" * 5]
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


@pytest.mark.parametrize("name", ["naive", "static", "spec_stream"])
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


@pytest.mark.parametrize("name", ["naive", "no_cache", "prompt_lookup", "spec_stream"])
def test_phases_are_recorded_where_asked(name, stream_checkpoint):
    answer = loaded(name, stream_checkpoint).generate([PROMPT], Limits(max_new_tokens=6), record_phases=True)[
        0
    ]
    assert answer.phases_s["prefill"] > 0
    assert answer.phases_s["forward"] > 0
    assert sum(answer.phases_s.values()) <= answer.total_s * 1.01


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


def test_memory_is_reported(stream_checkpoint):
    model = loaded("naive", stream_checkpoint)
    model.generate([PROMPT], Limits(max_new_tokens=4, ignore_eos=True))
    config = model.model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = config.hidden_size // config.num_attention_heads
    assert model.kv_bytes == 2 * config.num_hidden_layers * heads * width * 4 * (len(PROMPT) + 3)
    assert model.weight_bytes == sum(p.numel() * 4 for p in model.model.parameters())
    none = loaded("no_cache", stream_checkpoint)
    none.generate([PROMPT], Limits(max_new_tokens=4))
    assert none.kv_bytes == 0


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


@pytest.mark.parametrize("name", ["naive", "spec_stream"])
def test_random_weights_need_a_config_alone(name, stock_checkpoint, tmp_path):
    shutil.copy(stock_checkpoint / "config.json", tmp_path)
    model = loaded(name, tmp_path, random_weights=True)
    answer = model.generate([PROMPT], Limits(max_new_tokens=8, ignore_eos=True))[0]
    base = loaded("kv_cache", tmp_path, random_weights=True).generate(
        [PROMPT], Limits(max_new_tokens=8, ignore_eos=True)
    )[0]
    assert answer.token_ids == base.token_ids
    assert answer.fallbacks == ["no tokenizer: bytes as tokens"]


def test_random_streams_leave_the_main_weights_alone(stream_checkpoint, tmp_path):
    shutil.copy(stream_checkpoint / "config.json", tmp_path)
    limits = Limits(max_new_tokens=8, ignore_eos=True)
    naive, ours = (loaded(name, tmp_path, random_weights=True) for name in ("naive", "spec_stream"))
    assert naive.generate([PROMPT], limits)[0].token_ids == ours.generate([PROMPT], limits)[0].token_ids
    assert ours.model.config.streams == 2


@pytest.mark.parametrize("name", ["naive", "static", "spec_stream"])
def test_streams_beside_their_base_model(name, stock_checkpoint, stream_checkpoint, tmp_path):
    """A checkpoint of streams alone: the main weights come from the base model that its config names."""
    model = load_streaming(str(stream_checkpoint))
    model.config.base_model_name_or_path = str(stock_checkpoint)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(stream_checkpoint).save_pretrained(tmp_path)
    limits = Limits(max_new_tokens=12)
    assert loaded(name, tmp_path).generate([PROMPT], limits)[0].token_ids == (
        loaded("naive", stock_checkpoint).generate([PROMPT], limits)[0].token_ids
    )


def test_static_runs_on_a_stock_directory(stock_checkpoint):
    answer = loaded("static", stock_checkpoint).generate([PROMPT], Limits(max_new_tokens=8))[0]
    assert (
        answer.token_ids
        == loaded("naive", stock_checkpoint).generate([PROMPT], Limits(max_new_tokens=8))[0].token_ids
    )


def test_spec_stream_without_streams_points_at_the_trainer(stock_checkpoint):
    with pytest.raises(ValueError, match="train_spec_stream.py"):
        loaded("spec_stream", stock_checkpoint)


def test_sdpa_asked_of_stock_gpt_neo_is_recorded(architecture, stock_checkpoint):
    model = loaded("kv_cache", stock_checkpoint, flags={"attn_implementation": "sdpa"})
    expected = ["GPTNeoForCausalLM has no sdpa upstream: eager"] if architecture == "gpt_neo" else []
    assert model.fallbacks == expected


def edited(checkpoint, tmp_path, **values):
    directory = shutil.copytree(checkpoint, tmp_path / "edited")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))
    return directory


@pytest.mark.parametrize(
    "values",
    [
        {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
        {"_attn_implementation_internal": "someone/kernel"},
        {"trust_remote_code": True},
        {"text_config": {"auto_map": {"AutoConfig": "evil.Config"}}},
    ],
)
def test_config_that_asks_for_code_is_refused(values, stock_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="nothing was run"):
        loaded("naive", edited(stock_checkpoint, tmp_path, **values))


def test_tokenizer_of_another_model_is_refused_with_both_sizes(stock_checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"257 tokens.*vocabulary has 100"):
        loaded("naive", edited(stock_checkpoint, tmp_path, vocab_size=100))


def test_unknown_architecture_is_refused(stock_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="model_type 'no_such_model'"):
        loaded("naive", edited(stock_checkpoint, tmp_path, model_type="no_such_model"))


@pytest.mark.parametrize("name", ["naive", "static"])
def test_truncated_weights_are_refused(name, stock_checkpoint, tmp_path):
    directory = shutil.copytree(stock_checkpoint, tmp_path / "torn")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="corrupt"):
        loaded(name, directory)


@pytest.mark.parametrize("name", ["naive", "static"])
def test_pickled_weights_are_never_opened(name, stock_checkpoint, tmp_path):
    directory = shutil.copytree(stock_checkpoint, tmp_path / "pickled")
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch sentinel'\ntR.")
    with pytest.raises(ValueError, match="safetensors"):
        loaded(name, directory)
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("name", ["naive", "static"])
def test_missing_main_weights_are_named(name, stock_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    directory = shutil.copytree(stock_checkpoint, tmp_path / "lacking")
    weights = load_file(directory / "model.safetensors")
    lost = next(key for key in weights if "k_proj" in key)
    save_file(
        {k: v for k, v in weights.items() if k != lost}, directory / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=lost.replace(".", r"\.")):
        loaded(name, directory)


def test_undefined_logits_are_refused(stock_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    directory = shutil.copytree(stock_checkpoint, tmp_path / "nan")
    weights = load_file(directory / "model.safetensors")
    key = next(key for key in weights if "v_proj" in key)
    weights[key] = torch.full_like(weights[key], torch.nan)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="not finite"):
        loaded("naive", directory)


def test_checkpoint_without_tokenizer_is_refused(stock_checkpoint, tmp_path):
    for file in ("config.json", "model.safetensors"):
        shutil.copy(stock_checkpoint / file, tmp_path)
    with pytest.raises(ValueError, match="no usable tokenizer"):
        loaded("naive", tmp_path)


def test_missing_directory_is_one_clear_line():
    with pytest.raises(ValueError, match=r"^no usable config.json in ./nowhere") as caught:
        loaded("naive", "./nowhere")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["naive", "static"])
def test_weights_of_other_shapes_are_listed(name, stock_checkpoint, tmp_path):
    place = edited(stock_checkpoint, tmp_path, intermediate_size=48)
    with pytest.raises(ValueError, match=r"\(.*64.*\) instead of \(.*48.*\).* of other shapes in all"):
        loaded(name, place)


def test_streams_of_other_shapes_are_listed(stream_checkpoint, tmp_path):
    place = edited(stream_checkpoint, tmp_path, transition_rank=3)
    with pytest.raises(ValueError, match=r"streams.transition_in.weight \(4, 32\) instead of \(3, 32\)"):
        loaded("spec_stream", place)


def test_a_base_of_other_shapes_is_one_line(stock_checkpoint, stream_checkpoint, tmp_path):
    base = edited(stock_checkpoint, tmp_path)
    place = edited(
        stream_checkpoint, tmp_path / "streams", base_model_name_or_path=str(base), intermediate_size=48
    )
    with pytest.raises(ValueError, match="restore both together|shapes"):
        loaded("spec_stream", place)


def test_a_config_that_contradicts_itself_is_one_line(tmp_path, stock_checkpoint):
    layers = {"num_layers": 6} if "gpt_neo" in str(stock_checkpoint) else {"num_attention_heads": 0}
    place = edited(stock_checkpoint, tmp_path, **layers)
    with pytest.raises(ValueError, match="config.json|cannot be loaded"):
        loaded("static", place)
