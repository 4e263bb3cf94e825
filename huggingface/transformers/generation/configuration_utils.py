"""Deep copies of a generation configuration without copying what cannot change.

Upstream copies the caller's configuration and the model's in every call of `generate`, field by field: some seventy numbers,
strings and `None`, and hardly ever a list. The rest of its preparation is called as it is,
https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/generation/utils.py, `_prepare_generation_config`.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

from transformers import GenerationConfig, GenerationMixin

PLAIN = frozenset((bool, int, float, str, type(None)))
"""Types whose values are their own deep copies."""


def prepare_generation_config(
    model: Any, generation_config: GenerationConfig | None, **kwargs: Any
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Returns what upstream's `_prepare_generation_config` does: a configuration of the call's own, and what is no part of it."""
    # Upstream's method reads nothing else of a model.
    seen: Any = SimpleNamespace(config=model.config, generation_config=_copied(model.generation_config))
    return GenerationMixin._prepare_generation_config(seen, _copied(generation_config), **kwargs)


def _copied(config: Any) -> Any:
    # A subclass may have its own mind about copies.
    return _Copied(config) if type(config) is GenerationConfig else config


class _Copied:
    """Stands for a configuration where upstream copies it; the copies are what upstream would get."""

    def __init__(self, config: GenerationConfig):
        self._plain = {
            name: value
            for name, value in config.__dict__.items()
            if type(value) in PLAIN and not name.startswith("_")
        }
        # Private fields too: upstream leaves out some of them.
        self._rest = {name: value for name, value in config.__dict__.items() if name not in self._plain}
        self._get_default_generation_params = config._get_default_generation_params

    def __deepcopy__(self, memo: dict[int, Any]) -> GenerationConfig:
        return _with_fields(self._plain | copy.deepcopy(self._rest, memo))

    def to_dict(self) -> dict[str, Any]:
        """Returns the copied fields as upstream would, without those that it leaves out."""
        return self._plain | _with_fields(self._rest).to_dict()


def _with_fields(values: dict[str, Any]) -> GenerationConfig:
    config = GenerationConfig.__new__(GenerationConfig)
    config.__dict__.update(values)
    return config
