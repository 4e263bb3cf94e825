"""Moving a factor between a norm and the products that read it, channel by channel; the model's function stays the same.

A norm's output channel divided by s and the products' columns multiplied with s give the same sums. Which of the two is large
decides what rounding the columns costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .packing import GROUP_SIZES

ISOLATED, RUNS = "isolated", "runs"
LAYOUTS = (ISOLATED, RUNS)
RUN = max(GROUP_SIZES)
"""Channels of a run of outliers: whole groups of every size."""


@dataclass(frozen=True)
class InputGroup:
    """Products that read the same norm.

    Attributes:
        name: layer and norm, for messages.
        norm: LayerNorm, or RMSNorm with a plain weight.
        linears: `Linear` or `Conv1D` layers by name.
    """

    name: str
    norm: Any
    linears: dict[str, Any]

    @torch.no_grad()
    def scale(self, factors: torch.Tensor) -> None:
        """Multiplies the products' columns with (features,) factors and divides the norm by them.

        Raises:
            ValueError: a factor that is not a finite number above 0.
        """
        if not (torch.isfinite(factors).all() and (factors > 0).all()):
            raise ValueError(f"{self.name}: channels can be scaled by finite factors above 0 alone.")
        self.norm.weight.div_(factors.to(self.norm.weight))
        if getattr(self.norm, "bias", None) is not None:
            self.norm.bias.div_(factors.to(self.norm.bias))
        for linear in self.linears.values():
            columns = factors.to(linear.weight)
            linear.weight.mul_(columns[:, None] if isinstance(linear, Conv1D) else columns)


def input_groups(model: Any) -> Iterator[InputGroup]:
    """Yields, layer by layer, attention's projections and the MLP's first products with their norms.

    Args:
        model: a decoder with streams or none, of a class that names its layers' parts (`layer_names`).

    Raises:
        ValueError: for a class that does not.
    """
    names = getattr(model, "layer_names", None)
    if names is None:
        raise ValueError(
            f"{type(model).__name__} does not say where its layers' parts are; load it with load_streaming."
        )
    for index, layer in enumerate(model.decoder_layers()):
        for norm, linears in ((names.norm, names.projections), (names.mlp_norm, names.expand)):
            found = {f"{index}.{name}": layer.get_submodule(name) for name in linears}
            yield InputGroup(f"layer {index}, {norm}", layer.get_submodule(norm), found)


@torch.no_grad()
def add_outliers(
    model: nn.Module, channels: int, factor: float, seed: int = 0, layout: str = ISOLATED
) -> None:
    """Makes some channels behind each norm `factor` times larger, as they are in large trained models, with the same output.

    The columns that read them become as much smaller, so a scale that they share with other columns is too coarse for them.
    Isolated ones share theirs also where scales are a group's. Runs of `RUN` neighbours that begin where groups do have scales of
    their own there, and share one only where an output has a single scale.

    Args:
        model: as :func:`input_groups` takes it.
        channels: how many behind each norm, drawn at random.
        factor: how many times larger; with a power of two, the output is the same bit for bit in every dtype.
        seed: of the draw.
        layout: `isolated` or `runs`.

    Raises:
        ValueError: an unknown layout, more channels than there are, or for runs a number that is no multiple of `RUN`. Nothing is
            changed then.
    """
    groups = list(input_groups(model))
    if layout not in LAYOUTS:
        raise ValueError(f"layout '{layout}' of outliers is unknown; choose from {', '.join(LAYOUTS)}.")
    run = RUN if layout == RUNS else 1
    least = min(len(group.norm.weight) for group in groups)
    if channels % run or not 0 < channels <= least:
        raise ValueError(
            f"{channels} channels with layout '{layout}': expected a multiple of {run} up to {least}, the model's width."
        )
    generator = torch.Generator().manual_seed(seed)
    for group in groups:
        features = len(group.norm.weight)
        starts = torch.randperm(features // run, generator=generator)[: channels // run] * run
        factors = torch.ones(features)
        factors[(starts[:, None] + torch.arange(run)).flatten()] = 1 / factor
        group.scale(factors)
