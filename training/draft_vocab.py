"""The tokens that streams may draft: the most frequent ones of what the model is trained on."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from huggingface.transformers.models.spec_stream import StreamConfig
from training.arguments import TrainingFlags
from training.models import planned_fields
from training.tokens import TokenSet

logger = logging.getLogger(__name__)


def wanted_draft_vocab(flags: TrainingFlags, model: Any) -> int | None:
    """Returns how many tokens the run's streams may draft; 0: all of them, `None`: those that the model's streams may already.

    Streams that replace a checkpoint's get as many as those had.
    """
    if flags.draft_vocab_size is not None:
        return flags.draft_vocab_size
    size = planned_fields(flags)["draft_vocab_size"]
    return None if size == model.config.draft_vocab_size else size


def check_draft_vocab(model: Any, size: int | None) -> None:
    """Raises ValueError for a size that the model cannot have, before anything slow starts."""
    shape = replace(StreamConfig.of(model.config), draft_vocab_size=size or 0)
    shape.check(model.config.num_hidden_layers, model.config.vocab_size)


def choose_draft_vocab(model: Any, size: int | None, examples: TokenSet) -> None:
    """Lets the model's streams draft the `size` most frequent tokens alone, in place; 0: all of them, `None`: what they may."""
    if size is None:
        return
    vocab = model.config.vocab_size
    model.set_draft_vocab(torch.from_numpy(frequent_tokens(examples, size, vocab)) if size else None)
    if size:
        logger.info("streams draft %d of %d tokens", size, vocab)


def frequent_tokens(examples: TokenSet, size: int, vocab: int) -> npt.NDArray[np.int64]:
    """Returns the `size` most frequent of `vocab` tokens, rising: by completions, then by prompts, then by the lower id."""
    lengths = examples.lengths
    place = np.arange(len(examples.tokens)) - np.repeat(examples.starts[:-1], lengths)
    in_prompt = place < np.repeat(examples.prompt_lengths, lengths)
    prompts = np.bincount(examples.tokens[in_prompt], minlength=vocab)
    completions = np.bincount(examples.tokens[~in_prompt], minlength=vocab)
    return np.sort(np.lexsort((-prompts, -completions))[:size])
