"""Which examples make a batch: of like length, drawn by seed and epoch alone, so that a resumed run sees the same batches.

A batch costs its longest text times its number of texts, and its longest answer likewise for the stream rows. With one number of
examples for all batches, the batch of the longest texts decides the memory and the one of the shortest leaves the device idle;
:class:`RowBudgetSampler` therefore fixes the number of rows instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class WeightedDraw:
    """Draws an epoch's examples: a set with weight w is seen w times; of a fractional part a fresh draw each epoch.

    Args:
        seed: decides the order with the epoch.
        weights: (examples,) how often each example is seen; equal within a set.
        set_ids: (examples,) which set an example is of.
    """

    def __init__(self, seed: int, weights: Floats, set_ids: Ints):
        self.seed = seed
        members = [np.flatnonzero(set_ids == one) for one in np.unique(set_ids)]
        self._parts = [(part, max(round(float(weights[part[0]]) * len(part)), 1)) for part in members]

    def __len__(self) -> int:
        return sum(count for _, count in self._parts)

    def __call__(self, epoch: int) -> tuple[Ints, np.random.Generator]:
        """Returns the epoch's examples in random order, and the generator for what else is random in it."""
        random = np.random.default_rng([self.seed, epoch])
        drawn = np.concatenate([self._of(part, count, random) for part, count in self._parts])
        random.shuffle(drawn)
        return drawn, random

    @staticmethod
    def _of(part: Ints, count: int, random: np.random.Generator) -> Ints:
        repeats, rest = divmod(count, len(part))
        return np.concatenate([np.tile(part, repeats), random.choice(part, rest, replace=False)])


class LengthGroupedSampler(torch.utils.data.Sampler[int]):
    """Yields example indices so that each `group` consecutive ones are of like length.

    Args:
        draw: draws the epoch's examples.
        lengths: (examples,) tokens.
        group: examples of one step on all devices.
    """

    CHUNK_GROUPS = 64

    def __init__(self, draw: WeightedDraw, lengths: Ints, group: int):
        self.draw, self.lengths, self.group = draw, lengths, group
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.draw)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        drawn, random = self.draw(self.epoch)
        chunk = self.group * self.CHUNK_GROUPS
        ordered = [part[np.argsort(-self.lengths[part], kind="stable")] for part in split(drawn, chunk)]
        groups = [group for part in ordered for group in split(part, self.group)]
        full = [group for group in groups if len(group) == self.group]
        rest = [group for group in groups if len(group) < self.group]
        longest = np.array([self.lengths[group].max() for group in full])
        for place in longest_first(longest, random):
            yield from full[place].tolist()
        for group in rest:
            yield from group.tolist()


class RowBudgetSampler(torch.utils.data.Sampler[tuple[int, ...]]):
    """Yields batches: tuples of example indices that together cost at most so many rows.

    Every epoch has the same number of batches, which is that of epoch 0: of another epoch a few at the end are left out, or its
    first ones come again. A single example above the budget is a batch of its own.

    Args:
        draw: draws the epoch's examples.
        lengths: (examples,) tokens.
        anchors: (examples,) tokens that carry streams.
        stream_cost: rows that one anchor costs, in rows that pass through every layer.
        rows: what a batch may cost.
        devices: consecutive batches that run at the same time, so must cost about the same.
    """

    CHUNK_BATCHES = 256
    LENGTH_STEP = (
        1.1  # measured on the three public sets: 0.92 of all rows are no padding; 1.0: 0.86, 1.35: 0.88
    )

    def __init__(
        self,
        draw: WeightedDraw,
        lengths: Ints,
        anchors: Ints,
        stream_cost: float,
        rows: int,
        devices: int = 1,
    ):
        self.draw, self.lengths, self.rows, self.devices = draw, lengths, rows, devices
        self.anchors = np.maximum(anchors, 1)
        self.stream_cost = stream_cost
        self.epoch = 0
        self._batches = len(self._plan(0))

    def __len__(self) -> int:
        return self._batches

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        plan = self._plan(self.epoch)
        for place in range(self._batches):
            yield tuple(plan[place % len(plan)])

    def _plan(self, epoch: int) -> list[list[int]]:
        drawn, random = self.draw(epoch)
        mean_cost = float((self.lengths[drawn] + self.stream_cost * self.anchors[drawn]).mean())
        chunk = max(int(self.CHUNK_BATCHES * self.rows / mean_cost), 1)
        step = np.floor(np.log(self.lengths) / np.log(self.LENGTH_STEP))
        batches: list[list[int]] = []
        for part in split(drawn, chunk):
            batches += self._fill(part[np.lexsort((-self.anchors[part], -step[part]))])
        batches += batches[: -len(batches) % self.devices]
        together = [batches[i : i + self.devices] for i in range(0, len(batches), self.devices)]
        longest = np.array([max(self.lengths[batch].max() for batch in group) for group in together])
        return [batch for place in longest_first(longest, random) for batch in together[place]]

    def _fill(self, ordered: Ints) -> list[list[int]]:
        """Returns the examples, in this order, as batches that keep the budget."""
        batches: list[list[int]] = []
        batch: list[int] = []
        longest, widest = 0, 0
        for index, length, anchors in zip(
            ordered.tolist(), self.lengths[ordered].tolist(), self.anchors[ordered].tolist(), strict=True
        ):
            longest, widest = max(longest, length), max(widest, anchors)
            if batch and (len(batch) + 1) * (longest + self.stream_cost * widest) > self.rows:
                batches.append(batch)
                batch, longest, widest = [], length, anchors
            batch.append(index)
        return [*batches, batch] if batch else batches


def longest_first(longest: Ints, random: np.random.Generator) -> list[int]:
    """Returns all places in random order, but that of the longest first: memory that does not suffice shows at once."""
    order: list[int] = random.permutation(len(longest)).tolist()
    if order:
        place = max(order, key=lambda place: int(longest[place]))
        order.remove(place)
        order.insert(0, place)
    return order


def split(array: Ints, size: int) -> list[Ints]:
    """Returns consecutive pieces of at most `size` entries."""
    return [array[start : start + size] for start in range(0, len(array), size)]
