"""What the decode loop records: a line a step, the totals of a call, and where the time went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers.generation import GenerateDecoderOnlyOutput

PHASES = ("prefill", "draft", "forward", "verify", "commit", "host")


@dataclass
class StepRecord:
    """One decode step.

    Attributes:
        emitted: tokens each sequence gained, after stop rules cut; 0 for one that had finished.
        accepted: draft tokens each sequence accepted before stop rules cut.
        drafted: draft tokens offered to each sequence, root excluded.
        rows: rows in the top layers.
        seconds: wall time of the step, from its start to the host's read.
        phases_s: seconds of each phase, only in a run that records phases.
    """

    emitted: list[int]
    accepted: list[int]
    drafted: int
    rows: int
    seconds: float
    phases_s: dict[str, float] | None = None


@dataclass
class GenerationStatistics:
    """What one call of `generate` did.

    Attributes:
        prompt_tokens: prompt length of each sequence, padding excluded.
        steps: the decode steps.
        ttft_s: seconds from the call to the first token on the host.
        total_s: seconds from the call to the last token on the host.
        finish_reasons: `eos`, `length` (max_new_tokens), `limit` (no position left) or `criteria`, for each sequence.
        kv_bytes: bytes of the cache.
        draft_nodes: nodes of the tree that was planned, root included.
        phases_s: seconds of each phase over the call, only in a run that records phases.
        runner: `cuda graph` where each step is one replay of a captured graph, else `eager`.
        fallbacks: why the runner is not the one that this device could have.
        capture_s: seconds spent capturing graphs for this call; no part of its times if they were prepared before.
        capture_bytes: device memory that the captured graphs hold.
    """

    prompt_tokens: list[int]
    steps: list[StepRecord] = field(default_factory=list)
    ttft_s: float = 0.0
    total_s: float = 0.0
    finish_reasons: list[str] = field(default_factory=list)
    kv_bytes: int = 0
    draft_nodes: int = 1
    phases_s: dict[str, float] | None = None
    runner: str = "eager"
    fallbacks: list[str] = field(default_factory=list)
    capture_s: float = 0.0
    capture_bytes: int = 0

    @property
    def acceptance_length(self) -> float | None:
        """Tokens emitted a decode step and sequence, bonus included; `None` without decode steps."""
        counts = [count for step in self.steps for count in step.emitted if count]
        return sum(counts) / len(counts) if counts else None


@dataclass
class SpecGenerateOutput(GenerateDecoderOnlyOutput):
    """Upstream's output of `generate` with the statistics of the call."""

    statistics: GenerationStatistics | None = None


class PhaseTimer:
    """Adds up the seconds of named phases; without `enabled` it does nothing and synchronises nothing."""

    def __init__(self, device: torch.device, enabled: bool, clock=time.perf_counter):
        self.device = device
        self.enabled = enabled
        self.clock = clock
        self.seconds: dict[str, float] = {}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Adds the time spent inside to `phase`."""
        if not self.enabled:
            yield
            return
        started = self._now()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self._now() - started

    def take(self) -> dict[str, float] | None:
        """Returns the seconds since the last call and starts anew; `None` where nothing is recorded."""
        if not self.enabled:
            return None
        seconds, self.seconds = self.seconds, {}
        return seconds
