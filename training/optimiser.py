"""The optimiser of a model whose weights are bfloat16: it keeps float32 copies and updates those.

Autocast keeps float32 weights in the model and converts weights and states in front of every product, which at these sizes is a
third of all kernels. Here one conversion a step takes their place. The update itself must stay in float32: bfloat16 has 8 bits,
and a step smaller than 1/256 of a weight would vanish.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from training.muon import MuonAdamW

MASTER_KEY = "master_weights"


class MasterAdamW(MuonAdamW):
    """AdamW, with Muon for groups that ask for it, on float32 copies of the weights; the weights themselves become bfloat16.

    Args:
        groups: parameter groups of float32 weights, as `torch.optim.Optimizer.param_groups` holds them; converted in place.
    """

    def __init__(self, groups: list[dict[str, Any]]):
        self.weights: list[nn.Parameter] = [weight for group in groups for weight in group["params"]]
        self.masters = [nn.Parameter(weight.detach().clone()) for weight in self.weights]
        copies = iter(self.masters)
        super().__init__([{**group, "params": [next(copies) for _ in group["params"]]} for group in groups])
        for weight in self.weights:
            weight.data = weight.data.bfloat16()

    # Upstream overloads `step` by whether a closure is given.
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates the copies from the weights' gradients, then the weights from the copies."""
        self._take_gradients()
        loss = super().step(closure)
        torch._foreach_copy_([weight.data for weight in self.weights], [copy.data for copy in self.masters])
        return loss

    def _take_gradients(self) -> None:
        given: list[torch.Tensor] = []
        taken: list[torch.Tensor] = []
        for weight, copy in zip(self.weights, self.masters, strict=True):
            if weight.grad is None:
                copy.grad = None
                continue
            if copy.grad is None:
                copy.grad = torch.empty_like(copy)
            given.append(weight.grad)
            taken.append(copy.grad)
        torch._foreach_copy_(taken, given)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the weights' gradients; the copies' are written anew in each step."""
        for weight in self.weights:
            if set_to_none:
                weight.grad = None
            elif weight.grad is not None:
                weight.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Returns AdamW's state and the copies."""
        return {**super().state_dict(), MASTER_KEY: [copy.detach() for copy in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state, the copies, and from them the weights."""
        rest = dict(state_dict)
        for copy, saved in zip(self.masters, rest.pop(MASTER_KEY), strict=True):
            copy.copy_(saved)
        super().load_state_dict(rest)
        torch._foreach_copy_([weight.data for weight in self.weights], [copy.data for copy in self.masters])

    def release(self) -> None:
        """Makes the weights float32 again, with the copies' values."""
        for weight, copy in zip(self.weights, self.masters, strict=True):
            weight.data = copy.data
            weight.grad = None
