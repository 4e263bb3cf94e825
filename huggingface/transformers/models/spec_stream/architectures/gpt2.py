"""Streams on GPT-2: learned positions, and linear maps kept as (in, out), one of them for query, key and value together."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

from ..configuration_spec_stream import StreamFields
from ..fusable import LayerNames
from ..modeling_spec_stream import StreamDecoder


class StreamGPT2Config(StreamFields, GPT2Config):
    """GPT-2's configuration with streams."""

    model_type = "spec_stream_gpt2"


class StreamGPT2LMHeadModel(StreamDecoder, GPT2LMHeadModel):
    """GPT-2 with streams.

    Raises:
        ValueError: the configuration asks for cross-attention.
    """

    config_class = StreamGPT2Config
    stock_config_class = GPT2Config
    stock_class = GPT2LMHeadModel
    stream_linears = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    layer_names = LayerNames(
        norm="ln_1",
        projections=("attn.c_attn",),
        output="attn.c_proj",
        mlp_norm="ln_2",
        expand=("mlp.c_fc",),
        contract="mlp.c_proj",
    )

    def __init__(self, config: StreamGPT2Config):
        if config.add_cross_attention:
            raise ValueError(
                "add_cross_attention makes GPT-2 the decoder of another model's states, which no draft knows; set it to "
                "false in config.json."
            )
        super().__init__(config)

    def decoder_layers(self) -> nn.ModuleList:
        return self.transformer.h

    def embed_rows(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.transformer.drop(self.transformer.wte(tokens) + self.transformer.wpe(positions))

    def position_embedding(self) -> nn.Module:
        return self.transformer.wpe

    def run_layer(self, index, hidden, mask, rotary, cache):
        return self.transformer.h[index](hidden, attention_mask=mask, past_key_values=cache)

    def last_norm(self) -> nn.Module:
        return self.transformer.ln_f

    def attention_scaling(self, index: int = 0) -> float:
        scaling = self.head_size() ** -0.5 if self.config.scale_attn_weights else 1.0
        return scaling / (index + 1) if self.config.scale_attn_by_inverse_layer_idx else scaling

    def mlp_activation(self) -> str:
        return self.config.activation_function
