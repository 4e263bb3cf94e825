"""Speculative streaming ("Speculative Streaming: Fast LLM Inference without Auxiliary Models", arXiv 2402.11131)."""

from dataclasses import dataclass
from typing import ClassVar

from models.technique import Recipe, Technique, option


@dataclass(frozen=True)
class SpecStream(Technique):
    """Our engine with a draft tree from the checkpoint's streams, verified in the same forward pass."""

    name: ClassVar[str] = "spec_stream"
    summary: ClassVar[str] = "speculative streaming"

    draft_nodes: int | str = option("auto", "nodes of the draft tree; auto takes the tuned number")

    def __post_init__(self) -> None:
        nodes = self.draft_nodes
        if nodes != "auto" and (not isinstance(nodes, int) or nodes < 1):
            raise ValueError(f"--draft_nodes got {nodes}, expected auto or 1 or more.")

    def apply(self, recipe: Recipe) -> Recipe:
        return recipe.claim(
            decoder="engine", drafts="streams", generate_options={"draft_nodes": self.draft_nodes}
        )
