"""Activation-aware scales: which columns of a weight must be rounded finely is read from what passes through them.

A column that large inputs meet does harm with every bit of rounding. Multiplied by s before it is rounded, with the inputs
divided by s, it loses s times less, and its group's other columns a little more. s is the mean size of a channel's inputs to
some power between 0 and 1; the power with the least error on calibration text wins, 0 (no scaling) among them, so on that text no
group of products gets worse.

("AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv 2306.00978, section 3.2; written from the
paper. Its weight clipping is left out. Where no norm stands in front, as before a last product, nothing is scaled.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from ..integrations.quantized_linear import QuantizedWeight
from .channel_scaling import InputGroup, input_groups
from .packing import WeightFormat

POWERS = 20
"""Powers tried: 0, 1/20, ... 19/20."""
KEPT_ROWS = 512
"""Rows of calibration text that errors are measured on; channel sizes are measured on all."""


@dataclass(frozen=True)
class ScaleChoice:
    """What was chosen for one group of products.

    Attributes:
        name: layer and norm.
        power: of the channels' mean sizes; 0 for no scaling.
        error, unscaled_error: mean square error of the products' outputs with it, and without.
    """

    name: str
    power: float
    error: float
    unscaled_error: float


class _Inputs:
    """What passes through the first product of a group: each channel's mean size, and some rows."""

    def __init__(self) -> None:
        self.sizes: torch.Tensor | None = None
        self.rows: list[torch.Tensor] = []
        self.count = self.kept = 0

    def take(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        del module
        rows = args[0].detach().flatten(0, -2).float()
        total = rows.abs().sum(0)
        self.sizes = total if self.sizes is None else self.sizes + total
        self.count += len(rows)
        room = KEPT_ROWS - self.kept
        if room > 0:
            step = max(1, len(rows) // max(KEPT_ROWS // 4, 1))
            self.rows.append(rows[::step][:room])
            self.kept += len(self.rows[-1])

    @property
    def means(self) -> torch.Tensor:
        assert self.sizes is not None
        return self.sizes / self.count


@torch.no_grad()
def scale_for_quantization(
    model: Any, texts: Sequence[torch.Tensor], kind: WeightFormat
) -> list[ScaleChoice]:
    """Scales a model's channels in place so that packing its weights loses least; its output stays the same.

    Args:
        model: with full weights, as `channel_scaling.input_groups` takes it.
        texts: (batch, seq) int64 calibration tokens, on the model's device.
        kind: how the weights will be packed.

    Raises:
        ValueError: no calibration text, or a model that does not name its layers' parts.
    """
    if not texts or not any(text.numel() for text in texts):
        raise ValueError("activation-aware scales need calibration text; give some.")
    groups = list(input_groups(model))
    seen = [_Inputs() for _ in groups]
    handles = [
        next(iter(group.linears.values())).register_forward_pre_hook(inputs.take)
        for group, inputs in zip(groups, seen, strict=True)
    ]
    try:
        for text in texts:
            model(input_ids=text, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [_scale(group, inputs, kind) for group, inputs in zip(groups, seen, strict=True)]


def _scale(group: InputGroup, inputs: _Inputs, kind: WeightFormat) -> ScaleChoice:
    """Scales one group by its best power."""
    rows = torch.cat(inputs.rows)
    weights = [_matrix(linear) for linear in group.linears.values()]
    best: tuple[float, float, torch.Tensor] | None = None
    unscaled = 0.0
    for step in range(POWERS):
        factors = _factors(inputs.means, step / POWERS)
        error = sum(_error(weight, rows, factors, kind) for weight in weights) / len(weights)
        unscaled = error if step == 0 else unscaled
        if best is None or error < best[0]:
            best = (error, step / POWERS, factors)
    assert best is not None
    if best[1]:
        group.scale(best[2])
    return ScaleChoice(group.name, best[1], best[0], unscaled)


def _factors(means: torch.Tensor, power: float) -> torch.Tensor:
    """Returns (features,) factors around 1; channels nothing passes through keep a small one."""
    factors = means.clamp(min=1e-4 * float(means.max()) + 1e-12).pow(power)
    return factors / (factors.max() * factors.min()).sqrt()


def _error(weight: torch.Tensor, rows: torch.Tensor, factors: torch.Tensor, kind: WeightFormat) -> float:
    """Returns the mean square error of a product whose columns were scaled, rounded, and scaled back."""
    rounded = QuantizedWeight.of(weight * factors, kind).dense(torch.float32) / factors
    return float((rows @ (rounded - weight).t()).square().mean())


def _matrix(linear: Any) -> torch.Tensor:
    """Returns a layer's weight as (out, in) float32."""
    weight = linear.weight.detach()
    return (weight.t() if isinstance(linear, Conv1D) else weight).float()
