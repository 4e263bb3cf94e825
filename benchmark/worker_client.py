"""The parent's side of a worker process: start it, ask it, notice when it dies or hangs, end it with all it started."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LOAD_TIMEOUT_S = 1800.0
SEND_TIMEOUT_S = 60.0
DUMP_S = 1.0
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONUNBUFFERED": "1",
}


class WorkerError(RuntimeError):
    """A request that got no answer.

    Args:
        kind: `oom`, `device`, `error`, `timeout` or `died`.
        message: what happened, in one line.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    @property
    def status(self) -> str:
        """The status of the cell that this error ends."""
        return self.kind if self.kind in ("oom", "timeout") else "error"

    @property
    def fatal(self) -> bool:
        """Whether the process is of no further use: dead, hung, or with a device that may be unusable."""
        return self.kind != "error"


class Worker:
    """A worker process in a process group of its own.

    Args:
        name: technique it measures, for messages.
        loader: module that the process loads techniques with.
        log: file that takes everything the process prints.
    """

    def __init__(self, name: str, loader: str, log: Path) -> None:
        self.name = name
        self.log = log
        self._number = 0
        self._buffer = b""
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "benchmark.worker",
                    "--parent",
                    str(os.getpid()),
                    "--loader",
                    loader,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                start_new_session=True,
                env=QUIET | os.environ | {"PYTHONPATH": path},
            )

    def ask(self, op: str, timeout_s: float, **request: Any) -> dict[str, Any]:
        """Sends a request and returns its answer.

        Raises:
            WorkerError: the worker refused, died, or did not answer in time.
        """
        self.send(op, **request)
        return self.receive(timeout_s)

    def send(self, op: str, **request: Any) -> None:
        """Sends a request without waiting, so that several workers can load at once."""
        assert self.process.stdin is not None
        self._number += 1
        line = json.dumps({"id": self._number, "op": op} | request).encode() + b"\n"
        descriptor = self.process.stdin.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        while line:
            if not poll.poll(1000 * SEND_TIMEOUT_S):
                raise self._hung(SEND_TIMEOUT_S)
            try:
                line = line[os.write(descriptor, line[: select.PIPE_BUF]) :]
            except OSError:
                raise self._died() from None

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """Returns the answer to the last request.

        Raises:
            WorkerError: the worker refused, died, or did not answer in time.
        """
        answer = json.loads(self._line(timeout_s))
        if answer.pop("id") != self._number:
            raise WorkerError(
                "died", f"worker {self.name} answered another request than the one asked; see {self.log}"
            )
        if not answer.pop("ok"):
            raise WorkerError(answer["kind"], answer["message"])
        return answer

    def _line(self, timeout_s: float) -> bytes:
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN | select.POLLHUP)
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(1000 * left):
                raise self._hung(timeout_s)
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                raise self._died()
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _hung(self, timeout_s: float) -> WorkerError:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(DUMP_S)
        self.kill()
        return WorkerError(
            "timeout", f"no answer within {timeout_s:g} s (--timeout_s); its stacks are in {self.log}"
        )

    def _died(self) -> WorkerError:
        self._wait_unreaped(DUMP_S)
        self.kill()
        code = self.process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (the system may be out of memory)" if code == -signal.SIGKILL else ""
        return WorkerError("died", f"worker {self.name} {how}{hint}; see {self.log}")

    def _wait_unreaped(self, seconds: float) -> None:
        """Waits for the process's own end, leaving it a zombie: until it is reaped, its group id cannot be reused."""
        deadline = time.monotonic() + seconds
        how = os.WEXITED | os.WNOWAIT | os.WNOHANG
        while os.waitid(os.P_PID, self.process.pid, how) is None and time.monotonic() < deadline:
            time.sleep(0.005)

    def kill(self) -> None:
        """Ends the process and all it started. Does nothing the second time."""
        if self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
