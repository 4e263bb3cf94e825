"""Tiny models, tokenizers and data for the training tests."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

import huggingface.transformers  # noqa: F401 - registers the stream models
from training.data import TextPair
from training.tokens import TokenSet, encode_pairs, pack, train_tokenizer

COLOURS = ("red", "green", "blue", "black", "white")
THINGS = ("apple", "car", "house", "dog", "boat", "tree")
TINY_NEO = {
    "model_type": "gpt_neo",
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 48,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 8,
    "max_position_embeddings": 96,
    "attention_dropout": 0.0,
    "embed_dropout": 0.0,
    "resid_dropout": 0.0,
    "streams": 2,
    "stream_layers": 1,
    "transition_rank": 4,
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text_pairs(count: int, seed: int = 0) -> list[TextPair]:
    draw = random.Random(seed)
    pairs = []
    for _ in range(count):
        colour, thing = draw.choice(COLOURS), draw.choice(THINGS)
        pairs.append(TextPair(f"Thing: {colour} {thing}\nText:", f" This {thing} is {colour}."))
    return pairs


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(text_pairs(60), 300, 96)


@pytest.fixture(scope="session")
def token_set(tokenizer) -> TokenSet:
    return pack([encode_pairs(tokenizer, text_pairs(40), 96)], ("things",))


@pytest.fixture
def tiny_model(tokenizer):
    return make_model(tokenizer)


def make_model(tokenizer, **fields):
    from transformers import AutoConfig, AutoModelForCausalLM

    from huggingface.transformers.models.spec_stream import stream_config_from

    stock = {
        k: v
        for k, v in TINY_NEO.items()
        if k not in ("model_type", "streams", "stream_layers", "transition_rank")
    }
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(
        "gpt_neo", vocab_size=len(tokenizer), initializer_range=0.2, **stock, **special
    )
    torch.manual_seed(0)
    shape = {"streams": 2, "stream_layers": 1, "transition_rank": 4, **fields}
    model = AutoModelForCausalLM.from_config(stream_config_from(config, **shape), attn_implementation="sdpa")
    torch.nn.init.normal_(model.streams.embedding.weight)
    return model.eval()


@pytest.fixture
def own_file(tmp_path) -> Path:
    return write_rows(tmp_path / "own.jsonl", text_pairs(60))


def write_rows(path: Path, pairs) -> Path:
    rows = [json.dumps({"prompt": pair.prompt, "completion": pair.completion}) for pair in pairs]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def model_file(tmp_path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY_NEO), encoding="utf-8")
    return path
