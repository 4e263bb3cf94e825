"""Whether the fused kernels know a model: its layers, its head, its norms.

Whatever they do not know is a reason to run modules one by one, never a wrong result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...integrations import fused_norm
from ...integrations.packed_linear import PACKED
from ...integrations.quantized_linear import QuantizedLinear

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
    return next((reason for reason in reasons if reason is not None), None) or _unfused_end(model)


@torch.no_grad()
def embedding_tables(model: Any) -> list[torch.Tensor] | None:
    """Returns the tables whose rows, added up, are what `embed_rows` returns: tokens', and positions' if there are any.

    `None` where it does more: a scale, an offset, a hook. Then a step calls it.
    """
    layers = {id(module) for layer in model.decoder_layers() for module in layer.modules()}
    outside = [module for module in model.modules() if id(module) not in layers]
    if any(module._forward_hooks or module._forward_pre_hooks for module in outside):
        return None
    modules = [one for one in (model.get_input_embeddings(), model.position_embedding()) if one is not None]
    if any(type(one) is not nn.Embedding or one.max_norm is not None for one in modules):
        return None
    tables = [one.weight for one in modules]
    count = min(map(len, tables))
    some = torch.tensor([[0, count // 2, count - 1]], device=tables[0].device)
    positions = some.flip(1).clamp(max=model.config.max_position_embeddings - 1)
    rows = sum(table[at] for table, at in zip(tables, (some, positions), strict=False))
    return tables if torch.equal(rows, model.embed_rows(some, positions)) else None


def _unfused_end(model: Any) -> str | None:
    norm, head = model.last_norm(), model.get_output_embeddings()
    if not fused_norm.is_known(norm):
        return f"no kernel knows the norm {type(norm).__name__}"
    if type(head) not in PRODUCTS and not isinstance(head, QuantizedLinear):
        return f"the LM head is a {type(head).__name__}, which no fused product reads"
    return None


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
