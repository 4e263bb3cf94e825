"""Decoding that recomputes the whole sequence for every token: what the KV cache saves."""

from dataclasses import dataclass
from typing import ClassVar

from models.technique import Recipe, Technique


@dataclass(frozen=True)
class NoCache(Technique):
    """Stock generate without KV reuse, in the run's dtype."""

    name: ClassVar[str] = "no_cache"
    summary: ClassVar[str] = "stock generate without KV reuse"

    def apply(self, recipe: Recipe) -> Recipe:
        return recipe.claim(decoder="stock", kv="none")
