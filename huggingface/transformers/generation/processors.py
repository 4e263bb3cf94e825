"""Upstream's logits processors, sequence by sequence and node by node.

Upstream sends a whole batch through a processor, always the same one and a token at a time. Our loop sends the nodes of one
sequence's tree, which the kinds below need help with.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process

SCORE_ONLY = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.LogitNormalization,
    logits_process.InfNanRemoveLogitsProcessor,
)
"""Processors that look at scores alone, so that all nodes go through them at once and on the device."""

WHOLE_BATCH = (
    logits_process.EncoderRepetitionPenaltyLogitsProcessor,
    logits_process.EncoderNoRepeatNGramLogitsProcessor,
)
"""Processors made of all sequences' prompts: they take one sequence, and one node at a time (some releases of upstream change
only as many rows as there are prompts)."""

ONE_BY_ONE = (
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    logits_process.SynthIDTextWatermarkLogitsProcessor,
)
"""Processors that remember the token before, so that they follow one sequence and no tree."""


def check_processors(processors: LogitsProcessorList, batch: int, nodes: int) -> None:
    """Raises ValueError for processors that a sequence of a batch, or a node of a tree, cannot be sent through by itself."""
    for processor in processors:
        name = type(processor).__name__
        if isinstance(processor, WHOLE_BATCH) and batch > 1:
            raise ValueError(f"{name} holds the prompts of all {batch} sequences; decode them one by one.")
        if isinstance(processor, ONE_BY_ONE) and (batch > 1 or nodes > 1):
            raise ValueError(
                f"{name} follows one sequence token by token; decode prompts one by one with drafts='none'."
            )


def of_sequence(processors: LogitsProcessorList, row: int) -> LogitsProcessorList:
    """Returns the processors for the nodes of one sequence: what they know of each sequence is reduced to what holds for it."""
    return LogitsProcessorList([_of_sequence(processor, row) for processor in processors])


def _of_sequence(processor: Any, row: int) -> Any:
    if isinstance(processor, logits_process.RepetitionPenaltyLogitsProcessor):
        ignored = processor.prompt_ignore_length
        if isinstance(ignored, torch.Tensor):  # the padding in front of each prompt
            return type(processor)(processor.penalty, int(ignored[row]))
    if isinstance(processor, logits_process.PrefixConstrainedLogitsProcessor):
        return type(processor)(partial(_allowed, processor._prefix_allowed_tokens_fn, row), 1)
    return processor


def _allowed(function: Any, row: int, _node: int, tokens: torch.Tensor) -> list[int]:
    """Returns what the caller's function allows next, asked for the sequence instead of the node."""
    return function(row, tokens)
