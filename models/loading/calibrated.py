"""Weights that are packed after a look at calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from huggingface.transformers.quantizers.awq import scale_for_quantization
from huggingface.transformers.quantizers.configuration import PackedWeightsConfig
from huggingface.transformers.quantizers.quantizer import quantize_model
from models.awq import PREFIX
from models.lm_head import split_head
from models.loading.tokenizing import encode

WINDOW, WINDOWS = 512, 32
"""Tokens of a stretch of calibration text, and stretches used; AWQ's paper found a few to suffice."""


def is_calibrated(weights: str | None) -> bool:
    """Returns whether a recipe's weights need calibration text."""
    return weights is not None and weights.startswith(PREFIX)


def scale_and_pack(model: Any, tokenizer: Any, weights: str) -> Any:
    """Returns a model with its channels scaled for the recipe's calibration text and its weights packed, in place.

    Args:
        model: our engine's, with full weights.
        tokenizer: the checkpoint's.
        weights: the recipe's slot, `awq-group128:digest:path`.

    Raises:
        ValueError: the text cannot be read or has no tokens.
    """
    named, head = split_head(weights)
    scheme, _, rest = named.partition(":")
    path = rest.partition(":")[2]
    config = PackedWeightsConfig(4, int(scheme.removeprefix(PREFIX)), lm_head=head)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--calibration_text {path} cannot be read: {error}.") from None
    window = min(WINDOW, int(model.config.max_position_embeddings))
    ids = encode(tokenizer, text)[: window * WINDOWS]
    if not ids:
        raise ValueError(f"--calibration_text {path} holds no text.")
    stretches = [torch.tensor([ids[i : i + window]], device=model.device) for i in range(0, len(ids), window)]
    scale_for_quantization(model, stretches, config.format)
    return quantize_model(model, config)
