"""What a checkpoint, or a caller of `from_pretrained`, says about weights of 8 or 4 bits."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from .packing import WeightFormat

METHOD = "packed_weights"
PLAIN = "plain"
"""The format of a module that stays as it is."""
AWQ_LAYOUTS = ("gemm", "gemv")
INT8_HEAD = "int8"
LEFT_OUT = ("checkpoint_layout", "lm_head")
"""Fields that `config.json` has only where they say something."""


class PackedWeightsConfig(QuantizationConfigMixin):
    """Upstream's `quantization_config` for our packed weights.

    Args:
        bits: 8 or 4.
        group_size: inputs that share a scale, 32, 64 or 128; `None` for one scale an output.
        zero_point: whether groups have a zero point.
        modules_to_not_convert: parts of module names that stay as they are, besides the streams.
        modules: full module name -> a format of its own, `{"bits": 8}` for one, or "plain"; all others have the format above.
        lm_head: `int8` for the LM head in 8 bits, a copy where it is tied to the embeddings, which stay; `None`: as it is.
        checkpoint_layout: layout of AWQ's in which the checkpoint holds the weights, `None` for ours; gone once they are read.

    Raises:
        ValueError: a format or layout that is not known; one of `modules` is named.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int | None = None,
        zero_point: bool = False,
        modules_to_not_convert: list[str] | None = None,
        modules: dict[str, dict[str, Any] | str] | None = None,
        checkpoint_layout: str | None = None,
        lm_head: str | None = None,
        **kwargs: Any,
    ):
        kwargs.pop("quant_method", None)
        unknown = sorted(name for name in kwargs if not name.startswith("_"))
        if unknown:
            raise ValueError(f"quantization_config has unknown fields {unknown}; it is from another version.")
        self.quant_method: Any = METHOD
        self.bits, self.group_size, self.zero_point = bits, group_size, zero_point
        self.modules_to_not_convert = modules_to_not_convert
        self.modules = modules
        self.checkpoint_layout, self.lm_head = checkpoint_layout, lm_head
        if lm_head not in (None, INT8_HEAD):
            raise ValueError(f"lm_head is {lm_head!r}, expected '{INT8_HEAD}' or None.")
        if checkpoint_layout not in (None, *AWQ_LAYOUTS):
            raise ValueError(
                f"layout {checkpoint_layout!r} of a checkpoint is none of {', '.join(AWQ_LAYOUTS)}."
            )
        self.format  # noqa: B018 - says what is wrong with it
        for name in modules or {}:
            self.format_of(name)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as `config.json` holds them."""
        return {name: value for name, value in super().to_dict().items() if value or name not in LEFT_OUT}

    @property
    def format(self) -> WeightFormat:
        """The format of the converted weights."""
        return WeightFormat(self.bits, self.group_size, self.zero_point)

    @property
    def label(self) -> str:
        """A short name of what is stored, such as `int4-group128-head8`; `-mixed` where modules have formats of their own."""
        group = f"-group{self.group_size}" if self.group_size else ""
        marks = {"-zero": self.zero_point, "-mixed": self.modules, "-head8": self.lm_head}
        return f"int{self.bits}{group}" + "".join(mark for mark, holds in marks.items() if holds)

    def format_of(self, name: str) -> WeightFormat | None:
        """Returns the format of a module, by its full name; `None` where it stays as it is.

        Raises:
            ValueError: its own format is not known.
        """
        own = (self.modules or {}).get(name)
        if own is None:
            return self.format
        if own == PLAIN:
            return None
        try:
            return WeightFormat(**own)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise ValueError(f"the format {own!r} of module {name} is not known: {error}") from None
