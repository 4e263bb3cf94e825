"""Upstream's prompt lookup decoding: n-grams of the context proposed as the next tokens."""

from dataclasses import dataclass
from typing import ClassVar

from models.technique import Recipe, Technique, option


@dataclass(frozen=True)
class PromptLookup(Technique):
    """Stock generate with drafts looked up in the prompt; upstream runs it at batch size 1 alone."""

    name: ClassVar[str] = "prompt_lookup"
    summary: ClassVar[str] = "upstream's speculation with n-grams of the context"
    largest_batch: ClassVar[int | None] = 1

    prompt_lookup_num_tokens: int = option(10, "tokens that prompt_lookup proposes a step")
    max_matching_ngram_size: int = option(2, "longest n-gram that prompt_lookup looks for")

    def __post_init__(self) -> None:
        for flag in ("prompt_lookup_num_tokens", "max_matching_ngram_size"):
            if getattr(self, flag) < 1:
                raise ValueError(f"--{flag} got {getattr(self, flag)}, expected 1 or more.")

    def apply(self, recipe: Recipe) -> Recipe:
        return recipe.claim(
            decoder="stock",
            kv="dynamic",
            drafts="prompt_lookup",
            generate_options={
                "prompt_lookup_num_tokens": self.prompt_lookup_num_tokens,
                "max_matching_ngram_size": self.max_matching_ngram_size,
            },
        )
