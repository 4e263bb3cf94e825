"""Which of torch's attention kernels a pass may use on CUDA.

cuDNN's kernel makes an execution plan for every new shape, tens of milliseconds each. In decoding the number of keys grows with
every step and in training it differs from batch to batch, so the plans cost far more than the kernel saves.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPE_AGNOSTIC = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def shape_agnostic_kernels(device: torch.device) -> AbstractContextManager[None]:
    """Returns a context in which attention runs kernels that need no plan for a shape; does nothing off CUDA."""
    return sdpa_kernel(SHAPE_AGNOSTIC) if device.type == "cuda" else nullcontext()
