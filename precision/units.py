"""What is quantised alone: a linear layer, all of a decoder layer, or all of one kind; and what a plan must not take apart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MODULE, LAYER, PROJECTION = "module", "layer", "projection"
BY = (LAYER, PROJECTION, MODULE)
NUMBERED = re.compile(r"^.*?\.(\d+)\.(.+)$")
ALL = "all"
OUTSIDE = "outside"
"""The layer of a linear layer that belongs to none."""
FUSED = (frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"}))
"""Projections that the fused engine reads in one product, which needs one format."""


@dataclass(frozen=True)
class Unit:
    """Linear layers that are quantised together.

    Attributes:
        name: the unit's own.
        modules: full names of its linear layers.
        layer: number of its decoder layer, `outside` or `all`.
        part: its place within a layer, or `all`.
    """

    name: str
    modules: tuple[str, ...]
    layer: str
    part: str


def place(module: str) -> tuple[str, str]:
    """Returns the layer of a linear layer, by its full name, and its place within."""
    found = NUMBERED.match(module)
    return (found[1], found[2]) if found else (OUTSIDE, module)


def units(modules: Iterable[str], by: str) -> list[Unit]:
    """Returns the units of a model's linear layers, in the model's order.

    Args:
        modules: their full names.
        by: `module`, `layer` or `projection`.
    """
    members: dict[tuple[str, str, str], list[str]] = {}
    for module in modules:
        layer, part = place(module)
        key = {
            MODULE: (module, layer, part),
            LAYER: (f"layer {layer}", layer, ALL),
            PROJECTION: (part, ALL, part),
        }[by]
        members.setdefault(key, []).append(module)
    return [Unit(name, tuple(found), layer, part) for (name, layer, part), found in members.items()]


def inseparable(sets: Sequence[Sequence[str]]) -> list[list[int]]:
    """Returns which of these sets of modules must share a format, as groups of their indices, in order.

    Args:
        sets: names of modules. Two sets go together if one product reads a module of each.
    """
    groups: list[tuple[set[str], list[int]]] = []
    for index, modules in enumerate(sets):
        keys, members = {_product(module) for module in modules}, [index]
        for group in [one for one in groups if one[0] & keys]:
            groups.remove(group)
            keys |= group[0]
            members = group[1] + members
        groups.append((keys, members))
    return sorted(sorted(members) for _, members in groups)


def _product(module: str) -> str:
    """Returns a name for the product that reads a module."""
    parent, _, own = module.rpartition(".")
    together = next((names for names in FUSED if own in names), None)
    return module if together is None else f"{parent}.{'+'.join(sorted(together))}"
