"""Streams that may draft some tokens alone: the same text, the right tables, and what is wrong with a bad list."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from huggingface.transformers.generation.draft_sources import StreamSource
from huggingface.transformers.generation.draft_tree import TreeShape
from huggingface.transformers.generation.graph_runner import release_runners
from huggingface.transformers.generation.tree_tuning import DraftPlan
from huggingface.transformers.models.spec_stream import StreamConfig, draft_tables, load_streaming
from huggingface.transformers.quantizers.configuration import PackedWeightsConfig
from models.loading.random_weights import random_model
from tests.huggingface.transformers.generation.host_runner import use_host_runner

VOCAB = 40
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
DRAFTED = torch.tensor([39, 2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 1, 4, 6, 8, 10])
TREE = TreeShape((-1, 0, 0, 1, 1, 2, 4), 3)
GROWN = DraftPlan(TreeShape((-1, *[0] * 7), 3), beam=8)


@pytest.fixture
def model(architecture, make_model):
    """A model of one's own whose streams may draft 18 of its 40 tokens."""
    made = copy.deepcopy(make_model(architecture, vocab_size=VOCAB))
    made.set_draft_vocab(DRAFTED)
    return made


def _generate(model, **options) -> torch.Tensor:
    mask = torch.ones_like(IDS)
    return model.generate(
        IDS, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0, **options
    )


@pytest.mark.parametrize("captured", [False, True])
def test_the_text_stays_and_drafts_are_of_those_tokens(model, captured, make_stock, monkeypatch):
    if captured:
        use_host_runner(monkeypatch)
    want = make_stock(model).generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    plan = GROWN if captured else DraftPlan(TREE)
    assert torch.equal(_generate(model, plan=plan), want)
    hidden = torch.randn(1, 3, model.config.hidden_size, dtype=torch.float64)
    tree = StreamSource().propose(model, torch.tensor([3]), hidden, TREE)
    assert set(tree.tokens[0, 1:].tolist()) <= set(DRAFTED.tolist())


def test_drafts_are_the_best_of_those_tokens(model):
    """What `stream_logits` ranks with every other token taken out, for the tree's own parents, level by level."""
    hidden = torch.randn(2, 3, model.config.hidden_size, dtype=torch.float64)
    barred = torch.ones(VOCAB, dtype=torch.bool)
    barred[DRAFTED] = False
    with torch.no_grad():
        tree = StreamSource().propose(model, torch.tensor([0, 12]), hidden, TREE)
        for row in range(2):
            for node in range(1, TREE.nodes):
                parents = tree.tokens[row, TREE.parents[node]].repeat(3)
                logits = model.stream_logits(hidden[row], parents)[TREE.depths[node] - 1]
                order = logits.masked_fill(barred, float("-inf")).argsort(descending=True)
                assert tree.tokens[row, node] == order[TREE.ranks[node]]


def test_tables_follow_what_they_come_from(make_model):
    model = copy.deepcopy(make_model("gpt_neo", vocab_size=VOCAB))
    whole = model.draft_tables()
    assert (whole.vocabulary, whole.head, whole.drafted) == (None, None, None)
    model.set_draft_vocab(DRAFTED)
    first = model.draft_tables()
    assert first is model.draft_tables()
    assert first.drafted == len(DRAFTED)
    head = model.get_output_embeddings().weight
    rows = DRAFTED.sort().values
    assert torch.equal(first.head, head[rows])
    assert torch.equal(first.tokens, model.transition_tables()[1][rows])
    with torch.no_grad():
        head.mul_(2.0)
    assert torch.equal(model.draft_tables().head, head[rows])
    model.set_draft_vocab(None)
    assert model.draft_tables().head is None
    assert model.config.draft_vocab_size == StreamConfig.of(model.config).draft_vocab_size == 0


def test_captured_steps_are_made_anew(make_model, monkeypatch):
    """A captured step holds the tables of before; the next call must not replay it."""
    use_host_runner(monkeypatch)
    model = copy.deepcopy(make_model("llama", vocab_size=VOCAB))
    _generate(model, plan=GROWN)
    model.set_draft_vocab(DRAFTED)
    result = _generate(model, plan=GROWN, return_dict_in_generate=True)
    assert result.statistics.capture_s > 0
    release_runners(model)


@torch.no_grad()
def test_a_quantised_head_is_read_back(make_model, tmp_path, monkeypatch):
    model = copy.deepcopy(make_model("llama", hidden_size=48, vocab_size=VOCAB))
    model.set_draft_vocab(DRAFTED)
    model.save_pretrained(tmp_path)
    packed = load_streaming(str(tmp_path), quantization_config=PackedWeightsConfig(4, 32, lm_head="int8"))
    head = packed.get_output_embeddings().packed.dense(packed.dtype)
    assert torch.equal(packed.draft_tables().head, head[DRAFTED.sort().values])
    monkeypatch.setattr(draft_tables, "AT_ONCE", 7)
    whole = packed.streams.transition_out(head)
    torch.testing.assert_close(packed.transition_tables()[1], whole)
    packed._tables = None
    torch.testing.assert_close(packed.transition_tables()[1], whole)
    assert torch.equal(_generate(packed, plan=DraftPlan(TREE)), _generate(packed, drafts="none"))


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def test_the_list_is_saved_with_the_streams(model, saved):
    again = AutoModelForCausalLM.from_pretrained(saved)
    assert again.config.draft_vocab_size == len(DRAFTED)
    assert torch.equal(again.streams.draft_vocab, DRAFTED.sort().values)
    half = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    assert torch.equal(half.streams.draft_vocab, DRAFTED.sort().values)


@pytest.mark.parametrize("fault", ["absent", "beyond", "negative", "twice"])
def test_a_bad_list_is_told_before_decoding(saved, fault):
    path = saved / "model.safetensors"
    weights = load_file(path)
    tokens = weights.pop("streams.draft_vocab").clone()
    if fault != "absent":
        tokens[{"beyond": -1, "negative": 0, "twice": 1}[fault]] = {
            "beyond": VOCAB,
            "negative": -1,
            "twice": 1,
        }[fault]
        weights["streams.draft_vocab"] = tokens
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="streams.draft_vocab"):
        _generate(AutoModelForCausalLM.from_pretrained(saved), plan=DraftPlan(TREE))


def test_impossible_sizes_are_refused(make_model):
    model = copy.deepcopy(make_model("gpt_neo", vocab_size=VOCAB))
    with pytest.raises(ValueError, match="at least 16, got 3"):
        model.set_draft_vocab(torch.arange(3))
    with pytest.raises(ValueError, match="exceeds the model's 40 tokens"):
        model.set_draft_vocab(torch.arange(41))
    for wrong, said in (
        ([*range(1, 20), 1], "different token ids below 40"),
        ([-1, *range(1, 20)], "different token ids below 40"),
        ([*range(20, 41)], "different token ids below 40"),
        (torch.arange(20.0), "one-dimensional, int64"),
        (torch.arange(20)[None], "one-dimensional, int64"),
    ):
        with pytest.raises(ValueError, match=said):
            model.set_draft_vocab(wrong)
    with pytest.raises(ValueError, match="without streams"):
        copy.deepcopy(make_model("gpt_neo", streams=0, stream_layers=0)).set_draft_vocab(torch.arange(20))
    assert model.draft_tables().head is None


@pytest.mark.parametrize("captured", [False, True])
def test_inference_mode_may_come_and_go(model, captured, monkeypatch):
    if captured:
        use_host_runner(monkeypatch)
    plan = GROWN if captured else DraftPlan(TREE)
    want = _generate(model, drafts="none", capture=False)
    with torch.inference_mode():
        assert torch.equal(_generate(model, plan=plan), want)
    assert torch.equal(_generate(model, plan=plan), want)


def test_random_weights_have_a_list(architecture, make_model):
    config = copy.deepcopy(make_model(architecture, vocab_size=VOCAB).config)
    config.draft_vocab_size = 20
    model = random_model(type(make_model(architecture, vocab_size=VOCAB)), config, "cpu", torch.float32)
    assert model.streams.draft_vocab.tolist() == list(range(20))
    assert torch.equal(_generate(model, plan=DraftPlan(TREE)), _generate(model, drafts="none"))
