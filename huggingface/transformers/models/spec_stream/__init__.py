"""Streams on a decoder: configuration, the layer walk that adds stream rows, and one short adapter a model family."""

from .auto import (
    load_streaming,
    register,
    stock_class,
    stock_config,
    stream_config_from,
    supported_architectures,
)
from .configuration_spec_stream import StreamConfig
from .modeling_spec_stream import StreamDecoder

__all__ = [
    "StreamConfig",
    "StreamDecoder",
    "load_streaming",
    "register",
    "stock_class",
    "stock_config",
    "stream_config_from",
    "supported_architectures",
]
