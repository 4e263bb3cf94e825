"""What new weights need, beyond upstream's initialisation, for deep models to learn quickly.

Layers start as the identity, so that a deep model starts as a shallow one; after many random layers little of a token is left.

Models whose attention does not scale its scores are trained as if it did. GPT-Neo leaves out the factor head_size ** -0.5, so its
scores start that much larger and move that much faster; large models then learn slowly or diverge at learning rates that suit
others. The factor can be put into the query projections instead: weights drawn that much smaller, and a learning rate that much
smaller for them, follow step by step what a model that scales would do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def missing_factor(model: Any) -> float:
    """Returns the factor that a model's attention scores lack; 1 where attention scales."""
    return float(model.head_size() ** -0.5 / model.attention_scaling())


def query_weights(model: Any) -> list[nn.Parameter]:
    """Returns the query projections' parameters of all layers, none for a model that does not name them or has them fused."""
    if model.layer_names is None or len(model.layer_names.projections) == 1:
        return []
    name = model.layer_names.projections[0]
    return [weight for layer in model.decoder_layers() for weight in layer.get_submodule(name).parameters()]


@torch.no_grad()
def start_as_identity(model: Any) -> None:
    """Zeroes the products with which a new model's layers add to the residual stream: a deep model starts as a shallow one."""
    for layer in model.decoder_layers() if model.layer_names is not None else ():
        for name in (model.layer_names.output, model.layer_names.contract):
            layer.get_submodule(name).weight.zero_()


@torch.no_grad()
def shrink_queries(model: Any) -> None:
    """Multiplies freshly drawn query projections by the missing factor."""
    factor = missing_factor(model)
    if factor != 1:
        for weight in query_weights(model):
            weight.mul_(factor)


def slow_queries(groups: list[dict[str, Any]], model: Any) -> list[dict[str, Any]]:
    """Returns an optimiser's groups with the query projections in groups of their own, slower by the missing factor.

    Adam's steps do not depend on the size of a gradient, so a smaller weight needs a smaller step; decay, which is relative to
    the weight, keeps its pace.

    Args:
        groups: as `torch.optim.Optimizer.param_groups` holds them, with `lr` and `weight_decay`.
        model: whose parameters they hold.
    """
    factor = missing_factor(model)
    queries = {id(weight) for weight in query_weights(model)}
    if factor == 1 or not queries:
        return groups
    split: list[dict[str, Any]] = []
    for group in groups:
        slow = [weight for weight in group["params"] if id(weight) in queries]
        rest = [weight for weight in group["params"] if id(weight) not in queries]
        if rest:
            split.append({**group, "params": rest})
        if slow:
            rates = {"lr": group["lr"] * factor, "weight_decay": group["weight_decay"] / factor}
            split.append({**group, **rates, "params": slow})
    return split
