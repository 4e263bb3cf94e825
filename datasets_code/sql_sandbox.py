"""Execution accuracy of SQL that a model wrote, without trusting it.

Every query runs in a child process that can only read (see `sql_sandbox_child.py`) and is killed when it is
late: a query can keep SQLite busy inside one instruction, where no handler in the process is ever called. A
child is reused until it is killed, so a thousand well-behaved queries cost one start.

The verdict follows the usual executor of the field in its main points: results are multisets of rows, ordered
if the gold query says ORDER BY, under any order of columns. DISTINCT is kept, and bytes that are no UTF-8
become U+FFFD.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from datasets_code.base import Score

CHILD = Path(__file__).with_name("sql_sandbox_child.py")
EXECUTION = (
    "exec_accuracy",
    "exec_error_rate",
    "exec_timeout_rate",
    "gold_error_count",
    "n_executed",
    "n_no_rows_excluded",
)
RATES = EXECUTION[:3]
KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")

Verdict = Literal["correct", "wrong", "error", "timeout", "gold_error", "no_rows"]


@dataclass(frozen=True)
class Limits:
    """Time limits of the sandbox, in seconds.

    Attributes:
        query_s: for a prediction, inside the child.
        gold_s: for a gold query and for opening a database; generous, since failing here drops the example.
        compare_s: for comparing two results.
        grace_s: how much later than its limit a child is killed.
        start_s: for a child to start.
    """

    query_s: float = 1.5
    gold_s: float = 10.0
    compare_s: float = 1.0
    grace_s: float = 0.25
    start_s: float = 30.0


@dataclass(frozen=True)
class Execution:
    """One prediction to judge against its gold query on `<root>/<db_id>/<db_id>.sqlite`."""

    root: str
    db_id: str
    gold: str
    prediction: str


@dataclass(frozen=True)
class Outcome:
    """What came of one execution, and why if it was not simply right or wrong."""

    verdict: Verdict
    reason: str = ""


class SqlSandbox:
    """A child process that runs queries, started on first use and again after a kill; for one thread."""

    def __init__(self, limits: Limits | None = None) -> None:
        """Sets the limits; starts nothing."""
        self.limits = limits or Limits()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> SqlSandbox:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the child."""
        self.close()

    def judge(self, item: Execution) -> Outcome:
        """Returns whether a prediction gives its gold query's result."""
        try:
            database = resolve_database(Path(item.root), item.db_id)
        except ValueError as error:
            return Outcome("gold_error", str(error))
        opened = self._ask({"op": "open", "path": str(database)}, self.limits.gold_s)
        if opened["status"] != "ok":
            return Outcome("gold_error", f"{database.name}: {opened['reason']}")
        if not opened["has_rows"]:
            return Outcome("no_rows", f"{database.name} holds no rows")
        gold = self._ask({"op": "run", "which": "gold", "sql": item.gold}, self.limits.gold_s)
        if gold["status"] != "ok":
            return Outcome("gold_error", f"gold query: {gold['reason']}")
        prediction = {"op": "run", "which": "prediction", "sql": item.prediction}
        answer = self._ask(prediction, self.limits.query_s)
        if answer["status"] == "ok":
            ordered = has_order(item.gold)
            answer = self._ask({"op": "compare", "ordered": ordered}, self.limits.compare_s)
        if answer["status"] != "ok":
            return Outcome("timeout" if answer["status"] == "timeout" else "error", answer["reason"])
        return Outcome("correct" if answer["equal"] else "wrong")

    def close(self) -> None:
        """Kills the child, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was still unsent has no reader any more
                    stream.close()
        process.wait()

    def _ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Returns the child's answer; a child that is late or dead is replaced on the next request."""
        process = self._started()
        line = json.dumps({**request, "limit_s": limit_s}).encode() + b"\n"
        deadline = time.monotonic() + limit_s + self.limits.grace_s
        try:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()
            answer = read_answer(process, deadline)
        except TimeoutError:
            self.close()
            return {"status": "timeout", "reason": f"killed after {limit_s + self.limits.grace_s:g} s"}
        except (OSError, EOFError):
            self.close()
            late = process.returncode == -getattr(signal, "SIGXCPU", signal.SIGTERM)
            return {
                "status": "timeout" if late else "error",
                "reason": "the query ended its process (memory or CPU)",
            }
        return answer

    def _started(self) -> subprocess.Popen[bytes]:
        """Returns the running child, starting it if need be.

        Raises:
            RuntimeError: if it does not come up.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ},
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
            try:
                read_answer(self._process, time.monotonic() + self.limits.start_s)
            except (TimeoutError, EOFError) as error:
                self.close()
                raise RuntimeError(f"the SQL sandbox did not start ({CHILD}).") from error
        return self._process


def read_answer(process: subprocess.Popen[bytes], deadline: float) -> dict[str, Any]:
    """Returns the next line a child writes, parsed.

    Raises:
        TimeoutError: if the deadline passes first.
        EOFError: if the child ended instead.
    """
    assert process.stdout is not None
    received = b""
    while not received.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        chunk = os.read(process.stdout.fileno(), 65536)
        if not chunk:
            raise EOFError
        received += chunk
    answer: dict[str, Any] = json.loads(received)
    return answer


def resolve_database(root: Path, db_id: str) -> Path:
    """Returns a database's file.

    Raises:
        ValueError: if it does not exist, or its name or a link leads out of the root.
    """
    if not re.fullmatch(r"[\w\- ]+", db_id):
        raise ValueError(f"'{db_id[:80]}' is no name of a database")
    base = root.resolve()
    path = (base / db_id / f"{db_id}.sqlite").resolve()
    if not path.is_relative_to(base):
        raise ValueError(f"database {db_id}: a link leads out of {root}")
    if not path.is_file():
        raise ValueError(f"database {db_id}: no file {root / db_id / (db_id + '.sqlite')}")
    return path


def has_order(query: str) -> bool:
    """Returns whether a query says ORDER BY, outside quoted text, at any depth."""
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", "''", query)
    return re.search(r"\border\s+by\b", bare, re.IGNORECASE) is not None


def judge_all(items: Sequence[Execution], limits: Limits | None = None, workers: int = 4) -> list[Outcome]:
    """Returns the outcome of each execution, in order; each worker, at most one a core, has its own child."""
    workers = max(1, min(workers, os.cpu_count() or 1, len(items)))
    outcomes: dict[int, Outcome] = {}
    stop = threading.Event()

    def work(first: int) -> None:
        with SqlSandbox(limits) as sandbox:
            for index in range(first, len(items), workers):
                if stop.is_set():
                    return
                outcomes[index] = sandbox.judge(items[index])

    with ThreadPoolExecutor(workers) as pool, stopping(stop):
        for future in [pool.submit(work, first) for first in range(workers)]:
            future.result()
    return [outcomes[index] for index in range(len(items))]


@contextlib.contextmanager
def stopping(event: threading.Event) -> Iterator[None]:
    """Sets an event on the way out, so that an interrupt does not wait for all that is left."""
    try:
        yield
    finally:
        event.set()


def execution_score(outcomes: Sequence[Outcome]) -> Score:
    """Returns the rates over all executions whose gold query ran on a database with rows."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    executed = sum(counts[verdict] for verdict in ("correct", "wrong", "error", "timeout"))
    values: dict[str, float | int] = {
        "gold_error_count": counts["gold_error"],
        "n_executed": executed,
        "n_no_rows_excluded": counts["no_rows"],
    }
    if not executed:
        reason = next((outcome.reason for outcome in outcomes), "there is no answer to score")
        return Score(values, unavailable=dict.fromkeys(RATES, f"no gold query ran: {reason}"))
    values["exec_accuracy"] = counts["correct"] / executed
    values["exec_error_rate"] = counts["error"] / executed
    values["exec_timeout_rate"] = counts["timeout"] / executed
    failed: Mapping[str, str] = {
        outcome.reason: outcome.reason for outcome in outcomes if outcome.verdict == "gold_error"
    }
    notes = {"gold_error_count": "; ".join(list(failed)[:3])} if failed else {}
    return Score(values, notes=notes)
