"""The techniques behind `--model_type`, one a file. Importing this package imports no torch.

A new technique is a file, a line in `TECHNIQUES` and a test.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from models.answer import Generation, Limits, Scores
from models.assisted import Assisted
from models.awq import Awq
from models.bnb_int8 import BnbInt8
from models.bnb_nf4 import BnbNf4
from models.flash import Flash
from models.half import Half
from models.int4 import Int4
from models.int8 import Int8
from models.kv_cache import KvCache
from models.machine import Machine
from models.naive import Naive
from models.no_cache import NoCache
from models.prompt_lookup import PromptLookup
from models.spec_stream import SpecStream
from models.static import Static
from models.technique import Recipe, Technique, combine
from models.torchao_int4 import TorchaoInt4

__all__ = [
    "TECHNIQUES",
    "Generation",
    "Limits",
    "Machine",
    "Recipe",
    "Scores",
    "Technique",
    "build",
    "fold",
    "largest_batch",
    "unavailable",
]

TECHNIQUES: dict[str, type[Technique]] = {
    technique.name: technique
    for technique in (
        Naive,
        Half,
        Flash,
        NoCache,
        KvCache,
        Static,
        Int8,
        Int4,
        Awq,
        BnbInt8,
        BnbNf4,
        TorchaoInt4,
        PromptLookup,
        Assisted,
        SpecStream,
    )
}
RESERVED = ("kv_int8", "kv_int4", "kv_prune_tensor", "kv_prune_channel")


def build(names: str, flags: Mapping[str, Any] | None = None) -> list[Technique]:
    """Returns the techniques of one entry of `--model_type`, such as `spec_stream` or `int4+spec_stream`.

    Args:
        names: one name, or several joined by `+`.
        flags: options by flag name; each technique takes those that are its fields.

    Raises:
        ValueError: an unknown or repeated name, or a value out of range.
    """
    parts = [part.strip() for part in names.split("+")]
    for part in parts:
        if parts.count(part) > 1:
            raise ValueError(f"{names}: '{part}' is named twice.")
    given = flags or {}
    techniques = []
    for part in parts:
        technique = _class_of(part)
        # The base class is no dataclass; every technique is one.
        own = {item.name for item in fields(technique)}  # type: ignore[arg-type]
        techniques.append(technique(**{name: given[name] for name in own if name in given}))
    return techniques


def fold(
    names: str,
    flags: Mapping[str, Any] | None = None,
    machine: Machine | Mapping[str, Any] | None = None,
) -> Recipe:
    """Returns the recipe of one entry of `--model_type`.

    Args:
        names: one name, or several joined by `+`.
        flags: options by flag name; besides the techniques' own, `dtype` and `attn_implementation` fill open slots.
        machine: where it will run, or a worker's description of it; without it, open slots stay open until the recipe is
            loaded.

    Raises:
        ValueError: unknown name, clash of slots, or a value out of range; the message says what to do.
    """
    recipe = combine(build(names, flags))
    if machine is None:
        return recipe
    given = flags or {}
    try:
        return recipe.resolved(
            Machine.of(machine), given.get("dtype", "auto"), given.get("attn_implementation", "auto")
        )
    except ValueError as error:
        raise ValueError(f"{names}: {error}") from None


def unavailable(
    names: str, machine: Machine | Mapping[str, Any], flags: Mapping[str, Any] | None = None
) -> str | None:
    """Returns why an entry of `--model_type` cannot run on this machine with these flags, or `None` if it can."""
    reasons = (technique.unavailable(Machine.of(machine)) for technique in build(names, flags))
    return next((reason for reason in reasons if reason), None)


def largest_batch(names: str) -> int | None:
    """Returns how many prompts an entry of `--model_type` answers at once at most, `None` for no limit."""
    limits = [technique.largest_batch for technique in build(names)]
    return min((limit for limit in limits if limit is not None), default=None)


def _class_of(name: str) -> type[Technique]:
    if name in TECHNIQUES:
        return TECHNIQUES[name]
    if name in RESERVED:
        raise ValueError(f"technique '{name}' is not built yet; available: {', '.join(TECHNIQUES)}.")
    near = difflib.get_close_matches(name, TECHNIQUES, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"available: {', '.join(TECHNIQUES)}."
    raise ValueError(f"unknown technique '{name}': {hint}")
