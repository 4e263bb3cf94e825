"""Streams on Qwen2 and Qwen2.5: Llama's layout with biases on query, key and value; some layers may have a sliding window."""

from __future__ import annotations

from typing import Any

from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM

from ..configuration_spec_stream import StreamFields
from .llama import LlamaLayout


class StreamQwen2Config(StreamFields, Qwen2Config):
    """Qwen2's configuration with streams."""

    model_type = "spec_stream_qwen2"


class StreamQwen2ForCausalLM(LlamaLayout, Qwen2ForCausalLM):
    """Qwen2 with streams.

    Raises:
        ValueError: the configuration has sliding layers and no window.
    """

    config_class = StreamQwen2Config
    stock_config_class = Qwen2Config
    stock_class = Qwen2ForCausalLM

    def __init__(self, config: StreamQwen2Config):
        if "sliding_attention" in (config.layer_types or ()) and config.sliding_window is None:
            raise ValueError(
                "layer_types has sliding layers, but there is no window; set use_sliding_window and sliding_window in "
                "config.json, or make every layer full_attention."
            )
        super().__init__(config)

    def layer_window(self, index: int) -> int | None:
        # Upstream fills the types in from `use_sliding_window` and `max_window_layers` where they are not given.
        kinds: Any = self.config.layer_types
        return self.config.sliding_window if kinds[index] == "sliding_attention" else None
