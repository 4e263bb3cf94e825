"""Builds dataclasses from JSON that anyone may have edited: every value is of the type its field names."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

Built = TypeVar("Built")
Check = Callable[[Any], bool]


def build(kind: Callable[..., Built], values: Any) -> Built:
    """Returns the dataclass with these fields, lists as tuples; names that it does not have are left out.

    Raises:
        TypeError: it is no object, or a field is missing or has another type.
    """
    if not isinstance(values, Mapping):
        raise TypeError("it is no object")
    checks = _checks(kind)
    known = {name: value for name, value in values.items() if name in checks}
    for name, value in known.items():
        if not checks[name](value):
            raise TypeError(f"'{name}' has a value of the wrong type")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})


@cache
def _checks(kind: Any) -> dict[str, Check]:
    hints = get_type_hints(kind)
    return {item.name: _check(hints[item.name]) for item in fields(kind)}


def _check(hint: Any) -> Check:
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda _: True
    if origin is UnionType:
        choices = [_check(part) for part in parts]
        return lambda value: any(choice(value) for choice in choices)
    if origin is tuple:
        item = _check(parts[0])
        length = None if parts[-1] is Ellipsis else len(parts)
        return lambda value: (
            isinstance(value, list | tuple) and length in (None, len(value)) and all(map(item, value))
        )
    if origin is Mapping:
        item = _check(parts[1])
        return lambda value: isinstance(value, Mapping) and all(map(item, value.values()))
    if hint is float:
        return lambda value: type(value) in (int, float) and math.isfinite(value)
    return lambda value: type(value) is hint
