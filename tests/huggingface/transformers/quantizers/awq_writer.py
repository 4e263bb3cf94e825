"""Writes checkpoints in AWQ's format from a stock one: number by number in plain loops, with nothing of what reads them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

GEMM_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words_of(rows: list[list[int]], order: list[int]) -> torch.Tensor:
    """Packs eight consecutive numbers of each row into a signed word; number `order[i]` of them goes to bits 4i .. 4i + 3."""
    packed = []
    for row in rows:
        words = []
        for start in range(0, len(row), 8):
            word = sum(row[start + column] << (4 * place) for place, column in enumerate(order))
            words.append(word - 2**32 if word >= 2**31 else word)
        packed.append(words)
    return torch.tensor(packed, dtype=torch.int32)


def filled(rows: list[list], width: int) -> list[list]:
    return [row + [0] * (width - len(row)) for row in rows]


def rounded(weight: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns numbers (out, in), zeros and float16 scales (out, groups): a plain rounding, so that neither is constant."""
    groups = weight.float().view(len(weight), -1, size)
    lowest, highest = groups.amin(2), groups.amax(2)
    scales = ((highest - lowest) / 15).clamp(min=1e-4).half()
    zeros = (-lowest / scales.float()).round().clamp(0, 15).int()
    numbers = (groups / scales.float()[..., None]).round().int() + zeros[..., None]
    return numbers.clamp(0, 15).view(weight.shape), zeros, scales


def layer_tensors(
    weight: torch.Tensor, size: int, layout: str
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Returns the three tensors of an (out, in) weight, and the float32 weight that they stand for."""
    numbers, zeros, scales = rounded(weight, size)
    spread = [part.repeat_interleave(size, 1).float() for part in (zeros, scales)]
    dense = (numbers.float() - spread[0]) * spread[1]
    if layout == "gemm":
        tensors = {
            "qweight": words_of(numbers.t().tolist(), GEMM_ORDER),
            "qzeros": words_of(zeros.t().tolist(), GEMM_ORDER),
            "scales": scales.t().contiguous(),
        }
        return tensors, dense
    groups = zeros.shape[1]
    width = 8 * (128 // size) * -(-groups // (8 * (128 // size)))
    tensors = {
        "qweight": words_of(numbers.tolist(), list(range(8))),
        "qzeros": words_of(filled(zeros.tolist(), width), list(range(8))),
        "scales": torch.tensor(filled(scales.tolist(), width), dtype=torch.float16),
    }
    return tensors, dense


def write_awq(
    plain: Path, place: Path, size: int = 32, layout: str = "gemm", kept: tuple[str, ...] = ()
) -> Path:
    """Writes an AWQ checkpoint of a stock one, and beside it, in `dense`, one of the weights that it stands for.

    Args:
        plain: what stock transformers saved.
        place: the new directory, the tokenizer's files included.
        size: inputs of a group.
        layout: gemm or gemv.
        kept: parts of the names of layers that stay as they are.
    """
    dense_place = place / "dense"
    dense_place.mkdir(parents=True)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    head = model.get_output_embeddings()
    tensors = load_file(plain / "model.safetensors")
    dense = dict(tensors)
    for name, module in model.named_modules():
        if (
            not isinstance(module, (nn.Linear, Conv1D))
            or module is head
            or any(part in name for part in kept)
        ):
            continue
        transposed = isinstance(module, Conv1D)
        key = f"{name}.weight" if f"{name}.weight" in tensors else f"{name.partition('.')[2]}.weight"
        weight = tensors.pop(key)
        stored, read = layer_tensors(weight.t() if transposed else weight, size, layout)
        tensors |= {f"{key.removesuffix('.weight')}.{part}": one for part, one in stored.items()}
        dense[key] = (read.t() if transposed else read).contiguous()
    for file in plain.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (place / file.name).write_bytes(file.read_bytes())
            (dense_place / file.name).write_bytes(file.read_bytes())
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    save_file(dense, dense_place / "model.safetensors", metadata={"format": "pt"})
    edit_config(place, bits=4, group_size=size, zero_point=True, version=layout, quant_method="awq")
    return place


def edit_config(place: Path, **fields: object) -> None:
    """Changes what `config.json` says of the quantisation."""
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"] = config.get("quantization_config", {}) | fields
    (place / "config.json").write_text(json.dumps(config))


def edit_tensors(place: Path, change) -> None:
    """Changes the stored tensors: `change` gets them by name."""
    tensors = load_file(place / "model.safetensors")
    change(tensors)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
