"""Finds out how a dispatcher launches its kernel, so that compile checks check what really runs.

Tile sizes and arguments of a kernel change with every round of tuning; a test that repeats them checks yesterday's kernel. The
dispatcher is called with tensors that hold no data, and what it would have launched is written down instead.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

KINDS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int8: "*i8",
    torch.uint8: "*u8", torch.int16: "*i16",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl", "PDL", "PACKED")


class _Recorder:
    """Stands in a kernel's place and keeps the arguments of its launches."""

    def __init__(self, names: list[str]):
        self.names = names
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.launches.append({**dict(zip(self.names, args, strict=False)), **kwargs})

        return launch


def recorded(monkeypatch, place: str, kernel: str, call: Callable[[], Any]) -> list[tuple]:
    """Returns what `compile_check.compile_kernels` takes, one entry for each launch of a kernel during `call`.

    Args:
        monkeypatch: pytest's.
        place: name of the module that defines and launches the kernel; its `unavailable` is taken to find no fault.
        kernel: name of the kernel.
        call: runs the dispatcher, with tensors of the meta device.
    """
    module = importlib.import_module(place)
    names = list(getattr(module, kernel).arg_names)
    recorder = _Recorder(names)
    with monkeypatch.context() as patch:
        patch.setattr(module, kernel, recorder)
        if hasattr(module, "unavailable"):
            patch.setattr(module, "unavailable", lambda device: None)
        call()
    return [_entry(place, kernel, names, launch) for launch in recorder.launches]


def _entry(place: str, kernel: str, names: list[str], launch: dict[str, Any]) -> tuple:
    given = {name: value for name, value in launch.items() if name in names and name not in OPTIONS}
    constants = {name: value for name, value in given.items() if name.isupper()}
    signature, aligned = {}, []
    for name, value in given.items():
        if name.isupper():
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = KINDS[value.dtype]
        elif isinstance(value, int) and value == 1:
            constants[name] = value  # Triton makes a constant of it
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
            # As Triton sees it at a launch.
            aligned += [name] if isinstance(value, int) and value % 16 == 0 else []
    return (
        place,
        kernel,
        signature,
        constants,
        launch.get("num_warps", 4),
        launch.get("num_stages", 3),
        aligned,
        launch.get("maxnreg"),
    )
