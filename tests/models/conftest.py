"""Tiny random checkpoints as stock transformers saves them, with a byte-level tokenizer and an assistant inside."""

import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

from huggingface.transformers.models.spec_stream import load_streaming, stock_class
from tests.architectures import FAMILIES, inner_field
from tests.models.loaders import ASSISTANT, POSITIONS

END = "<|endoftext|>"


def save_tokenizer(directory: Path) -> None:
    """Saves a tokenizer whose tokens are bytes and one end-of-text token, which also opens and pads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate([END, *alphabet])}, merges=[])
    )
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END)
    tokenizer.save_pretrained(directory)


def tiny_config(architecture: str) -> PreTrainedConfig:
    """Returns a configuration of two or four small layers; windows are shorter than the prompts."""
    shared = dict(
        vocab_size=257, hidden_size=32, max_position_embeddings=POSITIONS, bos_token_id=0, eos_token_id=0
    )
    # A wide initialisation, so that a random model's answers depend on all of its prompt.
    shared |= dict(initializer_range=0.3)
    own = {**FAMILIES[architecture], inner_field(architecture): 64}
    if architecture == "llama":
        own["num_hidden_layers"] = 2
    return AutoConfig.for_model(architecture, **{**shared, **own})


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def architecture(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def stock_checkpoint(architecture, tmp_path_factory) -> Path:
    """A directory that stock transformers saved."""
    directory = tmp_path_factory.mktemp(f"stock_{architecture}")
    torch.manual_seed(1)
    config = tiny_config(architecture)
    model = stock_class(config)(config)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    save_assistant(model, directory / ASSISTANT)
    return directory


def save_assistant(model, directory: Path, noise: float = 0.04) -> None:
    """Saves a model that often says what another says, and often not: its weights, disturbed. It has no tokenizer."""
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    other.save_pretrained(directory)


@pytest.fixture(scope="session")
def stream_checkpoint(stock_checkpoint, tmp_path_factory) -> Path:
    """The same main weights with random streams, saved by our classes."""
    directory = tmp_path_factory.mktemp("streams")
    torch.manual_seed(2)
    fields = {"streams": 2, "stream_layers": 1, "transition_rank": 4, "lora_rank": 2}
    load_streaming(str(stock_checkpoint), stream_fields=fields).save_pretrained(directory)
    save_tokenizer(directory)
    shutil.copytree(stock_checkpoint / ASSISTANT, directory / ASSISTANT)
    return directory
