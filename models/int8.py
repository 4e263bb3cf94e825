"""Weights in 8 bits, one scale an output (absmax)."""

from dataclasses import dataclass
from typing import ClassVar

from models.lm_head import HELP, KEPT, check_head, with_head
from models.technique import Recipe, Technique, option


@dataclass(frozen=True)
class Int8(Technique):
    """Our engine on weights of 8 bits; embeddings and streams stay as they are, and unless told the LM head."""

    name: ClassVar[str] = "int8"
    summary: ClassVar[str] = "our engine on weights in 8 bits"

    lm_head: str = option(KEPT, HELP)

    def __post_init__(self) -> None:
        check_head(self.lm_head)

    def apply(self, recipe: Recipe) -> Recipe:
        return recipe.claim(weights=with_head("int8", self.lm_head))
