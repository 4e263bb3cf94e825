"""What captured decoding has to notice of a model between two calls: replaced weights, modules or hooks.

Every call of `generate` asks. To look at every module takes 0.3 ms and more, so what was seen is kept, and a call only makes sure
that it is still there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import output_capturing

from ...integrations.tensor_version import nothing, version_of
from .fusable import unfused_reason
from .streams import Streams

_NUMBERS = itertools.count()


class ModelState:
    """A model as it was when somebody looked.

    Attributes:
        number: of this state; another state, of this model or another, has another.
        reason: why its steps cannot be captured, or `None`.
    """

    def __init__(self, model: Any):
        self.number = next(_NUMBERS)
        modules = _below(model)
        self._children = [(at._modules, name, child) for at in modules for name, child in at._modules.items()]
        self._parameters = [
            (at._parameters, name, one) for at in modules for name, one in at._parameters.items()
        ]
        self._tensors = [one for _, _, one in self._parameters if one is not None]
        self._hooks = [hooks for at in modules for hooks in (at._forward_hooks, at._forward_pre_hooks)]
        self._handles = self._hooks_now()
        streams = getattr(model, "streams", None)
        self._of_streams = [] if streams is None else list(streams.parameters())
        self.accept_moves()
        self.reason = unfused_reason(model) or _scattered(self._tensors) or _hooked(model)

    def accept_moves(self) -> None:
        """Takes the weights' places as they are now: whoever laid them out moved them."""
        self._places = [one.data_ptr() for one in self._tensors]

    def holds(self) -> bool:
        """Returns whether modules, hooks and the weights' places are what they were."""
        return (
            all([held.get(name) is child for held, name, child in self._children])
            and all([held.get(name) is one for held, name, one in self._parameters])
            and [one.data_ptr() for one in self._tensors] == self._places
            and self._hooks_now() == self._handles
        )

    def _hooks_now(self) -> list[int]:
        """Returns the hooks there are by torch's numbers, which are never given twice."""
        return [number for hooks in self._hooks for number in hooks]

    def writes(self) -> int:
        """Returns how often parameters of the streams were written to."""
        return sum([version_of(one) for one in self._of_streams])

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model has a state of its own."""

    def __reduce__(self) -> tuple[Any, ...]:
        return nothing, ()


def state_of(model: Any) -> ModelState:
    """Returns the model's state, the same until something about it has changed."""
    state = model.__dict__.get("_model_state")
    if state is None or not state.holds():
        state = model.__dict__["_model_state"] = ModelState(model)
    return state


def weights_of(model: Any) -> tuple[int, int]:
    """Returns what tells one state of a model's weights from another: its number, and the writes to the streams.

    Captured graphs read weights where they are, so what is written there is seen; of the streams they hold tables besides.
    """
    state = state_of(model)
    return state.number, state.writes()


def _below(module: nn.Module) -> list[nn.Module]:
    """Returns a module and all below it; one that is shared comes once for each place."""
    found = [module]
    for at in found:  # grows as it goes
        found += [child for child in at._modules.values() if child is not None]
    return found


def _scattered(tensors: Sequence[torch.Tensor]) -> str | None:
    places = {str(one.device) for one in tensors}
    return f"the model's weights are on {' and '.join(sorted(places))}" if len(places) > 1 else None


def _hooked(model: Any) -> str | None:
    """Returns which hook a captured step would not call."""
    parts = [
        model.get_input_embeddings(),
        *model.decoder_layers(),
        model.last_norm(),
        model.get_output_embeddings(),
    ]
    for module in (below for part in parts for below in _below(part)):
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if "_hf_hook" in module.__dict__ or not all(map(_is_idle, hooks)):
            return f"a captured step would not call the hook on a {type(module).__name__}"
    return None


def _is_idle(hook: Any) -> bool:
    """Returns whether a hook does nothing in our steps.

    Those of the streams add what the fused layers add themselves; upstream's, left behind where a forward pass was asked for
    hidden states, wait for the next such pass.
    """
    owner = getattr(getattr(hook, "func", None), "__self__", None)
    return isinstance(owner, Streams) or getattr(hook, "__module__", None) == output_capturing.__name__
