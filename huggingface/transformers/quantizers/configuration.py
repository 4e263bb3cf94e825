"""What a checkpoint, or a caller of `from_pretrained`, says about weights of 8 or 4 bits."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .packing import WeightFormat

METHOD = "packed_weights"


class PackedWeightsConfig(QuantizationConfigMixin):
    """Upstream's `quantization_config` for our packed weights.

    Args:
        bits: 8 or 4.
        group_size: inputs that share a scale, 32, 64 or 128; `None` for one scale an output.
        zero_point: whether groups have a zero point.
        modules_to_not_convert: parts of module names that stay as they are, besides the LM head and the streams.

    Raises:
        ValueError: a format that is not known.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int | None = None,
        zero_point: bool = False,
        modules_to_not_convert: list[str] | None = None,
        **kwargs: Any,
    ):
        kwargs.pop("quant_method", None)
        unknown = sorted(name for name in kwargs if not name.startswith("_"))
        if unknown:
            raise ValueError(f"quantization_config has unknown fields {unknown}; it is from another version.")
        self.quant_method: Any = METHOD
        self.bits, self.group_size, self.zero_point = bits, group_size, zero_point
        self.modules_to_not_convert = modules_to_not_convert
        self.format  # noqa: B018 - says what is wrong with it

    @property
    def format(self) -> WeightFormat:
        """The format of the converted weights."""
        return WeightFormat(self.bits, self.group_size, self.zero_point)
