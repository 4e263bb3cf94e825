"""Checkpoints in AWQ's own file format, read into ours without a loss: the same numbers, zero points and scales.

A layer is three tensors there: `qweight` and `qzeros` hold eight 4-bit numbers in an int32 word, `scales` are float16, and a
weight is `(q - zero) * scale`. Two layouts are in use::

    gemm   qweight (in, out / 8)   qzeros (in / group, out / 8)   scales (in / group, out)
           words run along the outputs; from the low bits up a word holds columns 0 2 4 6 1 3 5 7 of its eight
    gemv   qweight (out, in / 8)   qzeros (out, width)            scales (out, 8 * width)
           words run along the inputs or groups, columns in order; what exceeds the groups fills a width up

(Layouts as the format's writer has them: casper-hansen/AutoAWQ, `awq/modules/linear/gemm.py` and `gemv.py`.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .configuration import METHOD, PLAIN
from .packing import RUN, WeightFormat, pack, runs

AWQ = "awq"
"""Upstream's `quant_method` of the format."""
ORDERS: dict[str, tuple[int, ...]] = {"gemm": (0, 2, 4, 6, 1, 3, 5, 7), "gemv": (0, 1, 2, 3, 4, 5, 6, 7)}
"""Layout -> which of a word's eight columns each of its 4-bit numbers is, from the low bits up."""
WORD = 8
PARTS = ("qweight", "qzeros", "scales")
Header = tuple[tuple[int, ...], str]


def is_awq(config: Any) -> bool:
    """Returns whether a model's configuration says that its weights are in AWQ's format."""
    saved = getattr(config, "quantization_config", None)
    return isinstance(saved, Mapping) and saved.get("quant_method") == AWQ


def translate_config(config: Any, place: str) -> Any:
    """Returns a model's configuration, in place, with our quantisation in place of AWQ's; any other one stays as it is.

    `from_pretrained(place, config=translate_config(AutoConfig.from_pretrained(place), place))` reads the weights.

    Args:
        config: upstream's, as it was read.
        place: where the checkpoint is, for messages.

    Raises:
        ValueError: bits, group size, layout or zero points that we do not read.
    """
    if is_awq(config):
        config.quantization_config = translated(config.quantization_config, place)
    return config


def translated(fields: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Returns our `quantization_config` of what `config.json` says of weights in AWQ's format. Raises as `translate_config`."""
    layout = str(fields.get("version") or fields.get("format") or "gemm").lower()
    bits, size = fields.get("bits", 4), fields.get("group_size", 128)
    if layout not in ORDERS:
        known = " and ".join(ORDERS)
        raise ValueError(
            f"{place} is an AWQ checkpoint of version '{layout}'; {known} are read: save it as one."
        )
    if bits != 4 or not fields.get("zero_point", True):
        told = f"{bits} bits, zero_point {fields.get('zero_point', True)}"
        raise ValueError(f"{place} is an AWQ checkpoint with {told}; 4 bits with zero points are read.")
    try:
        WeightFormat(4, size, True)
    except ValueError as error:
        raise ValueError(f"{place} is an AWQ checkpoint that our kernels cannot read: {error}") from None
    return {
        "quant_method": METHOD, "bits": 4, "group_size": size, "zero_point": True, "checkpoint_layout": layout,
    }  # fmt: skip


def quantized_layers(
    files: list[str], layers: Mapping[str, tuple[int, int]], size: int, layout: str, prefix: str
) -> dict[str, str]:
    """Returns by name what a checkpoint's headers say of a model's linear layers: `awq`, or `plain`.

    Args:
        files: the safetensors files.
        layers: name -> inputs and outputs of every layer that could be quantised.
        size: inputs of a group.
        layout: one of :data:`ORDERS`.
        prefix: a first part of names that a checkpoint may leave out.

    Raises:
        ValueError: a tensor is missing or of another shape or dtype, or a layer is quantised that we keep as it is.
    """
    found = headers(files)
    quantized = {key.rpartition(".")[0] for key in found if key.rpartition(".")[2] in PARTS}
    here = {}
    for name in layers:
        names = (name, name.removeprefix(f"{prefix}."))
        here[name] = next((own for own in names if own in quantized), None)
    stray = sorted(quantized - set(here.values()))
    if stray:
        raise ValueError(
            f"the AWQ checkpoint packs {stray[0]} ({len(stray)} such in all), which is no linear layer that this model packs; "
            "use a checkpoint of this architecture that keeps the LM head as it is."
        )
    if not quantized:
        raise ValueError("config.json says AWQ, but no file holds a packed layer; restore the checkpoint.")
    for name, own in here.items():
        if own is not None:
            _check_layer(own, found, layers[name], size, layout)
    return {name: PLAIN if own is None else AWQ for name, own in here.items()}


def headers(files: list[str]) -> dict[str, Header]:
    """Returns the shape and safetensors dtype of every tensor by name; no tensor is read.

    Raises:
        ValueError: a file that is not safetensors.
    """
    found: dict[str, Header] = {}
    for file in files:
        if Path(file).suffix != ".safetensors":
            raise ValueError(
                f"{file} is no safetensors file, and nothing else is opened; save the checkpoint as one."
            )
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                part = tensors.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype())
    return found


def _check_layer(
    name: str, found: Mapping[str, Header], sizes: tuple[int, int], size: int, layout: str
) -> None:
    """Raises ValueError if a layer's three tensors are not as its sizes ask for."""
    inputs, outputs = sizes
    if inputs % size or (outputs if layout == "gemm" else inputs) % WORD:
        raise ValueError(
            f"{name}: {inputs} inputs and {outputs} outputs do not divide into groups of {size} and words."
        )
    groups = inputs // size
    wanted: dict[str, tuple[int, ...]] = {
        "qweight": (inputs, outputs // WORD), "qzeros": (groups, outputs // WORD), "scales": (groups, outputs)
    }  # fmt: skip
    if layout == "gemv":
        width = max(-(-groups // WORD), found.get(f"{name}.qzeros", ((0, 0), ""))[0][-1])
        wanted = {
            "qweight": (outputs, inputs // WORD),
            "qzeros": (outputs, width),
            "scales": (outputs, WORD * width),
        }
    for part in PARTS:
        shape, dtype = found.get(f"{name}.{part}", (None, ""))
        if shape is None:
            raise ValueError(f"the AWQ checkpoint has no {name}.{part}; restore its files.")
        kind = "I32" if part != "scales" else "F16"
        if shape != wanted[part] or dtype != kind:
            raise ValueError(
                f"{name}.{part} is {dtype} {shape}, expected {kind} {wanted[part]} ({layout}, groups of {size}); restore the "
                "checkpoint's files and config.json together."
            )


def unpack_words(words: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Returns (rows, 8 * columns) uint8 numbers of (rows, columns) int32 words of eight each.

    Args:
        words: int32; the number in bits 4i .. 4i + 3 is column `order[i]` of the word's eight.
        order: a permutation of 0 .. 7.
    """
    numbers = torch.empty(*words.shape, WORD, dtype=torch.uint8, device=words.device)
    for place, column in enumerate(order):
        numbers[..., column] = (words >> (4 * place)) & 15
    return numbers.flatten(-2)


def unpacked(parts: Mapping[str, torch.Tensor], size: int, layout: str) -> dict[str, torch.Tensor]:
    """Returns the stored tensors of our format with zero points that stand for the same weight, bit for bit.

    Args:
        parts: `qweight`, `qzeros` and `scales` of one layer, in the shapes that the module's docstring gives.
        size: inputs of a group.
        layout: one of :data:`ORDERS`.

    Raises:
        ValueError: a scale that is not finite.
    """
    if not torch.isfinite(parts["scales"]).all():
        raise ValueError("the scales hold NaN or infinite numbers; restore the checkpoint.")
    numbers, zeros = (unpack_words(parts[name], ORDERS[layout]) for name in ("qweight", "qzeros"))
    scales = parts["scales"]
    if layout == "gemm":
        numbers, zeros, scales = numbers.t(), zeros.t(), scales.t()
    inner = numbers.shape[1]
    filling, groups = runs(inner) * RUN - inner, inner // size
    scales, zeros = (
        torch.nn.functional.pad(part[:, :groups], (0, filling // size)) for part in (scales, zeros)
    )
    numbers = torch.nn.functional.pad(numbers, (0, filling))
    return {
        "weight": pack(numbers),
        "weight_scale": scales.contiguous(),
        "weight_zero": zeros.contiguous(),
    }
