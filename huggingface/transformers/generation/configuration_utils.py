"""The generation configuration of a call, as upstream prepares it, without doing again what was done for the call before.

Upstream copies the caller's configuration and the model's in every call of `generate`, field by field, some seventy numbers,
strings and `None`, and compares the model's configuration with its defaults. Then it sends the special tokens to the device and
asks it twice about them. A small model's first token waits for that. Here the copies leave out what cannot change, and where
everything that was looked at is as it was in the last call, so is the outcome. The rest of upstream's preparation is called as it
is: `_prepare_generation_config` and `_prepare_special_tokens` of
https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/generation/utils.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin

PLAIN = frozenset((bool, int, float, str, type(None)))
"""Types whose values are their own deep copies."""
PREPARED, SPECIAL = "_prepared_generation_config", "_prepared_special_tokens"
"""Where a model keeps the outcomes of its last call."""
TOKENS = ("bos", "eos", "pad", "decoder_start")
"""Special tokens: of each a configuration has an id and, once prepared, a tensor."""

Fields = dict[str, Any]


def prepare_generation_config(
    model: Any, generation_config: GenerationConfig | None, **kwargs: Any
) -> tuple[GenerationConfig, Fields]:
    """Returns what upstream's `_prepare_generation_config` does: a configuration of the call's own, and what is no part of it."""
    looked_at = _looked_at(model, generation_config, kwargs)
    known = model.__dict__.get(PREPARED)
    if known is not None and _same(known.looked_at, looked_at):
        return _with_fields(_deep_copied(known.fields)), {name: kwargs[name] for name in known.left}
    # Upstream's method reads nothing else of a model.
    seen: Any = SimpleNamespace(config=model.config, generation_config=_copied(model.generation_config))
    config, left = GenerationMixin._prepare_generation_config(seen, _copied(generation_config), **kwargs)
    tensors = {name for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
    if type(config) is GenerationConfig and tensors <= left.keys() <= kwargs.keys():
        fields = _deep_copied(config.__dict__)
        model.__dict__[PREPARED] = _Prepared(_kept(looked_at), fields, tuple(left))
    return config, left


def prepare_special_tokens(
    model: Any, config: GenerationConfig, prepare: Callable[[], None], device: Any, warns: bool
) -> None:
    """Gives `config` the tensors of its special tokens, those of the last call if it had the same.

    Args:
        model: keeps them.
        config: of the call; changed in place.
        prepare: does it upstream's way.
        device: of the tensors.
        warns: whether upstream may have something to say of a missing mask.
    """
    ids = [getattr(config, f"{name}_token_id") for name in TOKENS]
    asked, known = (*ids, str(device)), model.__dict__.get(SPECIAL)
    fields = [f"_{name}_token_tensor" for name in TOKENS]
    if known is not None and not warns and _same(known[0], asked):
        config.__dict__.update(zip(fields, known[1], strict=True))
        return
    prepare()
    # Of other ids upstream warns in every call.
    if all(one is None or _are_ids(one) for one in ids):
        kept = tuple(list(one) if isinstance(one, list) else one for one in asked)
        model.__dict__[SPECIAL] = (kept, [getattr(config, field) for field in fields])


def _are_ids(given: Any) -> bool:
    return all(type(one) is int and one >= 0 for one in (given if isinstance(given, list) else [given]))


@dataclass(frozen=True)
class _Prepared:
    """A call's preparation.

    Attributes:
        looked_at: everything that decides about it.
        fields: of the prepared configuration.
        left: names of the arguments that are no part of it.
    """

    looked_at: tuple[Any, ...]
    fields: Fields
    left: tuple[str, ...]


def _looked_at(model: Any, config: GenerationConfig | None, kwargs: Fields) -> tuple[Any, ...]:
    """Returns what upstream's preparation depends on, with the types of what may be equal to a value of another type.

    Tensors are no part of a configuration; it only matters that they are there.
    """
    given = {name: None if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
    parts = (
        model.config.__dict__,
        model.generation_config.__dict__,
        {} if config is None else config.__dict__,
        given,
    )
    types = tuple([*map(type, part.values())] for part in parts)
    return (type(model.generation_config), type(config), *types, *parts)


def _kept(looked_at: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the same with fields of its own, which stay as they are when somebody changes a configuration."""
    *first, model_fields, held, given, arguments = looked_at
    # Of the model's own configuration upstream looks at the fields alone, not into them.
    return (*first, dict(model_fields), *map(_deep_copied, (held, given, arguments)))


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    try:
        return one == other
    except (RuntimeError, ValueError):  # arrays and tensors of several numbers are not simply equal
        return False


def _deep_copied(fields: Fields) -> Fields:
    rest = {name: value for name, value in fields.items() if type(value) not in PLAIN}
    return fields | copy.deepcopy(rest)


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

    def to_dict(self) -> Fields:
        """Returns the copied fields as upstream would, without those that it leaves out."""
        return self._plain | _with_fields(self._rest).to_dict()


def _with_fields(values: Fields) -> GenerationConfig:
    config = GenerationConfig.__new__(GenerationConfig)
    config.__dict__.update(values)
    return config
