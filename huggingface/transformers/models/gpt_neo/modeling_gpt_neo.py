"""GPT-Neo whose attention goes through upstream's attention interface, with local windows by position.

Replaces `transformers.models.gpt_neo.modeling_gpt_neo.{GPTNeoSelfAttention, GPTNeoAttention, GPTNeoBlock, GPTNeoModel}`,
https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/gpt_neo/modeling_gpt_neo.py.

Differences:
- Attention calls `ALL_ATTENTION_FUNCTIONS`, with `scaling=1.0` (GPT-Neo does not scale) and `sliding_window` in local layers,
  so `sdpa` and other registered functions work. Upstream knows `eager` and a FlashAttention without the window.
- The causal mask and the window come from the mask argument, not from a (positions x positions) buffer a layer, which goes by
  slots and is wrong for trees and for a static cache.
- Scores are computed in at least float32, not in exactly float32.
- A mask argument may be a dictionary, kind of layer to mask.
Parameter names are upstream's: its checkpoints load unchanged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neo import modeling_gpt_neo as upstream
from transformers.models.gpt_neo.configuration_gpt_neo import GPTNeoConfig

from ...integrations import flash_attention
from ...integrations.packed_linear import project_together
from ...masking_utils import attention_mask_from, visible_between


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (batch, queries, heads, head_dim) attention output and the weights; scores in at least float32.

    Args:
        module: the attention module, for its training flag.
        query: (batch, heads, queries, head_dim).
        key: (batch, heads, keys, head_dim); `value` likewise.
        attention_mask: additive, (batch or 1, 1, queries, keys), or `None` for no mask.
        scaling: factor on the scores.
        dropout: probability on the weights while training.
    """
    accumulate = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(accumulate) @ key.to(accumulate).transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class SpecGPTNeoSelfAttention(nn.Module):
    """Self-attention of one layer; `sliding_window` is the window of a local layer, else `None`."""

    def __init__(self, config: GPTNeoConfig, attention_type: str, layer_id: int):
        super().__init__()
        if config.hidden_size % config.num_heads:
            raise ValueError(
                f"hidden_size {config.hidden_size} is not divisible by num_heads {config.num_heads}; "
                "change one of them in config.json."
            )
        self.config = config
        self.layer_id = self.layer_idx = layer_id
        self.num_heads = config.num_heads
        self.head_dim = config.hidden_size // config.num_heads
        self.sliding_window = config.window_size if attention_type == "local" else None
        self.is_causal = True
        self.resid_dropout = nn.Dropout(float(config.resid_dropout))
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=True)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layer_past: Cache | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns (batch, rows, hidden) and the attention weights where the function gives them."""
        shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        projections = project_together((self.q_proj, self.k_proj, self.v_proj), hidden_states)
        query, key, value = (projected.view(shape).transpose(1, 2) for projected in projections)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_id)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=float(self.config.attention_dropout) if self.training else 0.0,
            scaling=1.0,
            sliding_window=self.sliding_window,
        )
        output = self.out_proj(output.reshape(hidden_states.shape))
        return self.resid_dropout(output), weights


class SpecGPTNeoAttention(upstream.GPTNeoAttention):
    """Upstream's holder of one attention module, building ours whatever the implementation is called."""

    def __init__(self, config: GPTNeoConfig, layer_id: int = 0):
        nn.Module.__init__(self)
        self.layer_id = layer_id
        self.attention_layers = config.attention_layers
        self.attention_type = config.attention_layers[layer_id]
        if self.attention_type not in ("global", "local"):
            raise ValueError(
                f"attention layer {layer_id} is of type {self.attention_type!r}; GPT-Neo knows 'global' and 'local': "
                "correct attention_types in config.json."
            )
        self.attention = SpecGPTNeoSelfAttention(config, self.attention_type, layer_id)


class SpecGPTNeoBlock(upstream.GPTNeoBlock):
    """One decoder layer; the forward pass is upstream's."""

    def __init__(self, config: GPTNeoConfig, layer_id: int):
        super(upstream.GPTNeoBlock, self).__init__()
        inner = config.intermediate_size if config.intermediate_size is not None else 4 * config.hidden_size
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = SpecGPTNeoAttention(config, layer_id)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = upstream.GPTNeoMLP(inner, config)


class SpecGPTNeoPreTrainedModel(upstream.GPTNeoPreTrainedModel):
    """Upstream's base class with what the attention interface allows."""

    _no_split_modules = ["SpecGPTNeoBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class SpecGPTNeoModel(SpecGPTNeoPreTrainedModel):
    """The decoder without its language-model head."""

    def __init__(self, config: GPTNeoConfig):
        super().__init__(config)
        self.embed_dim = config.hidden_size
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = nn.Dropout(float(config.embed_dropout))
        self.h = nn.ModuleList([SpecGPTNeoBlock(config, layer_id=i) for i in range(config.num_layers)])
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        """Returns the hidden states after the final norm.

        Args:
            input_ids: (batch, rows) int64, or `inputs_embeds` (batch, rows, hidden).
            past_key_values: cache that holds the rows before these.
            attention_mask: (batch, keys) padding mask, a full 4-D mask, or `{"global": mask, "local": mask}` for trees.
            position_ids: (batch or 1, rows) int64; default: slots.
            use_cache: make a cache if none is given; default from the config.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        embeds = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        slots = torch.arange(past, past + embeds.shape[1], device=embeds.device)[None]
        hidden = self.drop(embeds + self.wpe(slots if position_ids is None else position_ids))
        masks = self._masks(attention_mask, slots, past_key_values, embeds.dtype)
        for block, kind in zip(self.h, self.config.attention_layers, strict=True):
            hidden, _ = block(hidden, layer_past=past_key_values, attention_mask=masks[kind])
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(hidden), past_key_values=past_key_values)

    def _masks(
        self,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        slots: torch.Tensor,
        cache: Cache | None,
        dtype: torch.dtype,
    ) -> dict[str, torch.Tensor | None]:
        """Returns one mask a kind of layer; a padding mask goes to flash functions as it is."""
        if isinstance(attention_mask, dict):
            return dict(attention_mask)
        if attention_mask is not None and attention_mask.dim() == 4:
            return {"global": attention_mask, "local": attention_mask}
        if self.config._attn_implementation == flash_attention.NAME:
            return {"global": attention_mask, "local": attention_mask}
        keys = cache.get_mask_sizes(slots.shape[1], 0)[0] if cache is not None else slots.shape[1]
        key_slots = torch.arange(keys, device=slots.device)[None]
        allowed = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=slots.device)
        if attention_mask is not None:
            padded = nn.functional.pad(attention_mask.bool(), (0, keys - attention_mask.shape[1]), value=True)
            # A padding row sees itself: a row that sees nothing has no defined softmax.
            allowed = padded[:, None, None, :] | (slots[:, None, :, None] == key_slots[:, None, None, :])
        return {
            kind: attention_mask_from(visible_between(slots, key_slots, window) & allowed, dtype)
            for kind, window in (("global", None), ("local", self.config.window_size))
        }


class SpecGPTNeoForCausalLM(SpecGPTNeoPreTrainedModel, upstream.GPTNeoForCausalLM):
    """GPT-Neo with its language-model head; forward and generation are upstream's."""

    def __init__(self, config: GPTNeoConfig):
        super(upstream.GPTNeoForCausalLM, self).__init__(config)
        self.transformer = SpecGPTNeoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
