"""What a recipe's `weights` slot asks of a checkpoint, and whether the checkpoint can give it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from huggingface.transformers.quantizers.configuration import METHOD, PackedWeightsConfig
from models.int4 import PLAN
from models.precision_plan import FORMAT_FIELDS, PLAIN, normal_format, normal_plan


def packed_config(weights: str | None) -> PackedWeightsConfig | None:
    """Returns upstream's `quantization_config` of a recipe's `weights`, `None` for weights as they are.

    Raises:
        ValueError: a name that this version does not know.
    """
    if weights in (None, PLAIN):
        return None
    if str(weights).startswith(PLAN):
        return plan_config(json.loads(str(weights).removeprefix(PLAN)))
    bits, _, scheme = str(weights).partition("-")
    if bits == "int8" and not scheme:
        return PackedWeightsConfig(8)
    if bits == "int4" and scheme == "naive":
        return PackedWeightsConfig(4)
    if bits == "int4" and scheme.startswith("group") and scheme[5:].isdigit():
        return PackedWeightsConfig(4, int(scheme[5:]))
    raise ValueError(f"a recipe's weights are '{weights}', which this version does not know.")


def plan_config(plan: Mapping[str, Any]) -> PackedWeightsConfig:
    """Returns upstream's `quantization_config` of a precision plan. Raises ValueError if it is none."""
    meant = normal_plan(plan)
    return PackedWeightsConfig(**meant["default"], modules=meant["modules"])


def check_unquantized(config: PreTrainedConfig, weights: str | None, checkpoint: str) -> None:
    """Raises ValueError if a checkpoint is quantised already and the recipe would do it again, or in another way."""
    saved: Any = getattr(config, "quantization_config", None)
    wanted = packed_config(weights)
    if saved is None or wanted is None:
        return
    fields = saved if isinstance(saved, dict) else saved.to_dict()
    method = fields.get("quant_method")
    same = method == METHOD and _meaning(fields) == _meaning(wanted.to_dict())
    if not same:
        how = _in_words(fields) if method == METHOD else method
        raise ValueError(
            f"the weights in {checkpoint} are quantised already ({how}); use the checkpoint they came from for "
            f"{str(weights).partition(':')[0]}, or leave the technique out."
        )


def _meaning(fields: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns what a saved quantisation says of every weight."""
    own = {name: normal_format(value, name) for name, value in (fields.get("modules") or {}).items()}
    return (*(fields.get(name) for name in FORMAT_FIELDS), own)


def _in_words(fields: Mapping[str, Any]) -> str:
    plan = ", with a precision plan" if fields.get("modules") else ""
    return f"{fields.get('bits')} bits, group size {fields.get('group_size')}{plan}"
