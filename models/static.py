"""Our engine with an empty tree: what it gains before any speculation."""

from dataclasses import dataclass
from typing import ClassVar

from models.technique import Recipe, Technique


@dataclass(frozen=True)
class Static(Technique):
    """The decode loop of `spec_stream` with nothing drafted: the same cache, attention and timers."""

    name: ClassVar[str] = "static"
    summary: ClassVar[str] = "our engine with an empty draft tree and a static cache"

    def apply(self, recipe: Recipe) -> Recipe:
        return recipe.claim(decoder="engine")
