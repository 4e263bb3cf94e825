"""What a checkpoint's `generation_config.json` says of drafting: calibrated accuracies, tuned trees."""

from __future__ import annotations

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
    """Returns what the checkpoint's `generation_config.json` says of drafting; empty if nothing."""
    held = getattr(model.generation_config, CONFIG_KEY, None)
    if held is not None and not isinstance(held, DraftSettings):
        setattr(model.generation_config, CONFIG_KEY, DraftSettings(held))
    return dict(held or {})


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
