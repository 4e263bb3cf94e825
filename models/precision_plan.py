"""Precision plans: which linear layers of a model keep more bits than the rest. Read and checked without torch.

    {"default": {"bits": 4, "group_size": 128},
     "modules": {"transformer.h.0.mlp.c_proj": {"bits": 8}, "transformer.h.1.mlp.c_fc": "plain"}}

`sensitivity.py` writes them; `--precision_plan` of `int4` reads them. What else `sensitivity.py` writes there is for people.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PLAIN = "plain"
"""The format of a layer that is not quantised."""
MEANING = ("default", "modules")
NOTES = ("model", "budget", "bytes", "default_bytes", "text", "expected_nll_change", "perplexity_ratio")
"""Fields that say where a plan comes from; nothing reads them."""
FORMAT_FIELDS = ("bits", "group_size", "zero_point")
GROUP_SIZES = (32, 64, 128)
MOST_BYTES = 16 << 20

Format = dict[str, Any] | str


def read_plan(path: str | Path, flag: str = "--precision_plan") -> dict[str, Any]:
    """Returns a plan's meaning: `default` and `modules`, every format with all its fields.

    Args:
        path: a JSON file.
        flag: who asks, for messages.

    Raises:
        ValueError: it cannot be read, or is no plan; the message says where.
    """
    try:
        file = Path(path).expanduser()
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"{flag} {path} has {file.stat().st_size} bytes: that is no plan.")
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{flag} {path} cannot be read ({error.strerror}); sensitivity.py writes plans."
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{flag} {path} is no JSON ({error}); write it anew with sensitivity.py.") from None
    try:
        return normal_plan(values)
    except ValueError as error:
        raise ValueError(f"{flag} {path}: {error}") from None


def normal_plan(values: Any) -> dict[str, Any]:
    """Returns the meaning of a plan, so that equal plans are equal objects. Raises ValueError if it is none."""
    if not isinstance(values, Mapping):
        raise ValueError("a plan is an object with 'default' and 'modules'.")
    for name in values:
        if name not in (*MEANING, *NOTES):
            raise ValueError(f"a plan has no field '{name}'{_near(name, (*MEANING, *NOTES))}.")
    default = normal_format(values.get("default"), "'default'")
    if default == PLAIN:
        raise ValueError("'default' is 'plain', expected a format: a plan says what is not quantised.")
    modules = values.get("modules", {})
    if not isinstance(modules, Mapping):
        raise ValueError("'modules' is no object of module names and formats.")
    return {
        "default": default,
        "modules": {name: normal_format(modules[name], f"module '{name}'") for name in sorted(modules)},
    }


def normal_format(value: Any, where: str) -> Format:
    """Returns `plain`, or a format with all its fields.

    Args:
        value: `plain`, or an object with `bits` and what goes with it.
        where: what has this format, for messages.

    Raises:
        ValueError: it is no format that weights can have.
    """
    if value == PLAIN:
        return PLAIN
    if not isinstance(value, Mapping):
        raise ValueError(f'{where} is {value!r}, expected "plain" or an object such as {{"bits": 8}}.')
    for name in value:
        if name not in FORMAT_FIELDS:
            raise ValueError(f"{where} has an unknown field '{name}'{_near(name, FORMAT_FIELDS)}.")
    bits, size, zero = (value.get("bits"), value.get("group_size"), value.get("zero_point", False))
    if type(bits) is not int or bits not in (4, 8):
        raise ValueError(f"{where} has {bits!r} bits, expected 4 or 8.")
    if size is not None and (type(size) is not int or bits == 8 or size not in GROUP_SIZES):
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise ValueError(
            f"{where} has groups of {size!r} with {bits} bits; groups go with 4 bits and hold {sizes}."
        )
    if type(zero) is not bool or (zero and size is None):
        raise ValueError(
            f"{where} has zero_point {zero!r}; it is true or false, and true needs a group size."
        )
    return {"bits": bits, "group_size": size, "zero_point": zero}


def plan_text(plan: Mapping[str, Any]) -> str:
    """Returns a plan's meaning as one line, the same for equal plans."""
    return json.dumps(normal_plan(plan), sort_keys=True, separators=(",", ":"))


def _near(name: Any, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    return f": did you mean '{near[0]}'?" if near else ""
