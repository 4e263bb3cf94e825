"""Watches upstream's loop from outside: when the first token came, each pass's rows, and how long the text was after it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria

from models.loading.calls import synchronise


@dataclass
class Passes:
    """Forward passes of one model during a call.

    Attributes:
        rows: rows of each pass.
        starts: when each began, where they were timed.
        seconds: how long each took, where they were timed.
        cache: the cache that the last one left.
    """

    rows: list[int] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cache: Any = None

    def seconds_since(self, moment: float) -> float:
        """Returns the seconds of the passes that began after a moment."""
        both = zip(self.starts, self.seconds, strict=True)
        return sum(seconds for start, seconds in both if start >= moment)


class FirstToken(StoppingCriteria):
    """Never stops; notes when the first token came and how long the sequence was after each pass.

    A streamer would move every token to the host and so change what is measured.

    Args:
        device: synchronised at the first token.
        passes: the call's passes where they are watched. Upstream's speculation (5.17) also asks about drafts that no pass
            has seen yet; such a question is told by no pass having come before it.
    """

    def __init__(self, device: torch.device, passes: Passes | None = None):
        self.device = device
        self.passes = passes
        self.started = 0.0
        self.seconds = 0.0
        self.lengths: list[int] = []
        self._never: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Returns (batch,) False."""
        del scores, kwargs
        if self._never is None:
            self._never = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if self.passes is not None and len(self.passes.rows) == len(self.lengths):
            return self._never
        if not self.lengths:
            synchronise(self.device)
            self.seconds = time.perf_counter() - self.started
        self.lengths.append(input_ids.shape[1])
        return self._never


@contextmanager
def watched_passes(model: Any, timed: bool) -> Iterator[Passes]:
    """Notes every forward pass of a model inside; `timed` also synchronises around each, which slows the call."""
    passes = Passes()

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        passes.rows.append(ids.shape[1])
        if timed:
            synchronise(model.device)
            passes.starts.append(time.perf_counter())

    def after(_module: Any, _args: tuple[Any, ...], output: Any) -> None:
        passes.cache = output.past_key_values
        if timed:
            synchronise(model.device)
            passes.seconds.append(time.perf_counter() - passes.starts[-1])

    hooks = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()
