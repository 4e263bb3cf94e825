"""Whether a call's cache fits the device, asked before anything is allocated: a refusal can name bytes needed and free."""

from __future__ import annotations

from typing import Any

import torch

from huggingface.transformers.cache_utils import StaticTreeCache

GIB = 2**30


class _WithoutMemory:
    """A model as a cache sees it, but on the device that only knows shapes."""

    device = torch.device("meta")

    def __init__(self, model: Any):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def cache_bytes(model: Any, batch: int, capacity: int, scratch: int) -> int:
    """Returns the bytes that the engine's cache will take; nothing is allocated.

    Args:
        model: with our decode loop.
        batch: sequences.
        capacity: committed rows a sequence can have.
        scratch: rows of the largest step.
    """
    return StaticTreeCache.for_model(_WithoutMemory(model), batch, capacity, scratch).nbytes()


def free_bytes(device: torch.device) -> int | None:
    """Returns the memory that a new tensor can have on a device, this process's unused blocks included; `None` on a CPU."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def release_unused(device: torch.device) -> None:
    """Gives the device back what torch keeps of freed tensors: another process may need it, and nothing here soon will."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def check_fits(model: Any, batch: int, capacity: int, scratch: int) -> None:
    """Raises MemoryError, with both numbers, if the engine's cache exceeds the memory that is free; asks no CPU.

    Args:
        model, batch, capacity, scratch: as in :func:`cache_bytes`.
    """
    free = free_bytes(model.device)
    if free is None:
        return
    needed = cache_bytes(model, batch, capacity, scratch)
    if needed > free:
        raise MemoryError(
            f"the KV cache of {batch} prompts needs {needed} bytes ({needed / GIB:.1f} GiB), and {free} ({free / GIB:.1f} GiB) "
            f"are free on {model.device}; use a smaller --batch_size or --max_new_tokens."
        )
