"""The parameters that streams add to a decoder: start vectors, gated LoRA, transition bias, pruning head.

All of them live in one module, so that a checkpoint's stream weights are exactly the names that start with `streams.`, and the
main weights keep upstream's names.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D

from .configuration_spec_stream import StreamConfig


class GatedLora(nn.Module):
    """Low-rank update of one linear layer, added to stream rows alone.

    The linear layer itself stays untouched: a forward hook adds `up(down(x))` to the last rows of its output. With no stream rows
    in the input the output is the base model's, bit for bit. (Gated LoRA: "Your LLM Knows the Future", arXiv 2507.11851.)
    """

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the update for (batch, stream rows, in_features)."""
        return self.up(self.down(rows))


class Streams(nn.Module):
    """Everything that is trained to make a decoder speculate.

    Attributes:
        rows: number of stream rows at the end of the tensor now passing through the top layers; set by the layer walk.
    """

    def __init__(self, config: StreamConfig, hidden: int, num_layers: int):
        super().__init__()
        self.config = config
        self.rows = 0
        self.embedding = nn.Embedding(config.streams, hidden)
        self.lora = nn.ModuleDict()
        if config.transition_rank:
            self.transition_in = nn.Linear(hidden, config.transition_rank, bias=False)
            self.transition_out = nn.Linear(hidden, config.transition_rank, bias=False)
        if config.pruning_rank:
            self.pruning_down = nn.Linear(hidden, config.pruning_rank, bias=False)
            self.pruning_up = nn.Linear(config.pruning_rank, hidden, bias=False)
        self.first_layer = num_layers - config.stream_layers

    def attach_lora(self, layers: nn.ModuleList, linear_names: tuple[str, ...]) -> None:
        """Adds a gated update to each named linear of each stream layer."""
        if not self.config.lora_rank:
            return
        for index in range(self.first_layer, len(layers)):
            for name in linear_names:
                linear = layers[index].get_submodule(name)
                lora = GatedLora(*_sizes(linear), self.config.lora_rank)
                self.lora[_lora_key(index, name)] = lora
                linear.register_forward_hook(partial(self._add_update, lora))

    def lora_of(self, index: int, name: str) -> nn.Module | None:
        """Returns the update of the linear `name` of layer `index`, or `None`."""
        key = _lora_key(index, name)
        return self.lora[key] if key in self.lora else None  # noqa: SIM401 - a ModuleDict has no get

    def _add_update(
        self, lora: GatedLora, module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor
    ) -> torch.Tensor | None:
        if not self.rows:
            return None
        main = output.shape[1] - self.rows
        update = lora(args[0][:, main:])
        return torch.cat([output[:, :main], output[:, main:] + update], dim=1)

    def start(self, nodes: torch.Tensor, streams: int) -> torch.Tensor:
        """Returns the first hidden states of the stream rows: the node's own plus the stream's embedding (eq. 3, f = identity).

        Args:
            nodes: (batch, nodes, hidden) hidden states below the stream layers.
            streams: how many streams to start, at most the configured number.

        Returns:
            (batch, nodes * streams, hidden), the streams of one node beside each other.
        """
        offsets = self.embedding.weight[:streams]
        return (nodes[:, :, None] + offsets).flatten(1, 2)

    def pruning_state(self, nodes: torch.Tensor) -> torch.Tensor:
        """Returns (batch, nodes, hidden) states to read early next-token scores from, before the final norm and the LM head."""
        return nodes + self.pruning_up(F.silu(self.pruning_down(nodes)))


def _sizes(linear: Any) -> tuple[int, int]:
    """Returns inputs and outputs of a linear map: an `nn.Linear`, what quantisation made of it, or GPT-2's `Conv1D`."""
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    return linear.in_features, linear.out_features


def _lora_key(index: int, name: str) -> str:
    return f"{index}_{name.replace('.', '_')}"


def init_streams(module: nn.Module, std: float) -> None:
    """Initialises one module of the streams in place; updates start at zero, so that training starts at the base model."""
    if isinstance(module, GatedLora):
        init.normal_(module.down.weight, std=module.down.in_features**-0.5)
        init.zeros_(module.up.weight)
    elif isinstance(module, Streams):
        init.normal_(module.embedding.weight, std=std)
        if module.config.transition_rank:
            init.normal_(module.transition_in.weight, std=module.transition_in.in_features**-0.5)
            init.zeros_(module.transition_out.weight)
        if module.config.pruning_rank:
            init.normal_(module.pruning_down.weight, std=module.pruning_down.in_features**-0.5)
            init.zeros_(module.pruning_up.weight)
