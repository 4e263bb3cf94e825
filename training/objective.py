"""The loss of one batch: next tokens on the main rows, later tokens on the streams.

("Speculative Streaming", arXiv 2402.11131, eq. 5.) Each part is a mean over its own tokens, so a batch of short answers weighs as
much as one of long ones, and the weights keep their meaning at every batch size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from training.batches import IGNORE


@dataclass(frozen=True)
class LossWeights:
    """Weight of each part of the loss: completions, prompts, each stream, and the pruning head's early guess."""

    main: float
    prompt: float
    streams: tuple[float, ...]
    pruning: float = 1.0


class StreamObjective(nn.Module):
    """A streaming model with its loss as `forward`, which is what distributed training wraps.

    Args:
        model: the streaming model.
        weights: weight of each part; a main or prompt weight of 0 leaves that part uncomputed.
    """

    accepts_loss_kwargs = False
    stream_weights: torch.Tensor

    def __init__(self, model: Any, weights: LossWeights):
        super().__init__()
        self.model = model
        self.weights = weights
        # A buffer: a tensor made from numbers in every step would make the host wait for the device.
        self.register_buffer("stream_weights", torch.tensor(weights.streams), persistent=False)
        self.prunes = model.config.pruning_rank > 0
        self._next_token_loss, self._stream_losses = next_token_loss, stream_losses

    def compile_parts(self) -> None:
        """Compiles what a step spends its time in: each decoder layer, and the losses, whose logits are the largest tensors."""
        for layer in self.model.decoder_layers():
            layer.compile(dynamic=True)
        self._next_token_loss = torch.compile(next_token_loss, dynamic=True)
        self._stream_losses = torch.compile(stream_losses, dynamic=True)

    def forget_compiled(self) -> None:
        """Lets the layers run as written again; decoding has shapes of its own."""
        for layer in self.model.decoder_layers():
            layer._compiled_call_impl = None

    @property
    def metric_names(self) -> list[str]:
        """What the entries of `metrics` are."""
        numbers = range(1, len(self.weights.streams) + 1)
        names = ["main_loss", "main_accuracy", "prompt_loss", "pruning_loss"]
        return names + [f"stream_{j}_loss" for j in numbers] + [f"stream_{j}_accuracy" for j in numbers]

    def forward(
        self,
        input_ids: torch.Tensor,
        stream_parents: torch.Tensor,
        anchor_slots: torch.Tensor,
        stream_labels: torch.Tensor,
        stream_parent_tokens: torch.Tensor,
        completion_rows: torch.Tensor,
        completion_labels: torch.Tensor,
        prompt_rows: torch.Tensor | None = None,
        prompt_labels: torch.Tensor | None = None,
        **others: torch.Tensor,  # noqa: ARG002 - what only held-out checks need
    ) -> dict[str, torch.Tensor]:
        """Returns the scalar `loss` and the detached vector `metrics`; :class:`training.batches.Collator` has the arguments."""
        with self._states_below() as below:
            main, streams = self.model.stream_forward(input_ids, stream_parents)
        rows = main.flatten(0, 1)
        zero = streams.sum() * 0.0
        parts, accuracy, prompt, pruning = zero, zero.detach(), zero.detach(), zero.detach()
        completion = zero.detach()
        if self.weights.main:
            completion, accuracy = self._next_token(rows, completion_rows, completion_labels)
            parts = parts + self.weights.main * completion
        if self.weights.prompt and prompt_rows is not None and prompt_labels is not None and len(prompt_rows):
            prompt, _ = self._next_token(rows, prompt_rows, prompt_labels)
            parts = parts + self.weights.prompt * prompt
        if below:
            early = self.model.final_norm(self.model.streams.pruning_state(below[0].detach())).flatten(0, 1)
            pruning, _ = self._next_token(early, completion_rows, completion_labels)
            parts = parts + self.weights.pruning * pruning
        kept = streams.flatten(0, 1).index_select(0, anchor_slots)
        losses, accuracies = self._stream_losses(
            self.model.stream_logits(kept, stream_parent_tokens), stream_labels
        )
        loss = parts + (losses * self.stream_weights).sum()
        metrics = torch.cat([torch.stack([completion, accuracy, prompt, pruning]), losses, accuracies])
        return {"loss": loss, "metrics": metrics.detach()}

    def _next_token(self, states: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor) -> tuple[Any, Any]:
        """Returns mean loss and accuracy of the head at some rows of (all rows, hidden) states."""
        return self._next_token_loss(self.model.get_output_embeddings()(states.index_select(0, rows)), labels)

    @contextmanager
    def _states_below(self) -> Iterator[list[torch.Tensor]]:
        """Collects the (batch, seq, hidden) states below the stream layers while the block runs, if a pruning head needs them."""
        found: list[torch.Tensor] = []
        first = self.model.first_stream_layer
        if not self.prunes or first == 0:
            yield found
            return

        def collect(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001 - torch's signature
            found.append(output[0] if isinstance(output, tuple) else output)

        handle = self.model.decoder_layers()[first - 1].register_forward_hook(collect)
        try:
            yield found
        finally:
            handle.remove()


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean loss, in at least float32, and rank-1 accuracy of (rows, vocab) logits against (rows,) int64 labels."""
    right = (logits.detach().argmax(-1) == labels).float().mean()
    return F.cross_entropy(logits.float(), labels), right


def stream_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns each stream's mean loss and rank-1 accuracy.

    Args:
        logits: (anchors, streams, vocab).
        labels: (anchors, streams) int64, IGNORE where the text has ended.

    Returns:
        Two (streams,) float32 tensors; 0 where a stream has no label.
    """
    flat = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    valid = labels != IGNORE
    count = valid.sum(0).clamp(min=1)
    right = (logits.detach().argmax(-1) == labels) & valid
    return flat.view_as(labels).sum(0) / count, right.sum(0) / count
