"""What a checkpoint's `generation_config.json` says of drafting: calibrated accuracies, tuned trees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONFIG_KEY = "spec_stream"
"""Name under which `generation_config.json` keeps accuracies and tuned sizes."""
UNCALIBRATED = (0.6, 0.15, 0.06, 0.03)
"""Rank accuracies assumed for every stream of a model that was never calibrated."""


class DraftSettings(dict[str, Any]):
    """What a checkpoint's `generation_config.json` says of drafting; never changed in place.

    Upstream copies the generation configuration several times a call. Copies of this share it: copying some hundred accuracies
    number by number takes a tenth of a millisecond and more, which a small model's first token would wait for.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> DraftSettings:
        return self


def saved_settings(model) -> dict[str, Any]:
    """Returns what the checkpoint's `generation_config.json` says of drafting; empty if nothing.

    Raises:
        ValueError: it says something that is no such setting.
    """
    held = getattr(model.generation_config, CONFIG_KEY, None)
    if held is not None and not isinstance(held, DraftSettings):
        _check(held)
        setattr(model.generation_config, CONFIG_KEY, DraftSettings(held))
    return dict(held or {})


def _check(held: Any) -> None:
    if not isinstance(held, Mapping):
        raise _wrong("", "an object", held)
    accuracy = held.get("rank_accuracy") or ()
    if not (isinstance(accuracy, list | tuple) and all(_are_numbers(ranks) for ranks in accuracy)):
        raise _wrong(".rank_accuracy", "a list of numbers for each stream", accuracy)
    nodes = held.get("draft_nodes") or {}
    if not isinstance(nodes, Mapping):
        raise _wrong(".draft_nodes", "an object", nodes)


def _are_numbers(ranks: Any) -> bool:
    return (
        isinstance(ranks, list | tuple) and bool(ranks) and all(isinstance(one, int | float) for one in ranks)
    )


def _wrong(name: str, expected: str, held: Any) -> ValueError:
    return ValueError(
        f"generation_config.json: {CONFIG_KEY}{name} must be {expected}, got {str(held)[:40]!r}; restore the file, or take the "
        "entry out."
    )


def update_settings(model, **values: Any) -> None:
    """Adds to what the model's `generation_config` says of drafting; `save_pretrained` then keeps it."""
    setattr(model.generation_config, CONFIG_KEY, DraftSettings({**saved_settings(model), **values}))
    # Upstream drops everything it does not know from a generation configuration that it derived itself.
    model.generation_config._from_model_config = False
    # Captured steps hold what was drafted by before.
    model.__dict__.pop("_graph_runners", None)


def rank_accuracy(model) -> list[list[float]]:
    """Returns the calibrated accuracy of each stream and rank, or a cautious guess for a model never calibrated."""
    saved = saved_settings(model).get("rank_accuracy")
    return saved or [list(UNCALIBRATED)] * model.streams.config.streams
