"""What one call of `generate` is given and what it did, the same for upstream's decoder and ours.

Both are timed by the same rule: the clock starts with the prompts on an idle device and stops when the last token is there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import GenerationConfig

from models.answer import Limits


@dataclass(frozen=True)
class Prompts:
    """Prompts of one call, padded on the left.

    Attributes:
        ids: (batch, seq) int64.
        mask: (batch, seq) int64, 0 where a row is padded.
        new_tokens: most tokens each row may gain.
        known: what plain decoding emits for each row, where drafts are to be right at a given rate.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    new_tokens: int
    known: list[list[int]] | None = None


@dataclass
class Call:
    """What one call did.

    Attributes:
        rows: new ids of each row; padding after the end-of-text token may follow.
        ttft_s: seconds to the first token.
        total_s: seconds to the last.
        steps: decode steps of each row.
        kv_bytes: bytes of the cache at the end, an assistant's included.
        first: tokens each row gained in the first pass; upstream's speculation drafts in it already.
        phases_s: seconds by phase, where asked for.
        draft_nodes: nodes of the draft tree, root included; `None` where our engine drafts nothing.
        draft_source: who decided that number: `given`, `tuned`, `tuned at load` or `default`.
        runner: how our engine ran its steps, `eager` or `cuda graph`; `None` for upstream's loop.
        fallbacks: what ran in this call instead of what this device could have run.
        capture_s: seconds that capturing this batch size's graphs took, outside every call's times; `None` like `runner`.
        capture_bytes: device memory that they hold; `None` like `runner`.
    """

    rows: list[list[int]]
    ttft_s: float
    total_s: float
    steps: list[list[dict[str, Any]]]
    kv_bytes: int
    first: int = 1
    phases_s: dict[str, float] | None = None
    draft_nodes: int | None = None
    draft_source: str | None = None
    runner: str | None = None
    fallbacks: list[str] = field(default_factory=list)
    capture_s: float | None = None
    capture_bytes: int | None = None


class Decoder(Protocol):
    """Runs one call."""

    def prepare(self, prompts: Prompts) -> None:
        """Does what must be done before a call with such prompts, and is no part of it.

        Raises:
            MemoryError: the call cannot fit the device's memory.
        """

    def run(
        self, prompts: Prompts, limits: Limits, record_phases: bool, acceptance_ratio: float | None
    ) -> Call:
        """Returns what the call did."""


def generation_config(
    prompts: Prompts, limits: Limits, end_ids: list[int], pad_id: int, **options: Any
) -> GenerationConfig:
    """Returns upstream's configuration of one call: our limits and nothing that a checkpoint may have brought.

    Args:
        prompts: the call's prompts.
        limits: how long and by which rule.
        end_ids: ids that end a text.
        pad_id: fills rows that end early.
        **options: further fields, the recipe's own.
    """
    # top_k 0 and top_p 1 are "off"; left out, upstream would sample from the 50 likeliest tokens.
    sampling = (
        {"temperature": limits.temperature, "top_k": limits.top_k, "top_p": limits.top_p}
        if limits.samples
        else {}
    )
    return GenerationConfig(
        max_new_tokens=prompts.new_tokens,
        do_sample=limits.samples,
        eos_token_id=None if limits.ignore_eos or not end_ids else end_ids,
        pad_token_id=pad_id,
        **sampling,
        **options,
    )


def synchronise(device: torch.device) -> None:
    """Waits until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
