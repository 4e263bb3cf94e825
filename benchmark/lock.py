"""One run a directory: an advisory lock that the kernel releases when its holder dies, however it dies."""

import fcntl
import json
import logging
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmark.errors import UsageError

logger = logging.getLogger(__name__)


class RunLock:
    """Holds a run directory for this process while the `with` block lasts.

    The file says who holds it; the lock itself is `flock`'s, so a file left by a killed run is stale and is taken over.

    Raises:
        UsageError: a living process holds it; the message names its pid and host.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "LOCK"
        self._descriptor: int | None = None

    def __enter__(self) -> "RunLock":
        while self._descriptor is None:
            self._descriptor = self._try_once()
        return self

    def _try_once(self) -> int | None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UsageError(
                f"{self.path.parent} is in use by process {holder.get('pid', '?')} on {holder.get('host', '?')}: "
                "wait for it to finish, or choose another --run_name."
            ) from None
        if not _still_named(descriptor, self.path):
            os.close(descriptor)  # its holder finished and removed the file between our open and our lock
            return None
        holder = _holder(descriptor)
        if holder:
            logger.warning(
                "taking over %s, left by process %s on %s", self.path, holder.get("pid"), holder.get("host")
            )
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(me).encode(), 0)
        return descriptor

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._descriptor is not None
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None


def _holder(descriptor: int) -> dict[str, Any]:
    try:
        value = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _still_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
