"""Muon for the matrices of a decoder's layers, AdamW for everything else, in one optimiser.

Muon replaces a matrix's momentum by the nearest orthogonal matrix, so that every direction of it learns at the same pace
("Muon: An optimizer for hidden layers in neural networks", Jordan and others, 2024); its steps are made as large as AdamW's
typical ones ("Muon is Scalable for LLM Training", arXiv 2502.16982). The arithmetic is that of `torch.optim.Muon`, which the
tests compare with; that one takes a matrix at a time and repeats all of it on every process. Here matrices of one shape are a
single batched product, and the processes share them out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

MUON_KEY = "muon"
MOMENTUM = 0.95
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the odd polynomial that drives singular values to about 1 in five steps (Jordan and others, 2024)."""
ADAMW_STEP = 0.2
"""Root mean square of AdamW's usual step, in learning rates (arXiv 2502.16982)."""


def layer_matrices(model: Any) -> list[nn.Parameter]:
    """Returns the weights of the products in a streaming model's layers, those that are trained; a fused q/k/v is one matrix.

    Raises:
        ValueError: for a model that does not name them.
    """
    names = model.layer_names
    if names is None:
        raise ValueError(
            f"--optimizer muon: {type(model).__name__} does not name its layers' products; use --optimizer adamw."
        )
    products = (*names.projections, names.output, *names.expand, names.contract)
    weights = [layer.get_submodule(name).weight for layer in model.decoder_layers() for name in products]
    return [weight for weight in weights if weight.requires_grad]


def muon_groups(groups: list[dict[str, Any]], model: Any, learning_rate: float) -> list[dict[str, Any]]:
    """Returns an optimiser's groups with the layers' matrices in groups of their own, for :class:`MuonAdamW`.

    Args:
        groups: as `torch.optim.Optimizer.param_groups` holds them.
        model: the streaming model whose parameters they hold.
        learning_rate: of the matrices.
    """
    matrices = {id(weight) for weight in layer_matrices(model)}
    split: list[dict[str, Any]] = []
    for group in groups:
        chosen = [weight for weight in group["params"] if id(weight) in matrices]
        rest = [weight for weight in group["params"] if id(weight) not in matrices]
        if rest:
            split.append({**group, "params": rest})
        if chosen:
            split.append({**group, "params": chosen, "lr": learning_rate, MUON_KEY: True})
    return split


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups marked :data:`MUON_KEY` are updated by Muon. Without such groups it is AdamW.

    In a process group every process must call `step` with the same gradients.
    """

    # Upstream overloads `step` by whether a closure is given.
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates the matrices, takes their gradients away, and leaves the rest to AdamW, which skips what has none."""
        shapes: dict[torch.Size, list[tuple[nn.Parameter, dict[str, Any]]]] = defaultdict(list)
        for group in self.param_groups:
            for weight in group["params"] if group.get(MUON_KEY) else ():
                if weight.grad is not None:
                    shapes[weight.shape].append((weight, group))
        for shape, members in shapes.items():
            directions = self._directions([weight for weight, _ in members])
            for (weight, group), direction in zip(members, directions, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(direction, alpha=-group["lr"] * ADAMW_STEP * max(shape) ** 0.5)
                weight.grad = None
        return super().step(closure)

    def _directions(self, weights: list[nn.Parameter]) -> torch.Tensor:
        """Returns (matrices, rows, columns) bfloat16: the orthogonal directions of matrices of one shape."""
        gradients: list[Any] = [weight.grad for weight in weights]
        momenta = [self._momentum(weight) for weight in weights]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)
        processes = dist.get_world_size() if dist.is_initialized() else 1
        if processes == 1:
            return orthogonal(torch.stack(ahead))
        # Everyone needs as many as the others: the last shares may reach past the end.
        share = -(-len(ahead) // processes)
        first = dist.get_rank() * share
        mine = [ahead[min(place, len(ahead) - 1)] for place in range(first, first + share)]
        done = orthogonal(torch.stack(mine)).contiguous()
        shares = [torch.empty_like(done) for _ in range(processes)]
        dist.all_gather(shares, done)
        return torch.cat(shares)[: len(ahead)]

    def _momentum(self, weight: nn.Parameter) -> torch.Tensor:
        state = self.state[weight]
        if not state:
            # AdamW looks for a count of steps in every state it restores.
            state["step"], state["momentum_buffer"] = torch.tensor(0.0), torch.zeros_like(weight)
        return state["momentum_buffer"]


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Returns (batch, rows, columns) bfloat16 matrices with the singular vectors of the given ones and singular values near 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    state = matrices.bfloat16()
    state = state.mT if tall else state
    state = state / state.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    first, third, fifth = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = state @ state.mT
        polynomial = torch.baddbmm(square, square, square, beta=third, alpha=fifth)
        state = torch.baddbmm(state, polynomial, state, beta=first)
    return state.mT if tall else state
