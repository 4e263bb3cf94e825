"""bitsandbytes' 8-bit weights ("LLM.int8()", arXiv 2208.07339), as upstream loads them."""

from dataclasses import dataclass
from typing import ClassVar

from models.machine import Machine
from models.technique import Recipe, Technique, missing_package


@dataclass(frozen=True)
class BnbInt8(Technique):
    """Stock generate on bitsandbytes' 8-bit products, which keep large inputs in half precision."""

    name: ClassVar[str] = "bnb_int8"
    summary: ClassVar[str] = "stock generate on bitsandbytes' 8-bit weights"

    def apply(self, recipe: Recipe) -> Recipe:
        return recipe.claim(decoder="stock", weights="bnb-int8", kv="dynamic")

    def unavailable(self, machine: Machine) -> str | None:
        del machine
        return missing_package("bitsandbytes", "bnb")
