"""Weights in 8 bits, one scale an output (absmax)."""

from dataclasses import dataclass
from typing import ClassVar

from models.technique import Recipe, Technique


@dataclass(frozen=True)
class Int8(Technique):
    """Our engine on weights of 8 bits; the LM head, embeddings and streams stay as they are."""

    name: ClassVar[str] = "int8"
    summary: ClassVar[str] = "our engine on weights in 8 bits"

    def apply(self, recipe: Recipe) -> Recipe:
        return recipe.claim(weights="int8")
