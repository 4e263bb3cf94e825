"""The layer walk of `modeling_spec_stream.py` on our kernels, for decoding on a GPU.

Eager modules cost a launch for every small operation, and at batch size 1 launches are what a step is made of. Here a layer is
seven kernels: norm, one product for query, key and value, attention (which also writes the cache), output product with the
residual, norm, and the two products of the MLP with bias, activation and residual in them. Weights stay where they are; the
three projections, and a gated MLP's two, are laid out side by side once, and the modules' parameters become views of that. So do
GPT-2's, which hold a weight as (in, out): the kernels read (out, in), and the parameter becomes the transposed view.

An architecture says by name where its parts are (:class:`LayerNames`). Whatever these kernels do not know is a reason not to be
fused (:func:`unfused_reason`), never a wrong result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...integrations import fused_norm
from ...integrations.fused_norm import add_norm
from ...integrations.packed_linear import PACKED, outputs_first
from ...integrations.quantized_linear import QuantizedLinear, QuantizedWeight, quantized_linear
from ...integrations.skinny_linear import finish, linear, runs_here
from ...integrations.tree_attention import AttentionWorkspace, StepRows, tree_attention

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
"""Names that configurations use, and the kernel's name of the same function."""
PRODUCTS = frozenset((*PACKED, *PACKED.values()))
"""Linear layers that the fused products read, beside the quantised ones."""
HOST_ROTARY = ("dynamic", "longrope")
"""Rotary embeddings whose frequencies depend on the longest position, which upstream compares on the host."""
HEAD_SIZES = (16, 32, 64, 80, 96, 128)
"""Features a head may have in the attention kernel."""


@dataclass(frozen=True)
class LayerNames:
    """Names, within a decoder layer, of the modules that a fused pass reads.

    Attributes:
        norm, mlp_norm: normalisation in front of attention and MLP.
        projections: query, key and value; or the one module that makes all three, in this order.
        output: attention's output product.
        expand: the MLP's first product; two for a gated MLP, the activated one first.
        contract: the MLP's last product.
    """

    norm: str
    projections: tuple[str, ...]
    output: str
    mlp_norm: str
    expand: tuple[str, ...]
    contract: str


def unfused_reason(model: Any) -> str | None:
    """Returns why a model's layers cannot run on the fused kernels, or `None` if they can."""
    kind = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type")
    if kind in HOST_ROTARY:
        return f"rotary embeddings of type {kind!r} look at positions on the host"
    names = getattr(model, "layer_names", None)
    if names is None:
        return f"{type(model).__name__} does not say where its layers' parts are"
    if model.mlp_activation() not in ACTIVATIONS:
        return f"no kernel knows the activation {model.mlp_activation()!r}"
    head = model.head_size()
    if head not in HEAD_SIZES:
        return (
            f"no attention kernel knows heads of {head} features (known: {', '.join(map(str, HEAD_SIZES))})"
        )
    # Each of them: quantisation may leave out some layers.
    reasons = (_unfused_layer(layer, names) for layer in model.decoder_layers())
    return next((reason for reason in reasons if reason is not None), None)


def _unfused_layer(layer: nn.Module, names: LayerNames) -> str | None:
    for name in (names.norm, names.mlp_norm):
        norm = _part(layer, name)
        if not fused_norm.is_known(norm):
            return f"no kernel knows the norm {type(norm).__name__}"
    linears = (*names.projections, names.output, *names.expand, names.contract)
    parts: dict[str, Any] = {name: _part(layer, name) for name in linears}
    formats = {}
    for name, module in parts.items():
        # Packed ones, in a model that has run on a CPU, keep their weight as it was.
        if type(module) in PRODUCTS:
            continue
        if not isinstance(module, QuantizedLinear):
            return f"{name} is a {type(module).__name__}, which no fused product reads"
        formats[name] = module.kind
    for group in (names.projections, names.expand) if formats else ():
        if len({formats.get(name) for name in group}) > 1:
            return f"{' and '.join(group)} are stored in different formats, and one product reads them all"
    if len(names.expand) == 2 and parts[names.expand[0]].bias is not None:
        return "no fused product reads a gated MLP with a bias"
    return None


def _part(layer: nn.Module, name: str) -> Any:
    """Returns `layer.get_submodule(name)`, in a fifth of its time: every call of `generate` looks at every layer anew."""
    part: Any = layer
    try:
        for step in name.split("."):
            part = part._modules[step]
    except KeyError:  # a wrapper that passes on what it is asked for, such as a compiled layer
        return layer.get_submodule(name)
    return part


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

    def _product(self, rows: torch.Tensor, **options: Any) -> torch.Tensor:
        if isinstance(self.weight, QuantizedWeight):
            return quantized_linear(rows, self.weight, self.bias, **options)
        return linear(rows, self.weight, self.bias, **options)


def _enter(
    hidden: torch.Tensor, update: torch.Tensor | None, norm: nn.Module
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


def _nothing() -> None:
    return None


def weights_of(model: Any) -> tuple[int, torch.dtype, int]:
    """Returns what tells one state of a model's weights from another: moved, cast, or with other streams."""
    weight = model.get_input_embeddings().weight
    streams = getattr(model, "streams", None)
    return weight.data_ptr(), weight.dtype, 0 if streams is None else _writes(streams)


def _writes(module: nn.Module) -> int:
    """Returns how often the parameters below a module were written to; one that is shared counts once for each place.

    Walks the modules itself: `parameters()` takes ten times as long, and every call of `generate` asks.
    """
    writes, left = 0, [module]
    for at in left:  # grows as it goes
        if at._modules:
            left += [child for child in at._modules.values() if child is not None]
        if at._parameters:
            writes += sum([one._version for one in at._parameters.values() if one is not None])
    return writes


def fused_layers_of(model: Any) -> FusedLayers:
    """Returns the model's fused layers, the same for all who ask until its weights are moved or cast."""
    layers = model.__dict__.get("_fused_layers")
    if layers is None or layers.source != weights_of(model):
        layers = model.__dict__["_fused_layers"] = FusedLayers(model)
    return layers


class FusedLayers:
    """A decoder's layers on fused kernels.

    Args:
        model: decoder with streams for which :func:`unfused_reason` is `None`.

    Attributes:
        source: identifies the weights that were laid out, see :func:`weights_of`.
    """

    def __init__(self, model: Any):
        self.model = model
        self.source = weights_of(model)
        self.activation = ACTIVATIONS[model.mlp_activation()]
        self.gated = len(model.layer_names.expand) == 2
        self.layers = [self._layer(index) for index in range(len(model.decoder_layers()))]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model lays its own weights out when it first needs to."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()

    def _layer(self, index: int) -> _Layer:
        layer = self.model.decoder_layers()[index]
        names = self.model.layer_names

        def product(*parts: str) -> _Product:
            modules: Any = [layer.get_submodule(name) for name in parts]
            return _Product.of(modules, [self.model.lora_of(index, name) for name in parts])

        return _Layer(
            norm=layer.get_submodule(names.norm),
            project=product(*names.projections),
            output=product(names.output),
            mlp_norm=layer.get_submodule(names.mlp_norm),
            expand=product(*names.expand),
            contract=product(names.contract),
            window=self.model.layer_window(index),
            scaling=self.model.attention_scaling(index),
        )

    def run(
        self,
        indices: Iterable[int],
        hidden: torch.Tensor,
        update: torch.Tensor | None,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        lengths: torch.Tensor,
        rows: StepRows,
        cache: Any,
        workspace: AttentionWorkspace,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns residual stream and what is still to be added to it, each (batch, rows, hidden). The cache gains the rows.

        Args:
            indices: layers to run.
            hidden: (batch, rows, hidden) residual stream.
            update: (batch, rows, hidden) still to be added to it, or `None`.
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
            # Few rows: the product adds the residual. Many: the library's product cannot, the next norm does.
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
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if runs_here(rows.shape[0] * rows.shape[1], rows.shape[-1]):
            return product.apply(rows, streams, residual=hidden), None
        return hidden, product.apply(rows, streams)
