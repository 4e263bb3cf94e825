"""Decoding with a KV cache that grows: the pair of `no_cache`."""

from dataclasses import dataclass
from typing import ClassVar

from models.technique import Recipe, Technique


@dataclass(frozen=True)
class KvCache(Technique):
    """Stock generate with upstream's dynamic cache, in the run's dtype."""

    name: ClassVar[str] = "kv_cache"
    summary: ClassVar[str] = "stock generate with KV reuse"

    def apply(self, recipe: Recipe) -> Recipe:
        return recipe.claim(decoder="stock", kv="dynamic")
