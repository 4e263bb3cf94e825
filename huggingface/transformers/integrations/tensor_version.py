"""Noticing that a tensor was written to since something was made from it."""

from __future__ import annotations

import torch


def version_of(tensor: torch.Tensor) -> int:
    """Returns how often a tensor was written to in place; 0 for tensors of inference mode, which do not count."""
    return 0 if tensor.is_inference() else tensor._version
