"""Streams on Llama: rotary positions, grouped key/value heads, RMSNorm. Families of the same layout start from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from ..configuration_spec_stream import StreamFields
from ..fusable import LayerNames
from ..modeling_spec_stream import StreamDecoder


class LlamaLayout(StreamDecoder):
    """Where the parts of a decoder are whose modules are named and called as Llama's."""

    model: Any
    stream_linears = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    layer_names = LayerNames(
        norm="input_layernorm",
        projections=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output="self_attn.o_proj",
        mlp_norm="post_attention_layernorm",
        expand=("mlp.gate_proj", "mlp.up_proj"),
        contract="mlp.down_proj",
    )

    def decoder_layers(self) -> nn.ModuleList:
        return self.model.layers

    def embed_rows(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(tokens)

    def rotary(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.rotary_emb(hidden, positions)

    def run_layer(self, index, hidden, mask, rotary, cache):
        return self.model.layers[index](
            hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=cache
        )

    def last_norm(self) -> nn.Module:
        return self.model.norm

    def mlp_activation(self) -> str:
        return self.config.hidden_act


class StreamLlamaConfig(StreamFields, LlamaConfig):
    """Llama's configuration with streams."""

    model_type = "spec_stream_llama"


class StreamLlamaForCausalLM(LlamaLayout, LlamaForCausalLM):
    """Llama with streams."""

    config_class = StreamLlamaConfig
    stock_config_class = LlamaConfig
    stock_class = LlamaForCausalLM
