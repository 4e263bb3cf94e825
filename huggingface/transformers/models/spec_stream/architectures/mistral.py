"""Streams on Mistral: Llama's layout, and one sliding window for all layers or none."""

from __future__ import annotations

from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM

from ..configuration_spec_stream import StreamFields
from .llama import LlamaLayout


class StreamMistralConfig(StreamFields, MistralConfig):
    """Mistral's configuration with streams."""

    model_type = "spec_stream_mistral"


class StreamMistralForCausalLM(LlamaLayout, MistralForCausalLM):
    """Mistral with streams.

    Raises:
        ValueError: the configuration gives layers types of their own, which upstream's Mistral does not follow either.
    """

    config_class = StreamMistralConfig
    stock_config_class = MistralConfig
    stock_class = MistralForCausalLM

    def __init__(self, config: StreamMistralConfig):
        kind = "full_attention" if config.sliding_window is None else "sliding_attention"
        if set(getattr(config, "layer_types", None) or [kind]) != {kind}:
            raise ValueError(
                f"layer_types {config.layer_types} do not fit sliding_window {config.sliding_window}: all layers of a "
                "Mistral slide, or none; remove layer_types from config.json, or use upstream's Ministral classes."
            )
        super().__init__(config)

    def layer_window(self, index: int) -> int | None:
        return self.config.sliding_window
