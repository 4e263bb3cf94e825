"""Models with random weights, made so that a device never holds much more than the finished model.

Upstream builds the model without memory. It is then filled part by part (an embedding, a decoder layer, the head): a part is
drawn in float32, so that every dtype gets the same weights but for rounding, cast, and packed where the recipe packs. Each part
has a seed of its own, made from its name: what a stock class and our engine call alike is alike, whatever else the engine has.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from huggingface.transformers.quantizers.configuration import PackedWeightsConfig
from huggingface.transformers.quantizers.quantizer import formats, quantize_head, quantize_layer

RANDOM_SEED = 0


@torch.no_grad()
def random_model(
    model_class: Any,
    config: PreTrainedConfig,
    device: str,
    dtype: torch.dtype,
    packed: PackedWeightsConfig | None = None,
    **choice: Any,
) -> Any:
    """Returns a model whose weights depend on its class's part names, the configuration and the device alone.

    Args:
        model_class: upstream's, or ours.
        config: the model's.
        device: where it goes.
        dtype: of all floating-point weights; what upstream computes in float32 stays so.
        packed: how weights are packed; `None` for not at all.
        **choice: further options of upstream's `_from_config`.

    Raises:
        ValueError: weights that cannot be packed so.
    """
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=dtype, **choice)
    wanted = {} if packed is None else formats(model, packed)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, part in list(_parts(model)):
        _fill(model, name, part, device, dtype, made)
        for inside in [one for one in wanted if f"{one}.".startswith(f"{name}.")]:
            quantize_layer(model, inside, wanted[inside])
    model.tie_weights()
    if packed is not None:
        model.config.quantization_config = packed
        if packed.lm_head:
            quantize_head(model)
    return model


def _parts(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields by name the parts of a model that are made at a time: items of its lists, and what holds no list."""
    for name, child in model.named_children():
        if isinstance(model, nn.ModuleList) or not any(isinstance(m, nn.ModuleList) for m in child.modules()):
            yield prefix + name, child
        else:
            yield from _parts(child, f"{prefix}{name}.")


def _fill(
    model: Any,
    name: str,
    part: nn.Module,
    device: str,
    dtype: torch.dtype,
    made: dict[nn.Parameter, nn.Parameter],
) -> None:
    """Gives a part's tensors memory and values, in place.

    Args:
        model: knows how its modules are initialised.
        name: the part's, which its values depend on.
        part: its tensors are on the meta device.
        device: where they go.
        dtype: of the parameters in the end; buffers have their own.
        made: by parameter without memory what stands for it; gains the part's. Tied parameters are made once.
    """
    parameters = list(part.parameters())
    tied = bool(parameters) and all(parameter in made for parameter in parameters)
    for module in part.modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in made:
                empty = torch.empty(parameter.shape, dtype=torch.float32, device=device)
                made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[key] = made[parameter]
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = torch.empty_like(buffer, device=device)
    if tied:
        return
    torch.manual_seed(RANDOM_SEED + zlib.crc32(name.encode()))
    part.apply(model._init_weights)
    for parameter in part.parameters():
        parameter.data = parameter.data.to(dtype)
