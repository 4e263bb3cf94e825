"""Streams on GPT-Neo: learned positions, alternating global and local layers."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.gpt_neo.configuration_gpt_neo import GPTNeoConfig
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoForCausalLM

from ...gpt_neo.modeling_gpt_neo import SpecGPTNeoForCausalLM
from ..configuration_spec_stream import StreamFields
from ..fusable import LayerNames
from ..modeling_spec_stream import StreamDecoder


class StreamGPTNeoConfig(StreamFields, GPTNeoConfig):
    """GPT-Neo's configuration with streams."""

    model_type = "spec_stream_gpt_neo"


class StreamGPTNeoForCausalLM(StreamDecoder, SpecGPTNeoForCausalLM):
    """GPT-Neo with streams."""

    config_class = StreamGPTNeoConfig
    stock_config_class = GPTNeoConfig
    stock_class = GPTNeoForCausalLM
    stream_linears = (
        "attn.attention.q_proj",
        "attn.attention.k_proj",
        "attn.attention.v_proj",
        "attn.attention.out_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    )
    layer_names = LayerNames(
        norm="ln_1",
        projections=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        output="attn.attention.out_proj",
        mlp_norm="ln_2",
        expand=("mlp.c_fc",),
        contract="mlp.c_proj",
    )

    def decoder_layers(self) -> nn.ModuleList:
        return self.transformer.h

    def layer_window(self, index: int) -> int | None:
        return self.config.window_size if self.config.attention_layers[index] == "local" else None

    def embed_rows(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.transformer.drop(self.transformer.wte(tokens) + self.transformer.wpe(positions))

    def position_embedding(self) -> nn.Module:
        return self.transformer.wpe

    def run_layer(self, index, hidden, mask, rotary, cache):
        return self.transformer.h[index](hidden, attention_mask=mask, layer_past=cache)[0]

    def last_norm(self) -> nn.Module:
        return self.transformer.ln_f

    def attention_scaling(self, index: int = 0) -> float:
        return 1.0

    def mlp_activation(self) -> str:
        return self.config.activation_function
