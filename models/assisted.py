"""Upstream's assisted generation ("Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192)."""

from dataclasses import dataclass
from typing import ClassVar

from models.machine import Machine
from models.technique import Recipe, Technique, option

SCHEDULES = ("constant", "heuristic_transient")


@dataclass(frozen=True)
class Assisted(Technique):
    """Stock generate with drafts of a small model that shares the vocabulary; upstream runs it at batch size 1 alone.

    Options and defaults are upstream's. Two of its heuristics adapt while it decodes, each anew for every prompt, so that answers
    do not depend on what was asked before: the schedule `heuristic_transient`, and, where scikit-learn is installed, the
    confidence threshold. Its schedule `heuristic` keeps the adapted number from prompt to prompt and is refused.
    """

    name: ClassVar[str] = "assisted"
    summary: ClassVar[str] = "upstream's speculation with the drafts of a small model (--assistant_model)"
    largest_batch: ClassVar[int | None] = 1

    assistant_model: str | None = option(None, "draft model of the technique 'assisted'")
    num_assistant_tokens: int = option(20, "most tokens that the assistant drafts a step")
    num_assistant_tokens_schedule: str = option(
        "constant",
        "constant, or heuristic_transient: 2 more after a draft that was right to its end, else 1 less",
    )
    assistant_confidence_threshold: float = option(
        0.4, "the assistant stops drafting after a token it gives less probability than this; 0 is off"
    )

    def __post_init__(self) -> None:
        checks = (
            ("num_assistant_tokens", self.num_assistant_tokens >= 1, "1 or more"),
            (
                "num_assistant_tokens_schedule",
                self.num_assistant_tokens_schedule in SCHEDULES,
                f"one of {', '.join(SCHEDULES)}",
            ),
            (
                "assistant_confidence_threshold",
                0.0 <= self.assistant_confidence_threshold <= 1.0,
                "a number from 0 to 1",
            ),
        )
        for flag, holds, expected in checks:
            if not holds:
                raise ValueError(f"--{flag} got {getattr(self, flag)}, expected {expected}.")

    def apply(self, recipe: Recipe) -> Recipe:
        return recipe.claim(
            decoder="stock",
            kv="dynamic",
            drafts="assistant",
            generate_options={
                "num_assistant_tokens": self.num_assistant_tokens,
                "num_assistant_tokens_schedule": self.num_assistant_tokens_schedule,
                "assistant_confidence_threshold": self.assistant_confidence_threshold,
            },
        )

    def unavailable(self, machine: Machine) -> str | None:
        del machine
        if self.assistant_model is None:
            return "it needs a small draft model with the same vocabulary; name one with --assistant_model."
        return None
