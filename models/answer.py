"""What goes to a loaded model and what comes back. No torch, plain values: these cross the process boundary as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

ON_LONG = ("truncate_left", "skip", "error")


@dataclass(frozen=True)
class Limits:
    """How long and by which rule to decode.

    Attributes:
        max_new_tokens: most tokens of an answer, the end-of-text token counted.
        temperature: 0 is greedy.
        top_k: sample from the k likeliest tokens; 0 for no limit.
        top_p: sample from the smallest set of tokens with this probability; 1 for no limit.
        seed: of sampling.
        ignore_eos: go on after the end-of-text token.
        on_long: what to do with a prompt that leaves no room for `max_new_tokens`: `truncate_left` keeps its last tokens; with
            `skip` and `error` it is decoded as far as positions reach, and one that leaves no position at all is an answer
            without tokens (`skip`) or a ValueError (`error`).
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    on_long: str = "truncate_left"

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 0, "0 or more"),
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "0 (greedy) or above"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0 and up to 1"),
            ("on_long", self.on_long in ON_LONG, f"one of {', '.join(ON_LONG)}"),
        )
        for name, holds, expected in checks:
            if not holds:
                raise ValueError(f"--{name} got {getattr(self, name)}, expected {expected}.")

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.temperature > 0


@dataclass(frozen=True)
class Generation:
    """The answer to one prompt.

    Attributes:
        token_ids: emitted ids, the end-of-text id included.
        text: their text without special tokens.
        prompt_tokens: tokens of the prompt that were used.
        ttft_s: seconds from submitting the call to its first token; `None` where no token was emitted.
        total_s: wall seconds of the call.
        steps: one mapping a decode step, the first token's pass excluded: `emitted`, `accepted`, `nodes` (draft tokens
            offered), and from our engine `rows`, `seconds`. Stock decoders without drafts emit one token a step.
        finish_reason: `eos`, `length` (max_new_tokens), `limit` (no position left) or `error`.
        fallbacks: what ran instead of what was asked for.
        truncated: whether the prompt was cut.
        phases_s: seconds by phase, only where they were asked for.
        call: index of the model call within the request; answers of one call share `total_s`.
        error: why there is no answer.
    """

    token_ids: list[int]
    text: str
    prompt_tokens: int
    ttft_s: float | None
    total_s: float
    steps: list[dict[str, Any]] | None
    finish_reason: str
    fallbacks: list[str] = field(default_factory=list)
    truncated: bool = False
    phases_s: dict[str, float] | None = None
    call: int = 0
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns JSON types."""
        return asdict(self)

    @classmethod
    def failed(cls, error: str) -> Generation:
        """Returns the answer of a prompt that could not be used."""
        return cls([], "", 0, None, 0.0, None, "error", error=error)


@dataclass(frozen=True)
class Perplexity:
    """How well the model predicts given text.

    Attributes:
        perplexity: exp(nll / tokens).
        nll: sum of the judged tokens' negative log-likelihoods, natural logarithm.
        tokens: how many were judged.
        window: most tokens of one pass; `None` where each text is one pass.
        stride: tokens from one window to the next; `None` likewise.
        skipped: texts left out, because nothing precedes their first token.
    """

    perplexity: float
    nll: float
    tokens: int
    window: int | None = None
    stride: int | None = None
    skipped: int = 0


@dataclass(frozen=True)
class Scores:
    """What the model says of given tokens, position by position, teacher-forced.

    Attributes:
        logprobs: log-probability of each given token.
        margins: logit of the likeliest token minus that of the second.
        gaps: logit of the likeliest token minus that of the given one; 0 where the given token is the likeliest.
    """

    logprobs: list[float]
    margins: list[float]
    gaps: list[float]

    def to_json(self) -> dict[str, Any]:
        """Returns JSON types."""
        return asdict(self)
