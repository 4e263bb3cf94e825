"""Batches: examples of like length together, and the positions where losses are taken.

With prompt length p and n tokens in all (0-based rows; the main row i guesses token i + 1, stream j of row i token i + 1 + j):

    row        0 .. p-2        p-1 .. n-2           n-1
    main       prompt tokens   completion tokens    nothing (after the end)
    stream j                   rows with i + 1 + j < n

so the rows that carry streams ("anchors") are p-1 .. n-3: the last prompt token first, as in decoding, and each has at least
stream 1 to learn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


class LengthGroupedSampler(torch.utils.data.Sampler[int]):
    """Yields example indices so that each `group` consecutive ones are of like length, in an order fixed by seed and epoch.

    A set with weight w is seen w times an epoch; of a fractional part a fresh draw each epoch. The order depends on nothing else,
    so a resumed run sees the same batches.

    Args:
        lengths: (examples,) tokens.
        group: examples of one step on all devices.
        seed: decides the order with the epoch.
        weights: (examples,) how often each example is seen; equal within a set.
        set_ids: (examples,) which set an example is of.
    """

    CHUNK_GROUPS = 64

    def __init__(self, lengths: Ints, group: int, seed: int, weights: npt.NDArray[np.float64], set_ids: Ints):
        self.lengths, self.group, self.seed = lengths, group, seed
        self.epoch = 0
        members = [np.flatnonzero(set_ids == one) for one in np.unique(set_ids)]
        self._parts = [(part, round(float(weights[part[0]]) * len(part))) for part in members]

    def __len__(self) -> int:
        return sum(max(count, 1) for _, count in self._parts)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        drawn = np.concatenate([self._draw(part, max(count, 1), random) for part, count in self._parts])
        random.shuffle(drawn)
        chunk = self.group * self.CHUNK_GROUPS
        ordered = [part[np.argsort(-self.lengths[part], kind="stable")] for part in split(drawn, chunk)]
        groups = [group for part in ordered for group in split(part, self.group)]
        full = [group for group in groups if len(group) == self.group]
        rest = [group for group in groups if len(group) < self.group]
        for place in self._order(full, random):
            yield from full[place].tolist()
        for group in rest:
            yield from group.tolist()

    def _order(self, groups: list[Ints], random: np.random.Generator) -> list[int]:
        """Returns the groups in random order, but the longest first: memory that does not suffice shows at once."""
        order: list[int] = random.permutation(len(groups)).tolist()
        if order:
            longest = max(order, key=lambda place: int(self.lengths[groups[place]].max()))
            order.remove(longest)
            order.insert(0, longest)
        return order

    @staticmethod
    def _draw(part: Ints, count: int, random: np.random.Generator) -> Ints:
        repeats, rest = divmod(count, len(part))
        return np.concatenate([np.tile(part, repeats), random.choice(part, rest, replace=False)])


def split(array: Ints, size: int) -> list[Ints]:
    """Returns consecutive pieces of at most `size` entries."""
    return [array[start : start + size] for start in range(0, len(array), size)]
