"""Streams as rows: they never touch the main path, and each sees what the paper says."""

from __future__ import annotations

import pytest
import torch
from transformers import GPTJConfig

from huggingface.transformers.generation.draft_sources import StreamSource
from huggingface.transformers.generation.draft_tree import TreeShape
from huggingface.transformers.models.spec_stream import (
    StreamConfig,
    stock_config,
    stream_config_from,
    supported_architectures,
)
from tests.architectures import FAMILIES

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_main_rows_do_not_change_with_streams(architecture, implementation, make_model, make_stock):
    model = make_model(architecture, implementation=implementation)
    anchors = torch.tensor([[2, 5, 9]])
    with torch.no_grad():
        with_streams, streams = model.stream_forward(IDS, anchors)
        without, none = model.stream_forward(IDS, anchors, streams=0)
        logits = model.get_output_embeddings()(with_streams)
        want = make_stock(model)(IDS).logits
    # Upstream's eager attention rounds its weights to float32, whatever the dtype.
    exact = 1e-5 if implementation == "eager" else 1e-12
    torch.testing.assert_close(with_streams, without, atol=exact, rtol=exact)
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)
    assert none is None
    assert streams.shape == (1, 3, 3, model.config.hidden_size)


def test_lora_is_gated_bit_for_bit(architecture, make_model):
    """Changing every stream parameter leaves the main rows of a stock forward identical."""
    model = make_model(architecture, dtype=torch.float32, seed=2)
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        before = model(IDS).logits
        for name, parameter in model.named_parameters():
            if name.startswith("streams."):
                parameter.add_(1.0)
        assert torch.equal(model(IDS).logits, before)
    model.load_state_dict(saved)


def test_a_stream_sees_its_anchor_and_earlier_streams_only(architecture, make_model):
    """Tokens after the anchor, other anchors and later streams change nothing; tokens before it do."""
    model = make_model(architecture)
    with torch.no_grad():
        _, alone = model.stream_forward(IDS, torch.tensor([[5]]))
        _, among = model.stream_forward(IDS, torch.tensor([[1, 5, 8]]))
        _, fewer = model.stream_forward(IDS, torch.tensor([[5]]), streams=2)
        later, earlier = IDS.clone(), IDS.clone()
        later[0, 6:] = 11
        earlier[0, 3] = 11
        _, changed_later = model.stream_forward(later, torch.tensor([[5]]))
        _, changed_earlier = model.stream_forward(earlier, torch.tensor([[5]]))
    torch.testing.assert_close(among[:, 1:2], alone)
    torch.testing.assert_close(alone[:, :, :2], fewer)
    torch.testing.assert_close(changed_later, alone)
    assert not torch.allclose(changed_earlier, alone)


def test_every_stream_parameter_gets_a_gradient(architecture, make_model):
    model = make_model(architecture, seed=4)
    model.zero_grad()
    _, streams = model.stream_forward(IDS, torch.tensor([[2, 5]]))
    model.stream_logits(streams, torch.ones(1, 2, 3, dtype=torch.int64)).logsumexp(-1).sum().backward()
    missing = [n for n, p in model.named_parameters() if n.startswith("streams.") and p.grad is None]
    assert missing == []


def test_transition_bias_follows_its_weights(make_model):
    """What `stream_logits` adds is the product of the two factors, also after a weight has changed under the kept table."""
    model = make_model("gpt_neo", seed=8)
    hidden = torch.zeros(2, 3, model.config.hidden_size, dtype=torch.float64)
    parents = torch.randint(0, 13, (2, 3))
    head, streams = model.get_output_embeddings().weight, model.streams
    with torch.no_grad():
        for _ in range(2):
            keys = model.get_input_embeddings()(parents) @ streams.transition_in.weight.T
            want = keys @ (head @ streams.transition_out.weight.T).T
            torch.testing.assert_close(model.stream_logits(hidden, parents), want)
            streams.transition_out.weight.mul_(3.0)


def test_drafting_reads_the_kept_tables_without_a_gradient(make_model):
    model = make_model("gpt_neo", seed=8)
    first = model.draft_tables()
    assert all(one is kept for one, kept in zip(model.draft_tables(), first, strict=True))
    assert not any(one.requires_grad for one in first)
    assert make_model("gpt_neo", transition_rank=0).draft_tables() == (None, None)


def test_drafts_are_the_best_tokens_of_the_biased_streams(architecture, make_model):
    """A draft equals what `stream_logits` ranks for the tree's own parents, level by level."""
    model = make_model(architecture)
    shape = TreeShape((-1, 0, 0, 1, 1, 2, 4), 3)
    stream_hidden = torch.randn(2, 3, model.config.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        tree = StreamSource().propose(model, torch.tensor([3, 5]), stream_hidden, shape)
        for row in range(2):
            for node in range(1, shape.nodes):
                depth = shape.depths[node]
                parents = tree.tokens[row, shape.parents[node]].repeat(3)
                logits = model.stream_logits(stream_hidden[row], parents)[depth - 1]
                order = logits.argsort(descending=True)
                assert tree.tokens[row, node] == order[shape.ranks[node]]


@pytest.mark.parametrize("fields", [{"streams": -1}, {"streams": 2, "stream_layers": 0}, {"lora_rank": 1.5}])
def test_impossible_shapes_are_refused(fields):
    with pytest.raises(ValueError, match="stream|lora_rank"):
        StreamConfig(**fields)


def test_more_stream_layers_than_layers_is_refused(architecture, make_model):
    config = make_model(architecture).config
    bad = stream_config_from(config, streams=2, stream_layers=9)
    with pytest.raises(ValueError, match="exceeds the model's 4 layers"):
        make_model(architecture).__class__(bad)


def test_an_unknown_architecture_names_the_known_ones():
    with pytest.raises(ValueError, match="gptj.*supported: gpt2, gpt_neo, llama, mistral, qwen2"):
        stream_config_from(GPTJConfig(), streams=2)
    assert supported_architectures() == sorted(FAMILIES)


def test_stock_config_and_back(architecture, make_model):
    config = make_model(architecture).config
    stock = stock_config(config)
    assert stock.model_type == architecture
    assert not hasattr(stock, "stream_layers")
    again = stream_config_from(stock, **StreamConfig.of(config).as_dict())
    assert StreamConfig.of(again) == StreamConfig.of(config)
    assert again.hidden_size == config.hidden_size
