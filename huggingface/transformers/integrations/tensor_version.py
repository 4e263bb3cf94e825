"""Noticing that a tensor was moved or written to since something was made from it."""

from __future__ import annotations

import torch


def version_of(tensor: torch.Tensor) -> int:
    """Returns how often a tensor was written to in place; 0 for tensors of inference mode, which do not count."""
    return 0 if tensor.is_inference() else tensor._version


def place_and_version(tensor: torch.Tensor) -> tuple[int, int]:
    """Returns where a tensor's numbers are, and how often it was written to."""
    return tensor.data_ptr(), version_of(tensor)


def nothing() -> None:
    """What is pickled of something that is made anew from a tensor."""
    return
