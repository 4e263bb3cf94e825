"""Readers of the official file formats: JSON, JSON lines, CSV.

A line that cannot be parsed ends the reading with its file and number; a well-formed row with odd fields is
passed on and judged later. Byte-order marks and Windows line ends are accepted.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets_code.sources import DataError, MissingDataError


def read_text(path: Path) -> str:
    """Returns a UTF-8 file's text without a byte-order mark, line ends unchanged.

    Raises:
        MissingDataError: if the file does not exist.
        DataError: if it cannot be opened, or is not UTF-8.
    """
    if not path.is_file():
        raise MissingDataError(f"{path} not found; expected the official file there.")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte {error.start}); save the file as UTF-8.") from error


def read_json_array(path: Path) -> list[Any]:
    """Returns the rows of a JSON file that holds one array; errors as in :func:`read_text`."""
    try:
        rows = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg}); fix it or fetch it again."
        ) from error
    except (DataError, MissingDataError):
        raise
    except (RecursionError, ValueError) as error:  # nested too deep, or a number of thousands of digits
        raise DataError(f"{path}:1: not readable as JSON ({error}); fix it or fetch it again.") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}:1: holds one {type(rows).__name__}, expected a JSON array of rows.")
    return rows


def read_json_lines(path: Path) -> list[Any]:
    """Returns one value a line, blank lines left out; errors as in :func:`read_text`."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (RecursionError, ValueError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"{path}:{number}: not valid JSON ({reason}); fix or delete the line.") from error
    return rows


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str | None]]:
    """Returns one mapping a CSV row; a field that a row lacks is left out of it.

    Args:
        path: the file, with a header in its first line.
        columns: names that the header must hold, in any order.

    Raises:
        DataError: for broken quoting, a wrong header, or a row with more fields than the header; otherwise as
        `read_text`.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    rows: list[dict[str, str | None]] = []
    try:
        header = next(reader, [])
        missing = [name for name in columns if name not in header]
        if missing:
            raise DataError(
                f"{path}:1: the header is {','.join(header)[:80] or 'empty'}; expected {','.join(columns)}."
            )
        for fields in reader:
            if len(fields) > len(header):
                raise DataError(
                    f"{path}:{reader.line_num}: {len(fields)} fields under a header of {len(header)}; "
                    "quote fields that hold commas."
                )
            if fields:
                rows.append(dict(zip(header, fields, strict=False)))
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num}: not valid CSV ({error}); fix or delete the line."
        ) from error
    return rows
