"""The layer walk that adds stream rows to a stock decoder.

A pass sends token rows through the lower layers, then appends, for some of them (the *anchors*), one row a stream, and sends
both through the top layers. One mask decides who sees whom, so no attention class knows about streams, the weights are read once,
and token rows compute what they always did.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from ...generation.graph_runner import release_runners
from ...generation.utils import SpecGenerationMixin
from ...integrations.quantized_linear import QuantizedLinear
from ...integrations.sdpa_kernels import shape_agnostic_kernels
from ...integrations.tensor_version import place_and_version
from ...masking_utils import attention_mask_from, visible_between, visible_with_streams
from .checkpoint import StreamCheckpointMixin
from .configuration_spec_stream import StreamConfig
from .fusable import LayerNames
from .streams import Streams, init_streams

Masks = dict[int | None, torch.Tensor | None]
AT_ONCE = 16384
"""Rows of a quantised head that are read back at a time."""


class StreamDecoder(SpecGenerationMixin, StreamCheckpointMixin):
    """Mixin for a stock `...ForCausalLM`: streams, the walk, and generation that speculates.

    An architecture file puts it in front of the stock class and says where the parts are: `decoder_layers`, `embed_rows`,
    `run_layer`, `last_norm`, and where it has them `position_embedding`, `rotary` and `layer_window`.
    """

    stream_linears: tuple[str, ...] = ()
    layer_names: LayerNames | None = None
    _tables: tuple[torch.Tensor, torch.Tensor] | None = None
    _tables_source: tuple[int, ...] | None = None

    def __init__(self, config: Any):
        # The stock class that follows this mixin takes the configuration.
        super().__init__(config)  # type: ignore[call-arg]
        shape = StreamConfig.of(config)
        layers = self.decoder_layers()
        shape.check_layers(len(layers))
        self.streams = Streams(shape, config.hidden_size, len(layers)) if shape.streams else None
        if self.streams is not None:
            self.streams.attach_lora(layers, self.stream_linears)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_streams(module, self.config.initializer_range)

    def _apply(self, fn, recurse: bool = True):
        """Moves or casts weights; what was captured of the old ones is of no use any more, and would hold memory."""
        release_runners(self)
        return super()._apply(fn, recurse)

    # What an architecture file says.
    def decoder_layers(self) -> nn.ModuleList:
        """Returns the decoder's layers, bottom first."""
        raise TypeError(f"{type(self).__name__} must say where its layers are.")

    def layer_window(self, index: int) -> int | None:
        """Returns the local attention window of a layer in positions, or `None`."""
        return None

    def embed_rows(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Returns (batch, rows, hidden) input states of (batch, rows) tokens at (batch, rows) positions."""
        raise TypeError(f"{type(self).__name__} must say how it embeds tokens.")

    def position_embedding(self) -> nn.Module | None:
        """Returns the table whose rows `embed_rows` adds to the tokens', or `None` where it adds none."""
        return None

    def rotary(
        self, hidden: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns rotary cosines and sines of (batch, rows) positions, or `None` where positions are learned."""
        return None

    def run_layer(self, index, hidden, mask, rotary, cache):
        """Returns (batch, rows, hidden) after one layer; its keys and values go to `cache` if given."""
        raise TypeError(f"{type(self).__name__} must say how it runs a layer.")

    def last_norm(self) -> nn.Module:
        """Returns the normalisation in front of the language-model head."""
        raise TypeError(f"{type(self).__name__} must say which norm is its last.")

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the normalised states that the language-model head reads."""
        return self.last_norm()(hidden)

    def head_size(self) -> int:
        """Returns the features of an attention head."""
        size = getattr(self.config, "head_dim", None)
        return size or self.config.hidden_size // self.config.num_attention_heads

    def attention_scaling(self, index: int = 0) -> float:
        """Returns the factor on a layer's attention scores."""
        return self.head_size() ** -0.5

    def mlp_activation(self) -> str:
        """Returns the name of the MLP's activation, as the configuration spells it."""
        raise TypeError(f"{type(self).__name__} must say which activation its MLP has.")

    def lora_of(self, index: int, name: str) -> nn.Module | None:
        """Returns the gated update of one linear of a layer, or `None`."""
        return self.streams.lora_of(index, name) if self.streams is not None else None

    # The walk.
    @property
    def first_stream_layer(self) -> int:
        """Index of the lowest layer that carries stream rows; the number of layers where there are no streams."""
        return self.streams.first_layer if self.streams is not None else len(self.decoder_layers())

    def layer_windows(self) -> set[int | None]:
        """Returns every kind of local window among the layers; each needs a mask of its own."""
        return {self.layer_window(index) for index in range(len(self.decoder_layers()))}

    def _run_layers(
        self, indices: Iterable[int], hidden: torch.Tensor, positions, masks: Masks, cache: Cache | None
    ) -> torch.Tensor:
        rotary = self.rotary(hidden, positions)
        with shape_agnostic_kernels(hidden.device):
            for index in indices:
                hidden = self.run_layer(index, hidden, masks[self.layer_window(index)], rotary, cache)
        return hidden

    def run_below(
        self, tokens: torch.Tensor, positions: torch.Tensor, masks: Masks, cache: Cache | None = None
    ) -> torch.Tensor:
        """Returns (batch, rows, hidden) token rows below the stream layers.

        Args:
            tokens: (batch, rows) int64.
            positions: (batch or 1, rows) int64.
            masks: window to additive mask (batch or 1, 1, rows, keys), or to `None` for plain causal attention.
            cache: takes the rows' keys and values.
        """
        hidden = self.embed_rows(tokens, positions)
        return self._run_layers(range(self.first_stream_layer), hidden, positions, masks, cache)

    def run_above(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        masks: Masks,
        cache: Cache | None = None,
        anchors: torch.Tensor | None = None,
        streams: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns token rows and stream rows after the final norm: (batch, rows, hidden), (batch, anchors, streams, hidden).

        Args:
            hidden: (batch, rows, hidden) token rows below the stream layers.
            positions: (batch or 1, rows + anchors * streams) int64.
            masks: as in :meth:`run_below`, for all these rows.
            cache: takes the rows' keys and values.
            anchors: (batch, anchors) int64 indices of the rows that carry streams; `None` for all of them.
            streams: stream rows of each anchor; 0 runs token rows alone.
        """
        rows = hidden.shape[1]
        if streams:
            nodes = hidden if anchors is None else _gather_rows(hidden, anchors)
            hidden = torch.cat([hidden, self.streams.start(nodes, streams)], dim=1)
            self.streams.rows = hidden.shape[1] - rows
        layers = range(self.first_stream_layer, len(self.decoder_layers()))
        try:
            hidden = self.final_norm(self._run_layers(layers, hidden, positions, masks, cache))
        finally:
            if streams:
                self.streams.rows = 0
        if not streams:
            return hidden, None
        return hidden[:, :rows], hidden[:, rows:].unflatten(1, (-1, streams))

    def stream_forward(
        self,
        input_ids: torch.Tensor,
        anchors: torch.Tensor,
        cache: Cache | None = None,
        streams: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns main and stream states of whole sequences, as training, calibration and prefill need them.

        Sequences start at position 0. Shorter ones are padded on the right, where no valid row looks.

        Args:
            input_ids: (batch, seq) int64.
            anchors: (batch, anchors) int64 indices of the tokens that carry streams.
            cache: takes keys and values of all rows from slot 0 on; stream rows after the tokens.
            streams: stream rows of each anchor; default: all.

        Returns:
            (batch, seq, hidden) and (batch, anchors, streams, hidden), both after the final norm; `None` for no streams.
        """
        seq = input_ids.shape[1]
        available = self.streams.config.streams if self.streams is not None else 0
        streams = available if streams is None else streams
        positions = torch.arange(seq, device=input_ids.device)[None]
        dtype = self.get_input_embeddings().weight.dtype
        if torch.is_autocast_enabled(input_ids.device.type):
            dtype = torch.get_autocast_dtype(input_ids.device.type)
        windows = self.layer_windows()

        def sequence_mask(window: int | None) -> torch.Tensor | None:
            # SDPA is causal without a mask; the eager functions then let every row see every other.
            if self.config._attn_implementation == "sdpa" and (window is None or seq <= window):
                return None
            return attention_mask_from(visible_between(positions, positions, window), dtype)

        plain: Masks = {window: sequence_mask(window) for window in windows}
        hidden = self.run_below(input_ids, positions, plain, cache)
        if not streams:
            return self.run_above(hidden, positions, plain, cache)
        reach = seq + streams
        narrow = {window if window is not None and reach > window else None for window in windows}
        built = {
            window: attention_mask_from(visible_with_streams(positions, anchors, streams, window), dtype)
            for window in narrow
        }
        masks: Masks = {window: built[window] if window in built else built[None] for window in windows}
        numbers = torch.arange(1, streams + 1, device=anchors.device)
        stream_positions = (anchors[:, :, None] + numbers).flatten(1)
        all_positions = torch.cat([positions.expand(len(anchors), -1), stream_positions], dim=1)
        return self.run_above(hidden, all_positions, masks, cache, anchors, streams)

    def stream_logits(self, stream_hidden: torch.Tensor, parent_tokens: torch.Tensor) -> torch.Tensor:
        """Returns what each stream says of its token, given the token before it.

        Args:
            stream_hidden: (..., streams, hidden) after the final norm.
            parent_tokens: (..., streams) int64, the token before the one that stream guesses.

        Returns:
            (..., streams, vocab) logits.
        """
        logits = self.get_output_embeddings()(stream_hidden)
        if self.streams.config.transition_rank:
            logits = logits + self.transition_bias(parent_tokens)
        return logits

    def transition_bias(self, parent_tokens: torch.Tensor) -> torch.Tensor:
        """Returns (..., vocab) logits that every token gains from (...) int64 tokens before it: `A E[parent] . B H[token]`."""
        parents, tokens = self.transition_tables()
        return F.linear(F.embedding(parent_tokens, parents), tokens)

    def transition_tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns `A E` and `B H`, each (vocab, rank); kept between calls while no factor changes and no gradient is wanted."""
        embedding, head = self.get_input_embeddings().weight, self.get_output_embeddings()
        factors = (self.streams.transition_in, self.streams.transition_out)
        if torch.is_grad_enabled():
            return factors[0](embedding), _factor_of_head(head, factors[1], embedding.dtype)
        source = _versions(embedding, head.weight, factors[0].weight, factors[1].weight)
        if self._tables is None or self._tables_source != source:
            self._tables = factors[0](embedding), _factor_of_head(head, factors[1], embedding.dtype)
            self._tables_source = source
        return self._tables

    @torch.no_grad()
    def draft_tables(self) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """Returns the transition tables as drafting reads them, without a gradient; `None` for no transition bias."""
        return self.transition_tables() if self.streams.config.transition_rank else (None, None)

    def early_scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns (batch, rows, vocab) next-token probabilities read below the stream layers, for pruning draft nodes."""
        state = self.final_norm(self.streams.pruning_state(hidden))
        return self.get_output_embeddings()(state).float().softmax(-1)


def _factor_of_head(head: Any, factor: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Returns `factor` of each row of the head, (vocab, rank); a quantised head is read back a part at a time."""
    if not isinstance(head, QuantizedLinear):
        return factor(head.weight)
    parts = [slice(start, start + AT_ONCE) for start in range(0, head.out_features, AT_ONCE)]
    return torch.cat([factor(head.packed.some(part).dense(dtype)) for part in parts])


def _versions(*tensors: torch.Tensor) -> tuple[int, ...]:
    """Returns numbers that change when one of the tensors does."""
    return tuple(key for tensor in tensors for key in place_and_version(tensor))


def _gather_rows(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return hidden.gather(1, rows[:, :, None].expand(-1, -1, hidden.shape[-1]))
