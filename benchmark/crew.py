"""The worker processes of a run: those of one group live side by side, each holding one technique."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmark.errors import RunError, UsageError
from benchmark.plan import Contender
from benchmark.worker_client import LOAD_TIMEOUT_S, Worker, WorkerError


class Crew:
    """Starts workers when they are asked for and ends them with the `with` block.

    Args:
        loader: module that workers load techniques with.
        directory: where their logs go.
        load_request: what every `load` request holds beside the recipe.
    """

    def __init__(self, loader: str, directory: Path, load_request: Mapping[str, Any]) -> None:
        self._loader = loader
        self._directory = directory
        self._load_request = dict(load_request)
        self._workers: dict[str, Worker] = {}
        self._spare: Worker | None = None
        self.contenders: Mapping[str, Contender] = {}
        self.loaded: dict[str, dict[str, Any]] = {}
        self.refused: dict[str, WorkerError] = {}
        self._starts: dict[str, int] = {}

    def __enter__(self) -> "Crew":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in [*self._workers.values(), *([self._spare] if self._spare else [])]:
            worker.kill()
        self._workers.clear()

    def machine(self, device: str, first: str) -> dict[str, Any]:
        """Returns what the device is, asked of a process that becomes the worker of the technique that loads first.

        Args:
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            first: name of that technique, for the process's log.

        Raises:
            UsageError: there is no such device.
            RunError: no worker can be started.
        """
        self._spare = self._new_worker(first)
        try:
            return self._spare.ask("machine", LOAD_TIMEOUT_S, device=device)
        except WorkerError as error:
            if error.kind == "error":
                raise UsageError(str(error)) from None
            raise RunError(f"no worker process can be started: {error}") from None

    def use_device(self, device: str) -> None:
        """Sets the device of every worker that loads from now on."""
        self._load_request["device"] = device

    def assemble(self, names: Iterable[str]) -> None:
        """Ends the workers of other techniques and loads these side by side; what fails is kept in `refused`."""
        names = list(dict.fromkeys(names))
        for name in set(self._workers) - set(names):
            self.drop(name)
        starting: dict[str, Worker] = {}
        for name in names:
            if name not in self._workers and name not in self.refused:
                starting[name] = self._start(name)
        for name, worker in starting.items():
            self._finish_loading(name, worker)

    def _start(self, name: str) -> Worker:
        if self._spare is not None:
            worker, self._spare = self._spare, None
            worker.name = name
        else:
            worker = self._new_worker(name)
        self._workers[name] = worker
        self._starts[name] = self._starts.get(name, 0) + 1
        try:
            worker.send("load", recipe=dict(self.contenders[name].recipe), **self._load_request)
        except WorkerError as error:
            self._refuse(name, error)
        return worker

    def _new_worker(self, name: str) -> Worker:
        return Worker(name, self._loader, self._directory / f"worker_{name}.log")

    def _finish_loading(self, name: str, worker: Worker) -> None:
        if name in self.refused:
            return
        try:
            self.loaded[name] = worker.receive(LOAD_TIMEOUT_S)
        except WorkerError as error:
            self._refuse(name, error)

    def _refuse(self, name: str, error: WorkerError) -> None:
        self.refused[name] = error
        self.drop(name)

    def ask(self, name: str, op: str, timeout_s: float, **request: Any) -> dict[str, Any]:
        """Returns a technique's answer; starts its worker where there is none.

        Raises:
            WorkerError: it cannot be loaded, refused, died or hung; in the last three cases a new one starts next time.
        """
        self.ensure(name)
        try:
            return self._workers[name].ask(op, timeout_s, **request)
        except WorkerError as error:
            if error.fatal:
                self.drop(name)
            raise

    def ensure(self, name: str) -> int:
        """Starts a technique's worker where there is none; returns how many it has had, this one included.

        Raises:
            WorkerError: it cannot be loaded.
        """
        if name not in self._workers:
            self.assemble([*self._workers, name])
        if name in self.refused:
            raise self.refused[name]
        return self._starts[name]

    def drop(self, name: str) -> None:
        """Ends a technique's worker, if there is one."""
        worker = self._workers.pop(name, None)
        if worker is not None:
            worker.kill()
