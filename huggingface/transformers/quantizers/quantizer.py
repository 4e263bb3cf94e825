"""Packed weights through upstream's quantiser interface: `from_pretrained` packs what it reads, `save_pretrained` keeps it so.

Upstream builds a model without weights, lets the quantiser swap modules, then reads tensor after tensor; each weight is packed
as it comes, so a model is never held twice.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from ..integrations.quantized_linear import QuantizedLinear, QuantizedWeight
from .awq_checkpoint import PARTS, quantized_layers, unpacked
from .configuration import INT8_HEAD, METHOD, PLAIN, PackedWeightsConfig
from .packing import WeightFormat

HEAD_FORMAT = WeightFormat(8)
STREAMS = "streams"
"""Streams stay in half precision: their updates are added to quantised products."""


def register() -> None:
    """Registers configuration and quantiser with upstream; a second call changes nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(PackedWeightsConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(PackedWeightsQuantizer)


def convertible(model: Any, skipped: list[str]) -> dict[str, Any]:
    """Returns by name the linear layers of a model that share a format: all but the head, the streams, and what is skipped.

    Args:
        model: a causal language model, with or without streams.
        skipped: parts of module names.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not head
        and STREAMS not in name.split(".")
        and not any(part in name for part in skipped)
    }


def formats(model: nn.Module, config: PackedWeightsConfig) -> dict[str, WeightFormat]:
    """Returns by name the format of every linear layer of a model that is packed, in the model's order.

    Raises:
        ValueError: the model has no linear layer, or lacks one that the configuration names.
    """
    found = convertible(model, config.modules_to_not_convert or [])
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear layer to quantise.")
    unknown = sorted((config.modules or {}).keys() - found.keys())
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(
            f"the precision plan names {', '.join(unknown[:3])}{more}, which {type(model).__name__} has not among its "
            f"{len(found)} linear layers (such as {next(iter(found))}); use a plan made for this model."
        )
    wanted = {name: config.format_of(name) for name in found}
    return {name: kind for name, kind in wanted.items() if kind is not None}


def quantized_shell(module: Any, kind: WeightFormat, dtype: torch.dtype) -> QuantizedLinear:
    """Returns an empty quantised layer in a linear layer's place, with its hooks: gated updates hang on them."""
    inputs, outputs = sizes_of(module)
    shell = QuantizedLinear(inputs, outputs, module.bias is not None, kind, dtype)
    shell._forward_hooks = module._forward_hooks
    shell.transposed = isinstance(module, Conv1D)
    return shell


def sizes_of(module: Any) -> tuple[int, int]:
    """Returns inputs and outputs of a `Linear`, or of a `Conv1D`, whose weight is transposed."""
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


@torch.no_grad()
def quantize_model(model: Any, config: PackedWeightsConfig) -> Any:
    """Packs a model's linear layers in place, one after the other, and returns it.

    Raises:
        ValueError: a weight that cannot be packed, or a module that the model lacks; the message names the layer.
    """
    wanted = formats(model, config)
    if config.lm_head:
        _head_of(model)  # refuses before anything is packed
    for name, kind in wanted.items():
        quantize_layer(model, name, kind)
    model.config.quantization_config = config
    if config.lm_head:
        quantize_head(model)
    return model


@torch.no_grad()
def quantize_layer(model: Any, name: str, kind: WeightFormat) -> None:
    """Packs the linear layer of a name in place. Raises ValueError, which names it, if its weight cannot be packed."""
    model.set_submodule(name, _quantized(name, model.get_submodule(name), kind))


@torch.no_grad()
def quantize_head(model: Any) -> None:
    """Packs a model's LM head in 8 bits, in place; its configuration then says so.

    A head that is tied to the embeddings becomes a weight of its own, and the embeddings stay as they are. `tie_word_embeddings`
    stays too: it says what the model is without the quantisation.

    Raises:
        ValueError: a head that cannot be packed.
    """
    name, head = _head_of(model)
    shell = _quantized(name, head, HEAD_FORMAT)
    _untie(model, name)
    model.set_submodule(name, shell)
    model.config.quantization_config.lm_head = INT8_HEAD


def _head_of(model: Any) -> tuple[str, Any]:
    """Returns the LM head's name and the head. Raises ValueError where there is none that could be packed."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{type(model).__name__} has no LM head that can be packed; leave lm_head out.")
    return next(name for name, module in model.named_modules() if module is head), head


def _untie(model: Any, name: str) -> None:
    """Makes upstream forget that a head is tied, now and whenever it looks again."""
    weight = f"{name}.weight"
    model._tied_weights_keys = {k: v for k, v in (model._tied_weights_keys or {}).items() if k != weight}
    model.all_tied_weights_keys.pop(weight, None)


def _quantized(name: str, module: Any, kind: WeightFormat) -> QuantizedLinear:
    """Returns a linear layer's quantised one. Raises ValueError if its weight cannot be packed."""
    shell = quantized_shell(module, kind, module.weight.dtype)
    for field, tensor in _packed(name, module.weight, shell).tensors().items():
        setattr(shell, field, nn.Parameter(tensor, requires_grad=False))
    if module.bias is not None:
        shell.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    return shell


def _packed(name: str, weight: torch.Tensor, shell: QuantizedLinear) -> QuantizedWeight:
    try:
        return QuantizedWeight.of(weight.t() if shell.transposed else weight, shell.kind)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


class PackedWeightsQuantizer(HfQuantizer):
    """Packs weights as they are read; a checkpoint that was saved packed is read as it is."""

    requires_calibration = False
    quantization_config: PackedWeightsConfig

    def __init__(self, quantization_config: PackedWeightsConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.refused: list[str] = []

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Returns whether a tensor belongs to a packed weight."""
        del kwargs
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, QuantizedLinear) and name == "weight"

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Returns the bytes of each of a tensor's numbers once it is packed, by which upstream sets memory aside beforehand."""
        if self.pre_quantized or not self.param_needs_quantization(model, param_name):
            return param.element_size()
        module: Any = get_module_from_name(model, param_name)[0]
        shape = module.kind.shapes(module.out_features, module.in_features)["weight"]
        return math.prod(shape) * module.kind.dtypes["weight"].itemsize / param.numel()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.quantization_config.checkpoint_layout:
            self._look_at_files(model, kwargs.get("checkpoint_files") or [])
        for name, kind in formats(model, self.quantization_config).items():
            module: Any = model.get_submodule(name)
            with torch.device("meta"):
                shell = quantized_shell(module, kind, module.weight.dtype)
                if not self.pre_quantized:
                    # Upstream casts what it reads to the placeholder's dtype before the weight is packed.
                    placeholder = torch.empty(module.weight.shape, dtype=module.weight.dtype)
                    shell.weight = nn.Parameter(placeholder, requires_grad=False)
            model.set_submodule(name, shell)
        if self.quantization_config.lm_head and self.pre_quantized:
            name, head = _head_of(model)
            with torch.device("meta"):
                model.set_submodule(name, quantized_shell(head, HEAD_FORMAT, head.weight.dtype))
            _untie(model, name)
        model.config.quantization_config = self.quantization_config

    def _look_at_files(self, model: Any, files: list[str]) -> None:
        """Learns from an AWQ checkpoint's headers which layers it packs; raises ValueError before a tensor is read."""
        config = self.quantization_config
        layers = {name: sizes_of(module) for name, module in convertible(model, []).items()}
        prefix, layout = model.base_model_prefix, str(config.checkpoint_layout)
        found = quantized_layers(files, layers, int(config.group_size or 0), layout, prefix)
        config.modules = {name: PLAIN for name, kind in found.items() if kind == PLAIN} or None

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """Returns upstream's conversions, and for an AWQ checkpoint the one that turns a layer's tensors into ours."""
        if not self.quantization_config.checkpoint_layout:
            return weight_conversions
        sources = [rf"\.{part}$" for part in PARTS]
        return [*weight_conversions, WeightConverter(sources, ".weight", [UnpackAwq(self)])]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del kwargs
        if self.refused:
            raise ValueError("; ".join(self.refused))
        if self.quantization_config.lm_head and not self.pre_quantized:
            quantize_head(model)  # only now is a tied head there
        if self.quantization_config.checkpoint_layout:
            self.quantization_config.checkpoint_layout = None
            # What is saved from now on is ours; upstream would turn it back.
            model._weight_conversions = [
                one
                for one in model._weight_conversions
                if not any(isinstance(step, UnpackAwq) for step in getattr(one, "operations", ()))
            ]
        return model

    def get_quantize_ops(self) -> PackWeights:
        """Returns what upstream applies to each weight it reads."""
        return PackWeights(self)

    def get_state_dict_and_metadata(
        self, model: Any
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """Returns what is saved, `None` for everything; upstream asks here instead of taking what it was given."""
        chosen = getattr(model, "weights_to_save", None)  # a model of upstream's has no say
        return (None if chosen is None else chosen()), {}

    def is_serializable(self, **kwargs: Any) -> bool:
        """Returns True: packed tensors are ordinary ones."""
        del kwargs
        return True

    @property
    def is_trainable(self) -> bool:
        """Returns False: integers have no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Returns True: shapes do not depend on values."""
        return True


class PackWeights(ConversionOps):
    """Packs one weight that upstream has read; upstream's extension point for quantisation on load."""

    def __init__(self, quantizer: PackedWeightsQuantizer):
        self.quantizer = quantizer

    # Upstream's signature differs between the versions we support; it passes everything by name.
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], **kwargs: Any
    ) -> dict[str, nn.Parameter]:
        """Returns the stored tensors of the one weight in `input_dict`, by full name."""
        ((name, tensors),) = input_dict.items()
        model = kwargs["model"]
        weight = tensors[0] if isinstance(tensors, list) else tensors
        module, _ = get_module_from_name(model, name)
        base = name.rsplit(".", 1)[0]
        try:
            packed = _packed(base, weight, module)
        except ValueError as error:
            # Upstream would hide what is raised here; the quantiser raises it once all tensors are read.
            self.quantizer.refused.append(str(error))
            packed = _packed(base, torch.zeros_like(weight), module)
        missing = kwargs.get("missing_keys")
        stored = {f"{base}.{field}": tensor for field, tensor in packed.tensors().items()}
        if missing is not None:
            missing -= stored.keys()
        return {key: nn.Parameter(tensor, requires_grad=False) for key, tensor in stored.items()}


class UnpackAwq(ConversionOps):
    """Turns one layer's tensors of an AWQ checkpoint into ours; upstream's extension point for reading."""

    def __init__(self, quantizer: PackedWeightsQuantizer):
        self.hf_quantizer = quantizer  # upstream looks at this name: tensors come in the checkpoint's dtypes

    def __deepcopy__(self, memo: dict[int, Any]) -> UnpackAwq:
        """Upstream copies the operation for each layer; what is refused belongs to one quantiser."""
        return self

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], **kwargs: Any
    ) -> dict[str, nn.Parameter]:
        """Returns the stored tensors of the layer whose three tensors are in `input_dict`, by full name."""
        config, base = self.hf_quantizer.quantization_config, kwargs["full_layer_name"].rpartition(".")[0]
        parts = {
            name: next(tensors[0] for source, tensors in input_dict.items() if name in source)
            for name in PARTS
        }
        try:
            stored = unpacked(parts, int(config.group_size or 0), str(config.checkpoint_layout))
        except ValueError as error:
            self.hf_quantizer.refused.append(f"{base}: {error}")  # raised once all tensors are read
            parts["scales"] = torch.zeros_like(parts["scales"])
            stored = unpacked(parts, int(config.group_size or 0), str(config.checkpoint_layout))
        return {f"{base}.{name}": nn.Parameter(one, requires_grad=False) for name, one in stored.items()}
