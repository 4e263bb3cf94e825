"""Calibration: how often each stream's guesses are right on what the trained model writes by itself.

The decode loop chooses its draft trees from these numbers; they come from held-out prompts, never from those that a result is
reported on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from huggingface.transformers.generation.tree_worth import grow_tree
from training.batches import Collator
from training.ranks import acceptance_length, rank_accuracy, stream_ranks
from training.targets import Continuer, own_continuations, unique_prompts
from training.tokens import TokenSet

DRAFT_NODES = (4, 8, 16, 32, 64)
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SetCalibration:
    """What one set's held-out prompts showed.

    Attributes:
        prompts: how many.
        rank_accuracy: by stream and rank; see :func:`training.ranks.rank_accuracy`.
        acceptance_length: by number of draft nodes (root included), with the tree of the pooled table.
        mean_tokens: mean length of the continuations.
    """

    prompts: int
    rank_accuracy: list[list[float]]
    acceptance_length: dict[int, float | None]
    mean_tokens: float


@dataclass(frozen=True)
class Calibration:
    """The pooled table and each set's own."""

    rank_accuracy: list[list[float]]
    sets: dict[str, SetCalibration]

    def as_dict(self) -> dict[str, Any]:
        """Returns what `generation_config.json` keeps under `spec_stream`."""
        by_set = {name: part.rank_accuracy for name, part in self.sets.items()}
        lengths = {
            name: {str(nodes): value for nodes, value in part.acceptance_length.items()}
            for name, part in self.sets.items()
        }
        prompts = sum(part.prompts for part in self.sets.values())
        return {
            "rank_accuracy": self.rank_accuracy,
            "rank_accuracy_by_set": by_set,
            "held_out_acceptance_length": lengths,
            "calibration_prompts": prompts,
        }


def calibrate(continuer: Continuer, held_out: TokenSet, prompts_per_set: int) -> Calibration | None:
    """Returns the calibration of a trained model, or None without held-out prompts.

    Args:
        continuer: the model and how it continues prompts.
        held_out: examples it was not trained on; only prompts are used.
        prompts_per_set: different prompts of each set, the first ones.
    """
    prompts = unique_prompts(held_out, prompts_per_set)
    if not len(prompts):
        return None
    texts = own_continuations(continuer, prompts)
    by_text = list(ranks_by_text(continuer, texts))
    pooled = rank_accuracy(np.concatenate(by_text))
    trees = {nodes: grow_tree(pooled, nodes, len(pooled))[0] for nodes in DRAFT_NODES}
    sets = {}
    for set_id, name in enumerate(texts.names):
        members = np.flatnonzero(texts.set_ids == set_id).tolist()
        if members:
            ranks = [by_text[index] for index in members]
            lengths = {nodes: acceptance_length(ranks, tree) for nodes, tree in trees.items()}
            mean = float((texts.lengths - texts.prompt_lengths)[members].mean())
            sets[name] = SetCalibration(len(members), rank_accuracy(np.concatenate(ranks)), lengths, mean)
    return Calibration(pooled, sets)


def ranks_by_text(continuer: Continuer, texts: TokenSet) -> Iterator[Ints]:
    """Yields each text's (anchors, streams) ranks, in the set's order."""
    model = continuer.model
    collator = Collator(texts, model.config.streams, continuer.pad_id, with_prompts=False)
    for start in range(0, len(texts), continuer.batch_size):
        indices = list(range(start, min(start + continuer.batch_size, len(texts))))
        batch = {name: tensor.to(model.device) for name, tensor in collator(indices).items()}
        ranks = stream_ranks(model, batch).cpu().numpy()
        yield from np.split(ranks, np.cumsum(anchor_counts(texts, indices))[:-1])


def anchor_counts(texts: TokenSet, indices: Sequence[int]) -> Ints:
    """Returns how many anchors each of these texts has."""
    counts: Ints = np.maximum((texts.lengths - texts.prompt_lengths)[list(indices)] - 1, 0)
    return counts
