"""How well streams guess: the rank that each stream gave to the token that came, and what drafts from it would have been worth.

With the tokens a model writes by itself and the ranks its streams gave them, decoding with any static tree is known exactly
without decoding: a path of the tree is accepted if it equals the ranks, one after another.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from huggingface.transformers.generation.draft_tree import TreeShape
from training.batches import IGNORE

RANKS = 16
NO_TOKEN = -1
RankPath = tuple[int, ...]
Ints = npt.NDArray[np.int64]


@torch.no_grad()
def stream_ranks(model: Any, batch: dict[str, torch.Tensor], own_choice: bool = False) -> torch.Tensor:
    """Returns the rank of the token that each stream should have guessed, given the token before it.

    Args:
        model: the streaming model.
        batch: from :class:`training.batches.Collator`, on the model's device.
        own_choice: take the model's own best token at that place as the right one, not the text's.

    Returns:
        (anchors, streams) int64: 0 for the stream's best guess, RANKS for RANKS and beyond, NO_TOKEN past the end of the text.
    """
    main, streams = model.stream_forward(batch["input_ids"], batch["stream_parents"])
    labels = batch["stream_labels"]
    if own_choice:
        labels = own_labels(model, main, batch)
    kept = streams.flatten(0, 1).index_select(0, batch["anchor_slots"])
    logits = model.stream_logits(kept, batch["stream_parent_tokens"])
    right = logits.gather(-1, labels.clamp(min=0)[..., None])
    ranks = (logits > right).sum(-1).clamp(max=RANKS)
    return ranks.masked_fill(labels == IGNORE, NO_TOKEN)


def own_labels(model: Any, main: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns (anchors, streams) int64: the main rows' best token at each stream's place, IGNORE past the end."""
    states = main.flatten(0, 1)
    best = torch.zeros(len(states), dtype=torch.int64, device=main.device)
    rows = batch["completion_rows"]
    best[rows] = model.get_output_embeddings()(states.index_select(0, rows)).argmax(-1)
    given = batch["stream_labels"]
    offsets = torch.arange(1, given.shape[1] + 1, device=main.device)
    places = (batch["anchor_rows"][:, None] + offsets).clamp(max=len(states) - 1)
    return torch.where(given == IGNORE, given, best[places])


def rank_accuracy(ranks: Ints) -> list[list[float]]:
    """Returns, by stream and rank, how often the right token had that rank, where all earlier streams had it within RANKS.

    Args:
        ranks: (anchors, streams) from :func:`stream_ranks`.
    """
    table = []
    reached = np.ones(len(ranks), dtype=bool)
    for column in ranks.T:
        counted = column[reached & (column != NO_TOKEN)]
        hits = np.bincount(counted[counted < RANKS], minlength=RANKS)
        table.append([round(float(hit) / max(len(counted), 1), 6) for hit in hits])
        reached &= (column != NO_TOKEN) & (column < RANKS)
    return table


def rank_paths(tree: TreeShape) -> set[RankPath]:
    """Returns a draft tree as the ranks on the way to each of its nodes."""
    nodes = range(1, tree.nodes)
    return {tuple(tree.ranks[step] for step in tree.path(node)[1:]) for node in nodes}


def acceptance_length(sequences: Iterable[Ints], tree: TreeShape) -> float | None:
    """Returns the tokens a decode step would have emitted with this tree, bonus token included; None if nothing was decoded.

    Args:
        sequences: of each text the (anchors, streams) ranks of its anchors in order; the first is the last prompt token's.
        tree: the draft tree of every step.
    """
    paths = rank_paths(tree)
    tokens = steps = 0
    for ranks in sequences:
        tokens += len(ranks)
        place = 0
        while place < len(ranks):
            place += 1 + accepted(ranks[place], paths)
            steps += 1
    return tokens / steps if steps else None


def accepted(ranks: Ints, paths: set[RankPath]) -> int:
    """Returns how many drafted tokens on one of the paths are right, given the right tokens' ranks by stream."""
    path: RankPath = ()
    for rank in ranks.tolist():
        if rank == NO_TOKEN or (*path, rank) not in paths:
            break
        path = (*path, rank)
    return len(path)
