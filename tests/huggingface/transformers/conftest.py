"""Tiny random models of every architecture, and their stock twins."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import huggingface.transformers  # noqa: F401 - registers the stream models
from huggingface.transformers.generation.draft_tree import TreeShape
from huggingface.transformers.generation.tree_tuning import DraftPlan
from huggingface.transformers.models.spec_stream import (
    StreamConfig,
    stock_class,
    stock_config,
    stream_config_from,
)
from tests.architectures import FAMILIES

VOCAB = 13
EOS = 0


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def _config(architecture: str, **fields):
    common = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "max_position_embeddings": 64,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
    }
    streams = {"streams": 3, "stream_layers": 2, "lora_rank": 2, "transition_rank": 4}
    values = {**common, **FAMILIES[architecture], **streams, **fields}
    shape = {name: values.pop(name) for name in StreamConfig().as_dict() if name in values}
    return stream_config_from(AutoConfig.for_model(architecture, **values), **shape)


@functools.lru_cache(maxsize=32)
def build(architecture: str, dtype=torch.float64, implementation: str = "sdpa", seed: int = 0, fields=()):
    """Returns a random model of tame weights whose streams and main path disagree often, but not always."""
    # What may be kept between tests is hashable; configurations want lists.
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in fields}
    config = _config(architecture, **given)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


@pytest.fixture(params=sorted(FAMILIES))
def architecture(request) -> str:
    return request.param


@pytest.fixture
def make_model():
    """Returns `make_model(architecture, dtype, implementation, seed, **fields)`."""

    def make(architecture, dtype=torch.float64, implementation="sdpa", seed=0, **fields):
        return build(architecture, dtype, implementation, seed, tuple(sorted(fields.items())))

    return make


@pytest.fixture
def make_stock():
    """Returns `make_stock(model)`: upstream's own class with the same main weights, eager attention."""

    @functools.lru_cache(maxsize=32)
    def make(model):
        config = stock_config(model.config)
        config._attn_implementation = "eager"
        stock = stock_class(model.config)(config).eval().to(model.dtype)
        main = {k: v for k, v in model.state_dict().items() if not k.startswith("streams.")}
        result = stock.load_state_dict(main, strict=False)
        assert not result.unexpected_keys
        assert set(result.missing_keys) <= {"lm_head.weight"}
        return stock

    return make


@pytest.fixture
def check_greedy(make_stock):
    """Returns `check_greedy(model)`: what a tree drafts leaves the text as upstream's `generate` has it, token for token."""

    def check(model, prompts=range(1, 14, 3), length=16):
        stock = make_stock(model)
        plan = DraftPlan(TreeShape((-1, 0, 0, 1, 1, 2, 4), 3))
        for size in prompts:
            ids = torch.tensor([[1 + (5 * place + size) % 12 for place in range(size)]])
            options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": length, "do_sample": False}
            want = stock.generate(ids, **options)
            assert torch.equal(model.generate(ids, **options, plan=plan), want)
            assert torch.equal(model.generate(ids, **options, drafts="none"), want)

    return check
