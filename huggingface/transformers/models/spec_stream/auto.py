"""Which architectures carry streams, their registration with upstream's Auto classes, and loading by directory."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from .architectures.gpt2 import StreamGPT2Config, StreamGPT2LMHeadModel
from .architectures.gpt_neo import StreamGPTNeoConfig, StreamGPTNeoForCausalLM
from .architectures.llama import StreamLlamaConfig, StreamLlamaForCausalLM
from .architectures.mistral import StreamMistralConfig, StreamMistralForCausalLM
from .architectures.qwen2 import StreamQwen2Config, StreamQwen2ForCausalLM
from .configuration_spec_stream import StreamConfig
from .modeling_spec_stream import StreamDecoder

_ARCHITECTURES: dict[str, tuple[type[PretrainedConfig], type[StreamDecoder]]] = {
    "gpt2": (StreamGPT2Config, StreamGPT2LMHeadModel),
    "gpt_neo": (StreamGPTNeoConfig, StreamGPTNeoForCausalLM),
    "llama": (StreamLlamaConfig, StreamLlamaForCausalLM),
    "mistral": (StreamMistralConfig, StreamMistralForCausalLM),
    "qwen2": (StreamQwen2Config, StreamQwen2ForCausalLM),
}
_BY_STREAM_TYPE = {config.model_type: (config, model) for config, model in _ARCHITECTURES.values()}


def register() -> None:
    """Registers the stream models with `AutoConfig` and `AutoModelForCausalLM`; a second call changes nothing."""
    for config, model in _ARCHITECTURES.values():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


def supported_architectures() -> list[str]:
    """Returns upstream's `model_type` of every architecture that can carry streams."""
    return sorted(_ARCHITECTURES)


def _pair(config: PretrainedConfig) -> tuple[type[PretrainedConfig], type[StreamDecoder]]:
    pair = _ARCHITECTURES.get(config.model_type) or _BY_STREAM_TYPE.get(config.model_type)
    if pair is None:
        raise ValueError(
            f"architecture {config.model_type!r} cannot carry streams; supported: {', '.join(supported_architectures())}. "
            "docs/adding_an_architecture.md says how to add one."
        )
    return pair


def stream_config_from(config: PretrainedConfig, **stream_fields: Any) -> PretrainedConfig:
    """Returns the configuration of `config`'s architecture with streams.

    Args:
        config: a stock configuration, or one with streams whose fields are then replaced.
        **stream_fields: fields of :class:`StreamConfig`.

    Raises:
        ValueError: the architecture is not supported, or a field is out of range.
    """
    config_class, _ = _pair(config)
    shape = StreamConfig(**stream_fields)
    values = {**config.to_dict(), **shape.as_dict()}
    values.pop("model_type", None)
    values.pop("architectures", None)
    return config_class.from_dict(values)


def stock_config(config: PretrainedConfig) -> PretrainedConfig:
    """Returns upstream's own configuration of the main model, streams dropped; a stock one is returned as it is."""
    if config.model_type in _ARCHITECTURES:
        return config
    model = _pair(config)[1]
    values = config.to_dict()
    for name in [*(field.name for field in fields(StreamConfig)), "model_type", "architectures"]:
        values.pop(name, None)
    return model.stock_config_class.from_dict(values)


def stock_class(config: PretrainedConfig) -> type:
    """Returns upstream's own class of the main model."""
    return _pair(config)[1].stock_class


def load_streaming(
    directory: str, stream_fields: dict[str, Any] | None = None, **kwargs: Any
) -> StreamDecoder:
    """Returns a model with our decode loop from any supported checkpoint.

    Args:
        directory: a checkpoint of streams, or one that stock `transformers` saved.
        stream_fields: for a stock checkpoint, the streams to add, freshly initialised; default: none, a plain decoder.
        **kwargs: for `from_pretrained`, such as `dtype` and `attn_implementation`.
    """
    config = AutoConfig.from_pretrained(directory)
    config_class, model_class = _pair(config)
    if isinstance(config, config_class) and stream_fields is None:
        return model_class.from_pretrained(directory, config=config, **kwargs)
    fresh = stream_config_from(config, **(stream_fields or {"streams": 0, "stream_layers": 0}))
    return model_class.from_pretrained(directory, config=fresh, init_streams=True, **kwargs)
