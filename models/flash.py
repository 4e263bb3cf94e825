"""Half precision with FlashAttention-2 kernels ("FlashAttention-2", arXiv 2307.08691)."""

from dataclasses import dataclass
from typing import ClassVar

from models.machine import Machine
from models.technique import HALF, Recipe, Technique

LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Flash(Technique):
    """Stock generate on the overlay's attention function: flash-attn where installed, else torch's built-in kernel."""

    name: ClassVar[str] = "flash"
    summary: ClassVar[str] = "half precision with FlashAttention-2 kernels"

    def apply(self, recipe: Recipe) -> Recipe:
        return recipe.claim(decoder="stock", dtype=HALF, attention="flash", kv="dynamic")

    def unavailable(self, machine: Machine) -> str | None:
        if machine.device != "cuda":
            return f"FlashAttention kernels need a CUDA device, and this run uses {machine.device}."
        if machine.capability is not None and machine.capability < LEAST_CAPABILITY:
            have = ".".join(map(str, machine.capability))
            return f"FlashAttention-2 needs compute capability 8.0 or newer; {machine.name} has {have}."
        return None
