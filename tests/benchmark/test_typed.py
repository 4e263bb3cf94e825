"""Every kind of field that a saved file's dataclass has, with a value of its type and one of another."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from benchmark.typed import build


@dataclass(frozen=True)
class Kind:
    name: str
    number: int = 0
    seconds: float | None = None
    ids: tuple[int, ...] = ()
    pair: tuple[float, float] | None = None
    table: Mapping[str, float] | None = None
    anything: Any = None


def test_lists_become_tuples_and_unknown_names_are_left_out():
    values = {
        "name": "a",
        "number": 1,
        "seconds": 2,
        "ids": [1],
        "pair": [1, 2.5],
        "table": {"a": 1},
        "new": 3,
    }
    assert build(Kind, values) == Kind("a", 1, 2, (1,), (1, 2.5), {"a": 1})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", None),
        ("number", 1.0),
        ("number", True),
        ("seconds", "1"),
        ("seconds", float("inf")),
        ("ids", "12"),
        ("ids", [1.5]),
        ("pair", [1.0]),
        ("table", {"a": "b"}),
        ("table", [1]),
    ],
)
def test_another_type_is_refused_by_name(field, value):
    with pytest.raises(TypeError, match=f"'{field}' has a value of the wrong type"):
        build(Kind, {"name": "a", field: value})


@pytest.mark.parametrize("values", [None, [], 3, {}])
def test_what_is_no_such_object_is_refused(values):
    with pytest.raises(TypeError):
        build(Kind, values)
