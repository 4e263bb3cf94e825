"""The layer walk of `modeling_spec_stream.py` on our kernels, for decoding on a GPU.

Eager modules cost a launch for every small operation, and at batch size 1 launches are what a step is made of. Here a layer is
seven kernels: norm, one product for query, key and value, attention (which also writes the cache), output product with the
residual, norm, and the two products of the MLP with bias, activation and residual in them. Weights stay where they are; the
three projections, and a gated MLP's two, are laid out side by side once, and the modules' parameters become views of that. So do
GPT-2's, which hold a weight as (in, out): the kernels read (out, in), and the parameter becomes the transposed view.

Whatever these kernels do not know is a reason not to be fused (:mod:`.fusable`), never a wrong result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...integrations.divided_linear import Parts, divided_linear
from ...integrations.fused_norm import add_norm
from ...integrations.packed_linear import outputs_first
from ...integrations.quantized_linear import QuantizedLinear, QuantizedWeight, quantized_linear
from ...integrations.skinny_linear import finish, linear, parts_for, runs_here
from ...integrations.tensor_version import nothing
from ...integrations.tree_attention import AttentionWorkspace, StepRows, tree_attention
from .fusable import ACTIVATIONS
from .model_state import state_of


@dataclass
class _Product:
    """One product of a layer: weights side by side, and the gated LoRA updates of its parts."""

    weight: torch.Tensor | QuantizedWeight
    bias: torch.Tensor | None
    updates: list[tuple[slice, Any]]

    @classmethod
    def of(cls, modules: list[nn.Linear | Conv1D], updates: list[Any]) -> _Product:
        """Lays the modules' weights side by side and makes their parameters views of that."""
        counts = [len(outputs_first(module)) for module in modules]
        weight: torch.Tensor | QuantizedWeight = _share_weights(modules, counts)
        bias = modules[0].bias
        if len(modules) > 1 and bias is not None:
            bias = _share("bias", modules, counts)
        first = modules[0]
        if isinstance(first, QuantizedLinear):
            scales = {name: _share(name, modules, counts) for name in first.scale_names}
            weight = first.read({"weight": weight, **scales})
        ends = torch.tensor([0, *counts]).cumsum(0).tolist()
        spans = [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]
        return cls(weight, bias, [pair for pair in zip(spans, updates, strict=True) if pair[1] is not None])

    def apply(
        self, rows: torch.Tensor, streams: int, norm: nn.Module | None = None, **epilogue: Any
    ) -> torch.Tensor:
        """Returns the product of (batch, rows, in), its updates added to the last `streams` rows before the epilogue."""
        if not streams or not self.updates:
            return self._product(rows, norm=norm, **epilogue)
        # Streams come beside other rows, and only a single row is left for a product to normalise.
        assert norm is None
        product = self._product(rows)
        for span, lora in self.updates:
            product[:, -streams:, span] += lora(rows[:, -streams:])
        return finish(product, **epilogue)

    def divided(self, rows: torch.Tensor, streams: int) -> Parts | None:
        """Returns the product in parts, where that is faster and the last `streams` rows get no updates; else `None`."""
        if isinstance(self.weight, QuantizedWeight) or (streams and self.updates):
            return None
        count = parts_for(rows, self.weight)
        return None if count is None else divided_linear(rows, self.weight, count, self.bias)

    def _product(self, rows: torch.Tensor, **options: Any) -> torch.Tensor:
        if isinstance(self.weight, QuantizedWeight):
            return quantized_linear(rows, self.weight, self.bias, **options)
        return linear(rows, self.weight, self.bias, **options)


def _enter(
    hidden: torch.Tensor, update: torch.Tensor | Parts | None, norm: nn.Module
) -> tuple[torch.Tensor, torch.Tensor, nn.Module | None]:
    """Returns the rows that a block reads, the residual stream, and the norm that the block's product has to apply itself."""
    if update is None and hidden.numel() == hidden.shape[-1]:
        return hidden, hidden, norm
    normed, hidden = add_norm(hidden, update, norm)
    return normed, hidden, None


def _share_weights(modules: list[nn.Linear | Conv1D], counts: list[int]) -> torch.Tensor:
    """Returns (sum of counts, in) contiguous weights, which the modules' parameters are now views of."""
    weights = [outputs_first(module) for module in modules]
    together = torch.cat(weights) if len(weights) > 1 else weights[0].contiguous()
    for module, part in zip(modules, together.split(counts), strict=True):
        module.weight.data = part.t() if isinstance(module, Conv1D) else part
    return together


def _share(name: str, modules: list[Any], counts: list[int]) -> torch.Tensor:
    """Returns the modules' parameters of a name, one row or number an output, side by side; they are now views of that."""
    together = torch.cat([getattr(module, name).data for module in modules])
    for module, part in zip(modules, together.split(counts), strict=True):
        getattr(module, name).data = part
    return together


@dataclass
class _Layer:
    norm: nn.Module
    project: _Product
    output: _Product
    mlp_norm: nn.Module
    expand: _Product
    contract: _Product
    window: int | None
    scaling: float


def _layer(model: Any, index: int) -> _Layer:
    """Returns a layer's parts, its weights laid out."""
    layer = model.decoder_layers()[index]
    names = model.layer_names

    def product(*parts: str) -> _Product:
        modules: Any = [layer.get_submodule(name) for name in parts]
        return _Product.of(modules, [model.lora_of(index, name) for name in parts])

    return _Layer(
        norm=layer.get_submodule(names.norm),
        project=product(*names.projections),
        output=product(names.output),
        mlp_norm=layer.get_submodule(names.mlp_norm),
        expand=product(*names.expand),
        contract=product(names.contract),
        window=model.layer_window(index),
        scaling=model.attention_scaling(index),
    )


def fused_layers_of(model: Any) -> FusedLayers:
    """Returns the model's fused layers, the same for all who ask until its weights are moved, cast or replaced."""
    layers = model.__dict__.get("_fused_layers")
    if layers is None or layers.source != state_of(model).number:
        layers = model.__dict__["_fused_layers"] = FusedLayers(model)
    return layers


class FusedLayers:
    """A decoder's layers on fused kernels.

    Args:
        model: decoder with streams for which :func:`.fusable.unfused_reason` is `None`. Not held: it holds the layers.

    Attributes:
        source: number of the model's state whose weights were laid out.
    """

    def __init__(self, model: Any):
        state = state_of(model)
        self.source = state.number
        self.activation = ACTIVATIONS[model.mlp_activation()]
        self.gated = len(model.layer_names.expand) == 2
        self.layers = [_layer(model, index) for index in range(len(model.decoder_layers()))]
        state.accept_moves()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model lays its own weights out when it first needs to."""

    def __reduce__(self) -> tuple[Any, ...]:
        return nothing, ()

    def run(
        self,
        indices: Iterable[int],
        hidden: torch.Tensor,
        update: torch.Tensor | Parts | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        lengths: torch.Tensor,
        rows: StepRows,
        cache: Any,
        workspace: AttentionWorkspace,
    ) -> tuple[torch.Tensor, torch.Tensor | Parts | None]:
        """Returns residual stream and what is still to be added to it, each (batch, rows, hidden). The cache gains the rows.

        Args:
            indices: layers to run.
            hidden: (batch, rows, hidden) residual stream.
            update: (batch, rows, hidden) still to be added to it, or `None`; a product may be in parts.
            rotary: cosines and sines of the rows' positions, (batch, rows, head_dim); `None` where positions are learned.
            lengths: (batch,) int64 committed rows.
            rows: who sees whom.
            cache: its layers hold `keys` and `values`.
            workspace: of the attention.
        """
        streams = hidden.shape[1] - rows.nodes
        for index in indices:
            layer, slots = self.layers[index], cache.layers[index]
            rows_in, hidden, norm = _enter(hidden, update, layer.norm)
            projected = layer.project.apply(rows_in, streams, norm=norm)
            # No kernel of these layers writes lengths or committed rows.
            attended = tree_attention(
                projected, slots.keys, slots.values, lengths, rows, layer.scaling, layer.window, workspace,
                rotary=rotary, settled=True,
            )  # fmt: skip
            # Few rows: the product adds the residual. Many: the library's product, whole or in parts, cannot; the next norm does.
            hidden, update = self._add(layer.output, attended, hidden, streams)
            rows_in, hidden, norm = _enter(hidden, update, layer.mlp_norm)
            inner = layer.expand.apply(
                rows_in, streams, activation=self.activation, gated=self.gated, norm=norm
            )
            hidden, update = self._add(layer.contract, inner, hidden, streams)
        return hidden, update

    @staticmethod
    def _add(
        product: _Product, rows: torch.Tensor, hidden: torch.Tensor, streams: int
    ) -> tuple[torch.Tensor, torch.Tensor | Parts | None]:
        if runs_here(rows.shape[0] * rows.shape[1], rows.shape[-1]):
            return product.apply(rows, streams, residual=hidden), None
        parts = product.divided(rows, streams)
        return hidden, product.apply(rows, streams) if parts is None else parts
