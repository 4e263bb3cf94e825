"""What a recipe's `weights` slot asks of a checkpoint, and whether the checkpoint can give it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from huggingface.transformers.quantizers.awq_checkpoint import translated
from huggingface.transformers.quantizers.configuration import METHOD, PackedWeightsConfig
from models.awq import METHOD as AWQ
from models.awq import unreadable
from models.int4 import PLAN
from models.lm_head import split_head
from models.loading.calibrated import is_calibrated
from models.loading.checkpoint import main_weights, read_config
from models.precision_plan import FORMAT_FIELDS, PLAIN, normal_format, normal_plan

PEERS = ("bnb-int8", "bnb-nf4", "torchao-int4")
"""Weights that upstream quantises with other packages."""


def packed_config(weights: str | None) -> PackedWeightsConfig | None:
    """Returns upstream's `quantization_config` of a recipe's `weights`, `None` for weights as they are.

    Raises:
        ValueError: a name that this version does not know.
    """
    if weights in (None, PLAIN) or is_calibrated(weights):  # the latter are packed once they are read
        return None
    named, head = split_head(str(weights))
    if named.startswith(PLAN):
        return plan_config(json.loads(named.removeprefix(PLAN)), head)
    bits, _, scheme = named.partition("-")
    if bits == "int8" and not scheme:
        return PackedWeightsConfig(8, lm_head=head)
    if bits == "int4" and scheme == "naive":
        return PackedWeightsConfig(4, lm_head=head)
    if bits == "int4" and scheme.startswith("group") and scheme[5:].isdigit():
        return PackedWeightsConfig(4, int(scheme[5:]), lm_head=head)
    raise ValueError(f"a recipe's weights are '{weights}', which this version does not know.")


def plan_config(plan: Mapping[str, Any], lm_head: str | None = None) -> PackedWeightsConfig:
    """Returns upstream's `quantization_config` of a precision plan and the head's format. Raises ValueError if it is none."""
    meant = normal_plan(plan)
    return PackedWeightsConfig(**meant["default"], modules=meant["modules"], lm_head=lm_head)


def loading_options(weights: str | None, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Returns what `from_pretrained` is told of a recipe's weights; nothing where they stay as they are.

    What is quantised while it is read goes at once to the device it will run on, which packs it in no time.
    """
    config = _peer_config(str(weights), dtype) if weights in PEERS else packed_config(weights)
    return {} if config is None else {"quantization_config": config, "device_map": {"": device}}


def _peer_config(weights: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if weights == "bnb-int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if weights == "bnb-nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    # Not among what the type checker has installed.
    from torchao.quantization import Int4WeightOnlyConfig  # type: ignore[import-not-found]

    # Its default layout needs a further package.
    return TorchAoConfig(Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))


def stored_bytes(parameter: torch.nn.Parameter) -> int:
    """Returns a parameter's bytes with the scales that bitsandbytes keeps beside it."""
    scales = getattr(getattr(parameter, "quant_state", None), "absmax", None)
    return parameter.nbytes + (0 if scales is None else scales.nbytes)


def saved_quantization(checkpoint: str, config: PreTrainedConfig) -> dict[str, Any] | None:
    """Returns what a checkpoint, or the base model of one of streams alone, says of its weights; `None` for nothing."""
    place = main_weights(checkpoint, config)
    saved: Any = getattr(config if place == checkpoint else read_config(place), "quantization_config", None)
    return saved if saved is None or isinstance(saved, dict) else saved.to_dict()


def check_unquantized(fields: Mapping[str, Any] | None, weights: str | None, checkpoint: str) -> None:
    """Raises ValueError if a recipe would quantise what is quantised already, read it in another way, or lacks what it needs.

    Args:
        fields: what :func:`saved_quantization` says.
        weights: the recipe's slot.
        checkpoint: for messages.
    """
    method = None if fields is None else fields.get("quant_method")
    refused = unreadable(weights, method)
    if refused:
        raise ValueError(f"{checkpoint}: {refused}")
    wanted = None if weights in PEERS else packed_config(weights)
    if fields is None or weights in (None, PLAIN):
        return
    if method == AWQ:
        translated(fields, checkpoint)
        return
    same = wanted is not None and method == METHOD and _meaning(fields) == _meaning(wanted.to_dict())
    if not same:
        how = _in_words(fields) if method == METHOD else method
        raise ValueError(
            f"the weights in {checkpoint} are quantised already ({how}); use the checkpoint they came from for "
            f"{str(weights).partition(':')[0]}, or leave the technique out."
        )


def _meaning(fields: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns what a saved quantisation says of every weight."""
    own = {name: normal_format(value, name) for name, value in (fields.get("modules") or {}).items()}
    return (*(fields.get(name) for name in (*FORMAT_FIELDS, "lm_head")), own)


def _in_words(fields: Mapping[str, Any]) -> str:
    plan = ", with a precision plan" if fields.get("modules") else ""
    head = f", LM head in {fields['lm_head']}" if fields.get("lm_head") else ""
    return f"{fields.get('bits')} bits, group size {fields.get('group_size')}{plan}{head}"
