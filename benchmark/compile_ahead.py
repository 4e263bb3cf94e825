"""Compiles Triton kernels in several processes before they are launched: they find themselves in Triton's cache."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

from huggingface.transformers.integrations.gluon_support import source_of
from huggingface.transformers.integrations.triton_support import triton


class Compilers:
    """Processes that compile; a context manager.

    They are forked at once, so this must be made before anything asks for CUDA.

    Args:
        processes: how many.
    """

    def __init__(self, processes: int) -> None:
        self._pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"))
        self._pool.submit(os.getpid).result()
        self._started: dict[tuple[str, str], Future[float]] = {}

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def compile(self, launch: Callable[[], object]) -> list[Future[float]]:
        """Starts to compile what a call would launch, each kernel once; the call launches nothing.

        Returns:
            For each kernel the seconds that its compilation will have taken.
        """
        futures = []

        def note(*, key: Any, fn: Any, compile: dict[str, Any], **_rest: Any) -> bool:
            name = (fn.name, str(key))
            if name not in self._started:
                target = triton.runtime.driver.active.get_current_target()
                options = json.loads(compile["specialization_data"])["options"]
                plain = {n: v for n, v in options.items() if isinstance(v, bool | int | str)}
                job = (
                    fn.module,
                    fn.name,
                    compile["signature"],
                    compile["constants"],
                    compile["configs"][0],
                    plain,
                    target,
                )
                self._started[name] = self._pool.submit(_compile, *job)
            futures.append(self._started[name])
            return True  # stops the launch

        earlier = triton.knobs.runtime.jit_cache_hook
        triton.knobs.runtime.jit_cache_hook = note
        try:
            launch()
        finally:
            triton.knobs.runtime.jit_cache_hook = earlier
        return futures

    @property
    def kernels(self) -> int:
        """Number of different kernels so far."""
        return len(self._started)


def _compile(
    module: str, name: str, signature: Any, constants: Any, attributes: Any, options: Any, target: Any
) -> float:
    from time import perf_counter

    start = perf_counter()
    function = getattr(importlib.import_module(module), name)
    triton.compile(source_of(function, signature, constants, attributes), target=target, options=options)
    return perf_counter() - start
