"""What a recipe's `weights` slot asks of a checkpoint, and whether the checkpoint can give it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from huggingface.transformers.quantizers.configuration import METHOD, PackedWeightsConfig

PLAIN = "plain"


def packed_config(weights: str | None) -> PackedWeightsConfig | None:
    """Returns upstream's `quantization_config` of a recipe's `weights`, `None` for weights as they are.

    Raises:
        ValueError: a name that this version does not know.
    """
    if weights in (None, PLAIN):
        return None
    bits, _, scheme = str(weights).partition("-")
    if bits == "int8" and not scheme:
        return PackedWeightsConfig(8)
    if bits == "int4" and scheme == "naive":
        return PackedWeightsConfig(4)
    if bits == "int4" and scheme.startswith("group") and scheme[5:].isdigit():
        return PackedWeightsConfig(4, int(scheme[5:]))
    raise ValueError(f"a recipe's weights are '{weights}', which this version does not know.")


def check_unquantized(config: PreTrainedConfig, weights: str | None, checkpoint: str) -> None:
    """Raises ValueError if a checkpoint is quantised already and the recipe would do it again, or in another way."""
    saved: Any = getattr(config, "quantization_config", None)
    wanted = packed_config(weights)
    if saved is None or wanted is None:
        return
    fields = saved if isinstance(saved, dict) else saved.to_dict()
    method = fields.get("quant_method")
    same = method == METHOD and all(
        fields.get(name) == getattr(wanted, name) for name in ("bits", "group_size", "zero_point")
    )
    if not same:
        how = (
            f"{fields.get('bits')} bits, group size {fields.get('group_size')}"
            if method == METHOD
            else method
        )
        raise ValueError(
            f"the weights in {checkpoint} are quantised already ({how}); use the checkpoint they came from for {weights}, or "
            "leave the technique out."
        )
