"""The process in which untrusted SQL runs; `sql_sandbox.py` starts it as a script and kills it when it is late.

It needs the standard library alone, so that starting one costs little. Requests and answers are JSON, one a
line. The gold query's rows stay here, so that no result ever travels: `open` a database, `run` gold and
prediction, `compare`.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

try:
    import resource
except ImportError:  # not on Windows, where only the parent's time limit guards
    resource = None  # type: ignore[assignment]

MAX_MEMORY_BYTES = 1 << 30
MAX_VALUE_BYTES = 10_000_000
MAX_SQL_BYTES = 100_000
MAX_COLUMNS = 256
MAX_ROWS = 50_000
PROGRESS_OPCODES = 10_000

ALLOWED_ACTIONS = frozenset(
    {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
)
# They touch files or code, fill memory, or give another answer each time.
DENIED_FUNCTIONS = frozenset(
    {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "randomblob", "zeroblob", "random"}
)

SqlRow = tuple[Any, ...]


class Late(Exception):
    """A time limit passed while comparing."""


def limit_process() -> None:
    """Caps this process's memory, and forbids it files of any size and core dumps."""
    if resource is None:
        return
    for name, value in (("RLIMIT_AS", MAX_MEMORY_BYTES), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0)):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # not every system has every limit
            resource.setrlimit(getattr(resource, name), (value, value))


def limit_cpu(limit_s: float) -> None:
    """Allows this process the CPU seconds it has used and one request more."""
    if resource is None:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime + limit_s) + 2, hard))


def authorize(action: int, _first: str | None, second: str | None, *_where: str | None) -> int:
    """Returns SQLite's verdict on one action of a statement: reading is allowed, all else is denied."""
    if action not in ALLOWED_ACTIONS:
        return sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in DENIED_FUNCTIONS:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def connect(path: str) -> sqlite3.Connection:
    """Returns a connection that can read one database file and do nothing else."""
    connection = sqlite3.connect(f"file:{quote(path)}?mode=ro&immutable=1", uri=True, isolation_level=None)
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")  # the data holds invalid UTF-8
    for pragma in ("query_only=ON", "trusted_schema=OFF", "temp_store=MEMORY"):
        connection.execute(f"PRAGMA {pragma}")
    for limit, value in (
        (sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES),
        (sqlite3.SQLITE_LIMIT_SQL_LENGTH, MAX_SQL_BYTES),
        (sqlite3.SQLITE_LIMIT_COLUMN, MAX_COLUMNS),
        (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 200),
        (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 50),
        (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
    ):
        connection.setlimit(limit, value)
    connection.set_authorizer(authorize)
    return connection


def has_rows(connection: sqlite3.Connection) -> bool:
    """Returns whether any table of the database holds a row."""
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    quoted = ['"' + str(name).replace('"', '""') + '"' for (name,) in tables]
    # The names come from the file itself, and the connection can read it and nothing else.
    return any(connection.execute(f"SELECT 1 FROM {name} LIMIT 1").fetchone() for name in quoted)  # noqa: S608


class Session:
    """One open database and the rows of the last gold query and prediction."""

    def __init__(self) -> None:
        """Starts with no database."""
        self.path = ""
        self.connection: sqlite3.Connection | None = None
        self.filled = False
        self.rows: dict[str, list[SqlRow]] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns the answer to one request; whatever a query does, that is an answer and not a crash."""
        limit_cpu(request["limit_s"])
        deadline = time.monotonic() + request["limit_s"]
        try:
            if request["op"] == "open":
                return self.open(request["path"])
            if request["op"] == "run":
                return self.run(request["which"], request["sql"], deadline)
            equal = same_result(self.rows["gold"], self.rows["prediction"], request["ordered"], deadline)
            return {"status": "ok", "equal": equal}
        except Late:
            return {"status": "timeout", "reason": "the comparison took too long"}
        except (
            sqlite3.Error,
            sqlite3.Warning,
            ValueError,
            OverflowError,
            MemoryError,
            RecursionError,
        ) as error:
            late = isinstance(error, sqlite3.OperationalError) and time.monotonic() >= deadline
            return {
                "status": "timeout" if late else "error",
                "reason": f"{type(error).__name__}: {error}"[:300],
            }

    def open(self, path: str) -> dict[str, Any]:
        """Opens a database, unless it is open already, and tells whether it holds rows."""
        self.rows = {}
        if path != self.path:
            if self.connection is not None:
                self.connection.close()
            self.path, self.connection = "", None
            connection = connect(path)
            self.filled = has_rows(connection)
            self.path, self.connection = path, connection
        return {"status": "ok", "has_rows": self.filled}

    def run(self, which: str, sql: str, deadline: float) -> dict[str, Any]:
        """Runs one statement and keeps its rows as `which`."""
        if self.connection is None:
            return {"status": "error", "reason": "no database is open"}
        self.connection.set_progress_handler(lambda: time.monotonic() >= deadline, PROGRESS_OPCODES)
        with contextlib.closing(self.connection.cursor()) as cursor:
            cursor.execute(sql)
            if cursor.description is None:
                return {"status": "error", "reason": "the text holds no query"}
            rows = cursor.fetchmany(MAX_ROWS + 1)
        if len(rows) > MAX_ROWS:
            return {"status": "error", "reason": f"more than {MAX_ROWS} rows"}
        self.rows[which] = rows
        return {"status": "ok", "rows": len(rows)}


def same_result(gold: list[SqlRow], prediction: list[SqlRow], ordered: bool, deadline: float) -> bool:
    """Returns whether two results agree under some order of the prediction's columns.

    Rows count as often as they occur; their order matters only where `ordered`. Two results without rows
    agree, whatever their columns. 1 equals 1.0; text never equals a number or bytes; NULL equals NULL.

    Raises:
        Late: if the deadline passes first.
    """
    if len(gold) != len(prediction):
        return False
    if not gold:
        return True
    if len(gold[0]) != len(prediction[0]):
        return False
    gold_columns, columns = to_columns(gold), to_columns(prediction)
    if ordered:  # rows are aligned, so the columns need only pair up one to one
        return Counter(gold_columns) == Counter(columns)
    return match_columns(gold_columns, columns, deadline)


def to_columns(rows: list[SqlRow]) -> list[SqlRow]:
    """Returns a result's columns; a NaN, unequal to itself otherwise, becomes a value of its own."""
    return [
        tuple("\0nan" if value != value else value for value in column) for column in zip(*rows, strict=True)
    ]


def match_columns(gold: Sequence[SqlRow], columns: Sequence[SqlRow], deadline: float) -> bool:
    """Returns whether some pairing of columns makes the rows equal as multisets.

    Gold columns are paired one after another. A pairing is followed only while the rows, cut down to the
    columns paired so far, still agree, and of several equal columns one is tried; without that, ten equal
    columns are 10! pairings.
    """
    contents = [Counter(column) for column in columns]
    candidates = [[j for j, content in enumerate(contents) if content == Counter(column)] for column in gold]
    order = sorted(range(len(gold)), key=lambda i: len(candidates[i]))

    def extend(depth: int, used: tuple[int, ...]) -> bool:
        if depth == len(order):
            return True
        wanted = Counter(zip(*(gold[i] for i in order[: depth + 1]), strict=True))
        tried: set[SqlRow] = set()
        for j in candidates[order[depth]]:
            if time.monotonic() >= deadline:
                raise Late
            if j in used or columns[j] in tried:
                continue
            tried.add(columns[j])
            paired = (*used, j)
            if Counter(zip(*(columns[k] for k in paired), strict=True)) == wanted and extend(
                depth + 1, paired
            ):
                return True
        return False

    return extend(0, ())


def main() -> None:
    """Answers requests from standard input until it closes."""
    limit_process()
    session = Session()
    answer: dict[str, Any] = {"status": "ready"}
    while True:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            return
        answer = session.answer(json.loads(line))


if __name__ == "__main__":
    main()
