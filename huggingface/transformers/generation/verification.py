"""Choosing the target's tokens at every node, and the longest path of the tree that agrees with them.

Exact for any draft: at each node the target picks its own token, greedily or by sampling from its own distribution; a child is
followed only if it holds that token. Where none does, the picked token is the bonus token and the step ends. No draft
probabilities are needed. Ties of the largest logit go to the lowest token id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList

from .draft_tree import DraftTree, TreeShape
from .processors import SCORE_ONLY, WHOLE_BATCH, of_sequence


@dataclass
class Acceptance:
    """What one step emits.

    Attributes:
        tokens: (batch, depth + 1) int64 tokens to emit, the bonus token last; valid up to `counts`.
        counts: (batch,) int64 tokens emitted, bonus included.
        path: (batch, depth + 1) int64 accepted nodes, root first; the last one repeated.
        last: (batch,) int64 last accepted node.
    """

    tokens: torch.Tensor
    counts: torch.Tensor
    path: torch.Tensor
    last: torch.Tensor


@dataclass
class Rule:
    """How the target picks a token from its logits.

    Attributes:
        processors: upstream's logits processors and warpers, in order.
        do_sample: sample instead of taking the most likely token.
    """

    processors: LogitsProcessorList
    do_sample: bool = False

    @property
    def needs_prefixes(self) -> bool:
        """Whether a processor looks at the tokens before, which sends every node's prefix through it on the host."""
        return any(not isinstance(processor, SCORE_ONLY) for processor in self.processors)

    def scores(
        self,
        logits: torch.Tensor,
        histories: list[list[int]],
        tree: DraftTree | None = None,
        nodes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns processed (batch, nodes, vocab) scores of the target at each node.

        Args:
            logits: (batch, nodes, vocab) target logits.
            histories: tokens of each sequence up to and with the root, as upstream would pass them, padding included.
            tree: the tree of the step; `None` after prefill, where each sequence has one node.
            nodes: (batch, nodes) int64 node numbers where pruning left only some of them.
        """
        if not self.processors:
            return logits
        scores = logits.float()
        if not self.needs_prefixes:
            unread: Any = None  # processors of scores alone do not look at the tokens
            return self.processors(unread, scores.flatten(0, 1)).view(scores.shape)
        shape = tree.shape if tree is not None else TreeShape((-1,))
        processed = torch.empty_like(scores)
        for row, history in enumerate(histories):
            present = nodes[row].tolist() if nodes is not None else list(range(shape.nodes))
            tokens = tree.tokens[row].tolist() if tree is not None else history[-1:]
            processors = of_sequence(self.processors, row)
            one_by_one = any(isinstance(processor, WHOLE_BATCH) for processor in processors)
            together = [[i] for i in range(len(present))] if one_by_one else _by_depth(shape, present)
            for places in together:
                prefixes = [[*history, *(tokens[at] for at in shape.path(present[i])[1:])] for i in places]
                ids: Any = torch.tensor(prefixes, dtype=torch.int64, device=logits.device)
                processed[row, places] = processors(ids, scores[row, places])
        return processed

    def pick(self, scores: torch.Tensor) -> torch.Tensor:
        """Returns the (batch, nodes) int64 tokens the target emits at each node."""
        if not self.do_sample:
            return scores.argmax(dim=-1)
        return draw(scores.float().softmax(dim=-1))


def draw(probabilities: torch.Tensor) -> torch.Tensor:
    """Returns (...) int64 indices drawn from (..., vocab) probabilities.

    The race of exponential clocks: index i rings after E / p_i, and the first to ring is i with probability p_i. Unlike
    `torch.multinomial` it never asks the host, so that a captured step can draw.
    """
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1)


def _by_depth(shape: TreeShape, nodes: list[int]) -> list[list[int]]:
    """Returns the places of the given nodes, grouped by depth: prefixes of one group have one length."""
    depths = [shape.depths[node] for node in nodes]
    return [[i for i, at in enumerate(depths) if at == depth] for depth in sorted(set(depths))]


def verify(chosen: torch.Tensor, tree: DraftTree, kept: torch.Tensor | None = None) -> Acceptance:
    """Returns the longest path whose every token is the one the target picked at its parent.

    Args:
        chosen: (batch, nodes) int64 tokens the target picks at each node; anything at nodes that are not kept.
        tree: the draft tree.
        kept: (batch, nodes) bool, nodes that survived pruning; `None` for all. Closed under parents.
    """
    tables = tree.shape.tables(chosen.device)
    if tree.shape.nodes == 1:
        zeros = torch.zeros_like(chosen)
        return Acceptance(chosen, zeros[:, 0] + 1, zeros, zeros[:, 0])
    agrees = tree.tokens == chosen[:, tables.parents]
    agrees[:, 0] = True
    if kept is not None:
        agrees &= kept
    rejected = (~agrees).float() @ tables.on_path
    reach = torch.where(rejected == 0, tables.depths + 1, 0)
    last = reach.argmax(dim=1)
    path = tables.paths[last]
    return Acceptance(chosen.gather(1, path), tables.depths[last] + 1, path, last)
