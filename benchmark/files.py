"""Files that survive a crash: written whole under a temporary name and renamed, or appended a line at a time."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


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


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSON-lines file up to the first line that is torn; none where there is no file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                value = json.loads(line)
            except ValueError:
                return
            if not isinstance(value, dict):
                return
            yield value


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
