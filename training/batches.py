"""Batches: examples cut out of the packed set, and the positions where losses are taken.

With prompt length p and n tokens in all (0-based rows; the main row i guesses token i + 1, stream j of row i token i + 1 + j):

    row        0 .. p-2        p-1 .. n-2           n-1
    main       prompt tokens   completion tokens    nothing (after the end)
    stream j                   rows with i + 1 + j < n

so the rows that carry streams ("anchors") are p-1 .. n-3: the last prompt token first, as in decoding, and each has at least
stream 1 to learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from training.tokens import TokenSet

IGNORE = -100
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Collator:
    """Cuts a batch out of a packed set, right-padded, with flat row indices and labels for every loss.

    Attributes:
        examples: the packed set.
        streams: number of streams.
        pad_id: token that fills the right side.
        with_prompts: whether rows inside the prompt are listed too.
    """

    examples: TokenSet
    streams: int
    pad_id: int
    with_prompts: bool = True

    def __call__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Returns the batch of the examples with these indices.

        Returns:
            input_ids (batch, seq); lengths (batch,); stream_parents (batch, anchors), short rows repeat their first anchor;
            completion_rows, completion_labels, prompt_rows, prompt_labels (rows,): flat indices into batch * seq and the tokens
            guessed there; anchor_slots (anchors kept,): flat indices into batch * anchors; anchor_rows (anchors kept,): the same
            anchors in batch * seq; stream_labels, stream_parent_tokens (anchors kept, streams), IGNORE past the end. int64.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        starts = self.examples.starts[chosen]
        lengths = self.examples.starts[chosen + 1] - starts
        prompts = self.examples.prompt_lengths[chosen]
        ids = self._pad(starts, lengths)
        rows = np.arange(ids.shape[1])[None]
        in_completion = (rows >= prompts[:, None] - 1) & (rows < lengths[:, None] - 1)
        batch = {"input_ids": ids, "lengths": lengths}
        batch |= self._labelled(ids, in_completion, "completion")
        if self.with_prompts:
            batch |= self._labelled(ids, rows < prompts[:, None] - 1, "prompt")
        batch |= self._streams(ids, prompts, lengths)
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}

    def whole(self, batches: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Returns the batch of the only item, which already holds all its examples' indices."""
        (indices,) = batches
        return self(indices)

    def _pad(self, starts: Ints, lengths: Ints) -> Ints:
        places = np.arange(lengths.max())[None]
        inside = places < lengths[:, None]
        ids = np.full(inside.shape, self.pad_id, dtype=np.int64)
        ids[inside] = self.examples.tokens[(starts[:, None] + places)[inside]]
        return ids

    @staticmethod
    def _labelled(ids: Ints, wanted: npt.NDArray[np.bool_], name: str) -> dict[str, Ints]:
        rows = np.flatnonzero(wanted)
        return {f"{name}_rows": rows, f"{name}_labels": ids.reshape(-1)[rows + 1]}

    def _streams(self, ids: Ints, prompts: Ints, lengths: Ints) -> dict[str, Ints]:
        first, counts = prompts - 1, np.maximum(lengths - prompts - 1, 0)
        slots = np.arange(max(int(counts.max()), 1))[None]
        kept = slots < counts[:, None]
        parents = first[:, None] + np.where(kept, slots, 0)
        seq = ids.shape[1]
        anchor_rows = (np.arange(len(ids))[:, None] * seq + parents)[kept]
        ends = np.broadcast_to((np.arange(len(ids)) * seq + lengths)[:, None], kept.shape)[kept]
        before = anchor_rows[:, None] + np.arange(1, self.streams + 1)[None]
        valid = before + 1 < ends[:, None]
        flat = ids.reshape(-1)
        safe = np.where(valid, before, 0)
        return {
            "stream_parents": parents,
            "anchor_slots": np.flatnonzero(kept),
            "anchor_rows": anchor_rows,
            "stream_parent_tokens": np.where(valid, flat[safe], 0),
            "stream_labels": np.where(valid, flat[np.where(valid, before + 1, 0)], IGNORE),
        }
