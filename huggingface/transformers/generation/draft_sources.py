"""Where the tokens of a draft tree come from.

Verification does not care who proposed a node, so a source only has to fill a shape.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from .draft_tree import DraftTree, TreeShape


class DraftSource(Protocol):
    """Fills a tree shape with tokens."""

    def propose(
        self, model, root: torch.Tensor, stream_hidden: torch.Tensor | None, shape: TreeShape
    ) -> DraftTree:
        """Returns the tree.

        Args:
            model: decoder with streams.
            root: (batch,) int64 last committed tokens.
            stream_hidden: (batch, streams, hidden) stream states at the last accepted node, or `None`.
            shape: shape to fill.
        """
        ...


class StreamSource:
    """Drafts from the streams: stream j scores the tokens of depth j, the transition bias sets one parent apart from another."""

    def propose(
        self, model, root: torch.Tensor, stream_hidden: torch.Tensor | None, shape: TreeShape
    ) -> DraftTree:
        tokens = root[:, None]
        if shape.nodes == 1 or stream_hidden is None:
            return DraftTree(TreeShape((-1,), shape.streams), tokens)
        parent_table, token_table = model.draft_tables()
        tokens = tokens.repeat(1, shape.nodes)
        logits = model.get_output_embeddings()(stream_hidden[:, : shape.depth])
        for depth, level in enumerate(shape.tables(root.device).levels):
            scores = logits[:, depth, None]
            if parent_table is not None:
                scores = scores + F.linear(F.embedding(tokens[:, level.parents], parent_table), token_table)
            best = scores.argmax(-1, keepdim=True) if level.width == 1 else scores.topk(level.width).indices
            best = best.expand(-1, len(level.parents), -1)
            tokens[:, level.nodes] = best[:, level.slots, level.ranks]
        return DraftTree(shape, tokens)


@dataclass
class OracleSource:
    """Drafts at a set acceptance ratio, for the sweep of tokens/s against acceptance.

    The wrapped source works as always, so that the cost is real. Then its tokens are replaced: at each depth the first child
    of the right path holds the known next token with probability `ratio`; every other node holds a wrong one.

    Attributes:
        source: the source whose cost is paid.
        known: tokens that plain decoding emits for each sequence, the first one included.
        ratio: probability that a depth offers the right token.
        generator: source of the draws.
        emitted: tokens emitted so far for each sequence; the loop counts on.
    """

    source: DraftSource
    known: list[list[int]]
    ratio: float
    generator: random.Random
    emitted: list[int]

    def propose(
        self, model, root: torch.Tensor, stream_hidden: torch.Tensor | None, shape: TreeShape
    ) -> DraftTree:
        # Copied before the source works: a copy after it would wait for the device, which drafting does not.
        replaced = torch.tensor(self._tokens(shape, model.config.vocab_size), device=root.device)
        tree = self.source.propose(model, root, stream_hidden, shape)
        if tree.shape.nodes == 1:
            return tree
        replaced[:, 0] = root
        return DraftTree(tree.shape, replaced)

    def _tokens(self, shape: TreeShape, vocab: int) -> list[list[int]]:
        spine = set(_first_children(shape))
        rows = []
        for sequence, count in zip(self.known, self.emitted, strict=True):
            # Past the end of the known tokens the loop emits nothing any more; any token does.
            right = [sequence[min(count + depth - 1, len(sequence) - 1)] for depth in shape.depths]
            hit = [self.generator.random() < self.ratio for _ in range(shape.depth + 1)]
            offers = [node in spine and hit[depth] for node, depth in enumerate(shape.depths)]
            rows.append(
                [token if offer else (token + 1) % vocab for token, offer in zip(right, offers, strict=True)]
            )
        return rows


def _first_children(shape: TreeShape) -> list[int]:
    """Returns the nodes of the path that follows each node's first child."""
    path = [0]
    for node, parent in enumerate(shape.parents):
        if parent == path[-1] and shape.ranks[node] == 0:
            path.append(node)
    return path
