"""Compiles the kernels of some work beside each other before it is done for the first time.

A kernel is compiled when it is first launched, half a second or more each, one after the other. A first answer waits for some
thirty of them, measuring a dozen draft trees for some two hundred. So the work is walked through once without doing it: a launch
of a kernel only asks for its compilation, which threads do (the compiler holds Python's lock for a tenth of its time), and all
that happens of PyTorch's operations is that their results get memory. Nothing is computed, so nothing can go wrong with numbers
that were never filled in.
"""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers.utils import logging

from .triton_support import interpreting, triton

MOST_THREADS = 16
LIKE = (
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "new_empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty_strided",
)
"""Operations that take a tensor and read only its size; done for real, because what they make may be kept."""

_WALKING = threading.Lock()
"""Held by the one thread that walks: what it changes of Triton is one thread's at a time."""

logger = logging.get_logger(__name__)


def compile_ahead(device: torch.device, works: Iterable[Callable[[], object]]) -> None:
    """Compiles what the works would launch. Where that is not possible, they compile it themselves, one kernel after another.

    Args:
        device: where they run.
        works: functions as they could be captured in a graph: they read nothing back to the host.

    Raises:
        torch.OutOfMemoryError: the results of the works' operations exceed the device's memory.
    """
    if device.type != "cuda" or interpreting() or not hasattr(triton, "AsyncCompileMode"):
        return
    try:
        # Triton's mode is a context variable that stays on if waiting is interrupted; in a copy of the context nobody sees it.
        with _WALKING:
            contextvars.copy_context().run(_compile, works)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the work itself must go on
        logger.warning(f"kernels are compiled one after another, not beside each other: {error}")


def _compile(works: Iterable[Callable[[], object]]) -> None:
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    # What cannot be compiled says so when it is launched.
    with ThreadPoolExecutor(threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        walk_through(works)


def walk_through(works: Iterable[Callable[[], object]]) -> None:
    """Calls the works, one thread at a time; kernels are not launched, and operations not done.

    Raises:
        NotImplementedError: an operation that cannot be left undone.
    """
    with _no_launches(), _Undone():
        for work in works:
            work()


@contextmanager
def _no_launches() -> Iterator[None]:
    """Makes every launch of a Triton kernel by this thread a request to compile it."""
    kind, walker = triton.runtime.JITFunction, threading.get_ident()
    launch = kind.run

    def run(kernel: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
        return launch(kernel, *args, warmup=warmup or threading.get_ident() == walker, **kwargs)

    kind.run = run
    try:
        yield
    finally:
        kind.run = launch


class _Undone(TorchDispatchMode):
    """Gives operations results of the right size without doing them; only views and new tensors are real."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        aliases = [argument.alias_info for argument in func._schema.arguments if argument.alias_info]
        tensors: list[torch.Tensor] = []
        tree_map_only(torch.Tensor, tensors.append, (args, kwargs))
        draws = torch.Tag.nondeterministic_seeded in func.tags
        makes = (not tensors and not draws) or func.overloadpacket.__name__ in LIKE
        if makes or (aliases and not any(alias.is_write for alias in aliases)):
            return func(*args, **kwargs)
        device = kwargs.get("device") or (tensors[0].device if tensors else torch.get_default_device())
        described = dict(kwargs, device="meta") if "device" in kwargs or not tensors else kwargs
        given, named = tree_map_only(torch.Tensor, _described, (args, described))
        result = func(*given, **named)
        if aliases:
            return _written(func, args, kwargs, result)
        return tree_map_only(torch.Tensor, lambda one: _like(one, device), result)


def _described(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor of the same size that holds nothing."""
    return _like(tensor, "meta")


def _like(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """Returns what an operation that writes to its arguments returns: those.

    Raises:
        NotImplementedError: it returns something else besides, or gives an argument another size.
    """
    names = [argument.name for argument in func._schema.arguments]
    named = dict(zip(names, args, strict=False)) | kwargs
    writes = [one.name for one in func._schema.arguments if one.alias_info and one.alias_info.is_write]
    written = [named[name] for name in writes if isinstance(named.get(name), torch.Tensor)]
    returned = [] if result is None else list(result) if isinstance(result, tuple) else [result]
    plain = len(returned) in (0, len(written)) and all(
        isinstance(one, torch.Tensor) and (one.shape, one.stride()) == (held.shape, held.stride())
        for one, held in zip(returned, written, strict=False)
    )
    if not plain:
        raise NotImplementedError(f"{func} writes to its arguments in a way that is not known here")
    return None if not returned else written[0] if not isinstance(result, tuple) else tuple(written)
