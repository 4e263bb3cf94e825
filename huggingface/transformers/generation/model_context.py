"""Where and how a model's steps run, whatever the caller's thread is set to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def model_context(model: Any) -> Iterator[None]:
    """Runs what is inside on the model's device, where Triton launches, and in the mode that its weights were made in.

    Buffers outlive a call: made in one mode, a call in the other could not write to them.
    """
    on_device = torch.cuda.device(model.device) if model.device.type == "cuda" else contextlib.nullcontext()
    inference = model.get_input_embeddings().weight.is_inference()
    with torch.inference_mode(inference), torch.no_grad(), on_device:
        yield
