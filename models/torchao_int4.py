"""torchao's 4-bit weights in groups of 128, in the layout of its own kernels."""

from dataclasses import dataclass
from typing import ClassVar

from models.machine import Machine
from models.technique import Recipe, Technique, missing_package


@dataclass(frozen=True)
class TorchaoInt4(Technique):
    """Stock generate on torchao's 4-bit products, which compute in bfloat16."""

    name: ClassVar[str] = "torchao_int4"
    summary: ClassVar[str] = "stock generate on torchao's 4-bit weights"

    def apply(self, recipe: Recipe) -> Recipe:
        return recipe.claim(decoder="stock", weights="torchao-int4", kv="dynamic", dtype="bfloat16")

    def unavailable(self, machine: Machine) -> str | None:
        if machine.device != "cuda":
            return f"torchao's 4-bit kernels need a CUDA device, and this run uses {machine.device}."
        return missing_package("torchao", "torchao")
