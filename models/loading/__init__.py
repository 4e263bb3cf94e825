"""A recipe made real: the model, its tokenizer and the decoder that answers prompts. Only :func:`load` imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.answer import Generation, Limits, Perplexity, Scores
from models.machine import Machine
from models.technique import Recipe

if TYPE_CHECKING:
    from models.loading.loaded_model import LoadedModel

__all__ = ["Generation", "Limits", "Perplexity", "Scores", "load"]


def load(
    recipe: Recipe | Mapping[str, Any],
    checkpoint: str | Path,
    device: str,
    *,
    assistant: str | Path | None = None,
    draft_nodes: int | str = "auto",
    random_weights: bool = False,
) -> LoadedModel:
    """Returns the model of a recipe, ready to answer prompts.

    Args:
        recipe: what to load, or its JSON.
        checkpoint: directory or hub id.
        device: `cpu`, `cuda` or `cuda:N`.
        assistant: directory or hub id of the small model that drafts, where the recipe has one.
        draft_nodes: nodes of the draft tree where the recipe leaves them open.
        random_weights: draw the weights, the same for every recipe; `config.json` is enough then.

    Raises:
        ValueError: the checkpoint is unsafe, incomplete, of an unsupported architecture, or lacks what the recipe needs.
    """
    from models.loading.loaded_model import assemble

    wanted = recipe if isinstance(recipe, Recipe) else Recipe.from_json(recipe)
    resolved = wanted.resolved(Machine(device.partition(":")[0]))
    return assemble(
        resolved,
        str(checkpoint),
        device,
        assistant=None if assistant is None else str(assistant),
        draft_nodes=draft_nodes,
        random_weights=random_weights,
    )
