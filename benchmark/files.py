"""Files that survive a crash: written whole under a temporary name and renamed, or appended a line at a time."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Read = TypeVar("Read")


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file by `text`; an error, also a full disk, leaves the old file as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file, readable for people and valid UTF-8 whatever the text in it."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a JSON-lines file, unless it holds just these lines already."""
    text = "".join(json.dumps(value, allow_nan=False) + "\n" for value in values)
    if (path.read_bytes() if path.exists() else b"") != text.encode():
        write_atomically(path, text)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces a CSV file by rows with the same keys; nested values are written as JSON."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if rows:
        writer.writerow(rows[0].keys())
    for row in rows:
        writer.writerow(
            json.dumps(value) if isinstance(value, (dict, list)) else value for value in row.values()
        )
    write_atomically(path, text.getvalue())


def read_json(path: Path) -> Any:
    """Returns a JSON file's content, None where there is no file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def read_lines(path: Path, read: Callable[[dict[str, Any]], Read]) -> Iterator[Read]:
    """Yields what the lines of a JSON-lines file hold; none where there is no file.

    A process that ends while it writes tears the last line alone, so a last line that cannot be parsed is left out.

    Args:
        path: the file.
        read: turns a line's object into what it stands for; KeyError and TypeError mean that it is something else.

    Raises:
        ValueError: any other line that cannot be read; the message names file and line.
    """
    if not path.exists():
        return
    torn = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if torn:
                raise ValueError(f"line {torn} of {path} cannot be parsed")
            value = _object(line)
            if value is None:
                torn = number
                continue
            try:
                result = read(value)
            except (KeyError, TypeError) as error:
                raise ValueError(f"line {number} of {path} is not what this file holds ({error})") from None
            yield result


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class Appender:
    """Appends lines to a file, each on disk before `append` returns.

    Args:
        path: the file; it is made when the first line comes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def append(self, values: Sequence[Mapping[str, Any]]) -> None:
        """Appends one line a value in a single write, so that the answers of one call stand or fall together."""
        if self._descriptor is None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
            self._descriptor = os.open(self.path, flags, 0o644)
        data = "".join(json.dumps(value, allow_nan=False) + "\n" for value in values).encode("utf-8")
        while data:
            data = data[os.write(self._descriptor, data) :]
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Closes the file; a later `append` opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
