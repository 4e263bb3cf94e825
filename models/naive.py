"""The baseline: upstream's own class and generate, float32, dynamic cache."""

from dataclasses import dataclass
from typing import ClassVar

from models.technique import Recipe, Technique


@dataclass(frozen=True)
class Naive(Technique):
    """Upstream untouched, with its default attention and the checkpoint's main weights."""

    name: ClassVar[str] = "naive"
    summary: ClassVar[str] = "stock generate in float32 with a dynamic cache"

    def apply(self, recipe: Recipe) -> Recipe:
        return recipe.claim(decoder="stock", dtype="float32", attention="default", kv="dynamic")
