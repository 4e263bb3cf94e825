"""The baseline in half precision."""

from dataclasses import dataclass
from typing import ClassVar

from models.technique import HALF, Recipe, Technique


@dataclass(frozen=True)
class Half(Technique):
    """As `naive`, in the run's dtype where that is a half type, else in bfloat16 (float16 overflows more easily)."""

    name: ClassVar[str] = "half"
    summary: ClassVar[str] = "stock generate in float16 or bfloat16"

    def apply(self, recipe: Recipe) -> Recipe:
        return recipe.claim(decoder="stock", dtype=HALF, attention="default", kv="dynamic")
