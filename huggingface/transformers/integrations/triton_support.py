"""What every Triton kernel of ours shares: an import that may fail, and launches that overlap.

Without Triton (a CPU installation) modules with kernels still import; their plain references run instead.

Kernels of one captured step depend on each other in a chain, and the gap between two of them costs as much as a small kernel. On
Hopper and later a kernel may start while the one before it finishes (programmatic dependent launch): it says at once that its own
successor may start too, fetches what no kernel of the step writes (weights), and only then waits for its inputs. The order inside
every kernel is therefore::

    release_dependents(PDL)     # the next kernel may be scheduled
    ...                         # read weights and other constants, write nothing
    wait_for_inputs(PDL)        # all earlier kernels have finished, their writes are visible
    ...                         # everything else

Attention of trees waits for nothing and is not launched to start early; it only lets its successor.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU installation
    triton: Any = None  # type: ignore[no-redef]
    tl: Any = None  # type: ignore[no-redef]

LEAST_CAPABILITY = (8, 0)
"""Oldest GPU the kernels are written for: Ampere."""


def jit(function: Any = None, **options: Any) -> Any:
    """Returns the Triton kernel of a function, or the function itself where there is no Triton; with options, a decorator."""
    if function is None:
        return partial(jit, **options)
    return triton.jit(function, **options) if triton is not None else function


def constant(value: Any) -> Any:
    """Returns a value as kernels may name it from their module, or the value itself where there is no Triton."""
    return tl.constexpr(value) if tl is not None else value


def interpreting() -> bool:
    """Returns whether kernels run in Triton's interpreter, as the tests have it on a CPU."""
    return triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device: torch.device) -> str | None:
    """Returns why Triton kernels cannot run on a device, or `None` if they can."""
    if triton is None:
        return "Triton is not installed"
    if interpreting():
        return None
    if device.type != "cuda":
        return f"Triton kernels need CUDA, not {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
    return None


def overlaps_launches(device: torch.device) -> bool:
    """Returns whether a kernel on this device may start before the one in front of it has finished."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def overlap_options(device: torch.device) -> dict[str, bool]:
    """Returns the launch options of a kernel that may start before the one in front of it has finished, where it may."""
    return {"PDL": True, "launch_pdl": True} if overlaps_launches(device) else {"PDL": False}


@jit
def release_dependents(PDL: tl.constexpr):
    """Lets the next kernel be scheduled; without `PDL` it starts when this one has finished."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@jit
def wait_for_inputs(PDL: tl.constexpr):
    """Waits until all earlier kernels have finished and their writes are visible."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@jit
def prefetch(pointers):
    """Asks for the cache lines at pointers to be brought to the second-level cache; on a GPU only."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64, bitcast=True)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
