"""The small model whose drafts upstream's assisted generation checks."""

from __future__ import annotations

from models.loading.checkpoint import read_config
from models.loading.weights import BuiltModel, build_model
from models.technique import Recipe


def build_assistant(
    recipe: Recipe, assistant: str | None, vocab_size: int, device: str, random_weights: bool
) -> BuiltModel | None:
    """Returns the assistant of a recipe in the recipe's dtype, upstream's own class, streams dropped; `None` where none drafts.

    Args:
        recipe: resolved.
        assistant: directory or hub id.
        vocab_size: the main model's; drafts are ids, so both must mean the same by them.
        device: where it goes.
        random_weights: draw the weights; `config.json` is enough then.

    Raises:
        ValueError: it is missing, unsafe, incomplete, or has another vocabulary.
    """
    if recipe.drafts != "assistant":
        return None
    if assistant is None:
        raise ValueError(
            "assisted needs a small draft model with the same vocabulary; name one with --assistant_model."
        )
    config = read_config(assistant)
    if config.vocab_size != vocab_size:
        raise ValueError(
            f"the assistant {assistant} has a vocabulary of {config.vocab_size} tokens, the model one of {vocab_size}; "
            "an assistant must share the model's tokenizer: choose a smaller model of the same family."
        )
    built = build_model(recipe, assistant, config, device, random_weights)
    return BuiltModel(built.model, [f"assistant: {reason}" for reason in built.fallbacks])
