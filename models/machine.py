"""What a technique may know of the machine it is asked to run on. No torch: the parent process builds this too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Machine:
    """The device of a run.

    Attributes:
        device: `cpu` or `cuda`.
        name: the device's own name.
        capability: CUDA compute capability as (major, minor); `None` on a CPU.
    """

    device: str = "cpu"
    name: str = ""
    capability: tuple[int, int] | None = None

    @classmethod
    def of(cls, description: Machine | Mapping[str, Any]) -> Machine:
        """Returns the machine that a worker described: `device` (such as `cuda:0`), `device_name`, `capability`."""
        if isinstance(description, Machine):
            return description
        capability = description.get("capability")
        return cls(
            device=str(description["device"]).partition(":")[0],
            name=str(description.get("device_name") or ""),
            capability=(int(capability[0]), int(capability[1])) if capability else None,
        )
