"""bitsandbytes' 4-bit normal floats ("QLoRA", arXiv 2305.14314), as upstream loads them."""

from dataclasses import dataclass
from typing import ClassVar

from models.machine import Machine
from models.technique import Recipe, Technique, missing_package


@dataclass(frozen=True)
class BnbNf4(Technique):
    """Stock generate on bitsandbytes' 4-bit products; they compute in the run's dtype."""

    name: ClassVar[str] = "bnb_nf4"
    summary: ClassVar[str] = "stock generate on bitsandbytes' NF4 weights"

    def apply(self, recipe: Recipe) -> Recipe:
        return recipe.claim(decoder="stock", weights="bnb-nf4", kv="dynamic")

    def unavailable(self, machine: Machine) -> str | None:
        del machine
        return missing_package("bitsandbytes", "bnb")
