"""Chooses which layers keep more bits: greedily, by what a byte more buys.

A plan begins with every layer in the trial format. Each step gives one group of layers a wider format, INT8 or half precision: of
all that fit the budget, the step whose measured damage avoided per byte added is largest. Damages add up as if layers did not
know of each other, which is an approximation; so the plans themselves are measured too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.precision_plan import PLAIN
from precision.units import inseparable

DEFAULT, INT8 = "default", "int8"
FORMATS = (DEFAULT, INT8, PLAIN)


@dataclass(frozen=True)
class Group:
    """Linear layers that have one format in a plan.

    Attributes:
        modules: their full names.
        damage: format -> mean negative log-likelihood a token that it adds, measured alone; a plain layer adds none.
        bytes: format -> bytes of the stored weights.
    """

    modules: tuple[str, ...]
    damage: Mapping[str, float]
    bytes: Mapping[str, int]


def groups(rows: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Returns what a plan decides about, from the measured units: units that one product reads are joined."""
    found = []
    for indices in inseparable([row["modules"] for row in rows]):
        part = [rows[index] for index in indices]
        damage = {DEFAULT: sum(row["nll_change"] for row in part), PLAIN: 0.0}
        if all(row["int8_nll_change"] is not None for row in part):
            damage[INT8] = sum(row["int8_nll_change"] for row in part)
        sizes = {name: sum(row["bytes"][name] for row in part) for name in damage}
        found.append(Group(tuple(name for row in part for name in row["modules"]), damage, sizes))
    return found


def choose(every: Sequence[Group], budget: float) -> list[str]:
    """Returns the format of each group under a budget.

    Args:
        every: what is decided about.
        budget: most bytes, as a multiple of those with every group in its default format.
    """
    chosen = [DEFAULT] * len(every)
    most = budget * sum(group.bytes[DEFAULT] for group in every)
    spent = sum(group.bytes[DEFAULT] for group in every)
    while True:
        steps = []
        for index, group in enumerate(every):
            now = chosen[index]
            for name in FORMATS:
                if name not in group.bytes or group.bytes[name] <= group.bytes[now]:
                    continue
                added, gain = group.bytes[name] - group.bytes[now], group.damage[now] - group.damage[name]
                if gain > 0 and spent + added <= most:
                    steps.append((gain / added, -index, added, name))
        if not steps:
            return chosen
        _, place, added, name = max(steps)
        chosen[-place] = name
        spent += added


def plan(every: Sequence[Group], chosen: Sequence[str], default: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a plan's `default` and `modules`.

    Args:
        every: what is decided about.
        chosen: the format of each.
        default: the default format's fields.
    """
    formats: dict[str, Any] = {INT8: {"bits": 8}, PLAIN: PLAIN}
    modules = {
        module: formats[name]
        for group, name in zip(every, chosen, strict=True)
        if name != DEFAULT
        for module in group.modules
    }
    return {"default": dict(default), "modules": dict(sorted(modules.items()))}


def expected_change(every: Sequence[Group], chosen: Sequence[str]) -> float:
    """Returns the mean negative log-likelihood a token that a plan adds, were damages to add up."""
    return sum(group.damage[name] for group, name in zip(every, chosen, strict=True))
