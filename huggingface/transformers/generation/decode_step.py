"""One decode step: draft, forward, verify, commit.

All of it runs on the device with shapes fixed by the plan; the host reads one small tensor at the end. Plain decoding is the
same step with a tree of one node and no streams.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..cache_utils import StaticTreeCache
from ..masking_utils import attention_mask_from, visible_in_step
from .draft_sources import DraftSource
from .draft_tree import DraftTree, TreeShape, stream_block
from .step_record import PhaseTimer
from .verification import Acceptance, Rule, verify


@dataclass
class DecodeState:
    """What a step takes from the one before.

    Attributes:
        root: (batch,) int64 last emitted token of each sequence; it has no cache row yet.
        lengths: (batch,) int64 committed rows.
        finished: (batch,) bool; such a sequence no longer grows.
        stream_hidden: (batch, streams, hidden) stream states at the last accepted node, or `None` before there are any.
        histories: tokens of each sequence up to the root, kept only where a logits processor asks for them.
        longest, shortest: largest and smallest of `lengths`, known to the host.
    """

    root: torch.Tensor
    lengths: torch.Tensor
    finished: torch.Tensor
    stream_hidden: torch.Tensor | None
    histories: list[list[int]]
    longest: int
    shortest: int


@dataclass
class StepOutput:
    """What a step leaves for the loop.

    Attributes:
        packed: (batch, depth + 2) int64: emitted count, then the tokens. The one tensor the host reads.
        scores, logits: (batch, kept nodes, vocab) processed and raw target scores.
        path: (batch, depth + 1) int64 accepted nodes, counted among the kept ones.
        tree: the tree that was verified.
        rows: rows in the top layers.
    """

    packed: torch.Tensor
    path: torch.Tensor
    scores: torch.Tensor
    logits: torch.Tensor
    tree: DraftTree
    rows: int


@dataclass(frozen=True)
class Survivors:
    """Nodes that pruning kept, in rising order.

    Attributes:
        nodes: (batch, kept) int64 node numbers.
        mask: (batch, nodes) bool.
        places: (batch, nodes) int64 place of each kept node among the kept ones.
    """

    nodes: torch.Tensor
    mask: torch.Tensor
    places: torch.Tensor


def decode_step(
    model,
    cache: StaticTreeCache,
    state: DecodeState,
    shape: TreeShape,
    rule: Rule,
    source: DraftSource,
    timer: PhaseTimer,
    keep: int | None = None,
) -> StepOutput:
    """Advances every sequence by one step, in place, and returns what was emitted.

    Args:
        model: decoder with streams.
        cache: its cache; gains the accepted rows.
        state: updated in place, but for what only the host knows.
        shape: tree to draft, and streams to run.
        rule: how the target picks tokens.
        source: who fills the tree.
        timer: takes the phases' seconds.
        keep: nodes that survive pruning; `None` for no pruning.
    """
    with timer.time("draft"):
        tree = source.propose(model, state.root, state.stream_hidden, shape)
    with timer.time("forward"):
        nodes, streams, survivors = _forward(model, cache, state, tree, keep)
        logits = model.get_output_embeddings()(nodes)
    with timer.time("verify"):
        present = survivors.nodes if survivors is not None else None
        scores = rule.scores(logits, state.histories, tree, present)
        chosen = rule.pick(scores)
        if survivors is not None:
            chosen = torch.full_like(tree.tokens, -1).scatter(1, survivors.nodes, chosen)
        acceptance = verify(chosen, tree, survivors.mask if survivors is not None else None)
    with timer.time("commit"):
        above = acceptance.path if survivors is None else survivors.places.gather(1, acceptance.path)
        # The one sequence's accepted rows of a chain lie where they belong.
        if not (tree.shape.is_chain and len(tree.tokens) == 1 and survivors is None):
            cache.commit(acceptance.path, above, state.lengths)
        _advance(state, acceptance, streams, above)
    packed = torch.cat([acceptance.counts[:, None], acceptance.tokens], dim=1)
    return StepOutput(packed, above, scores, logits, tree, nodes.shape[1] * (1 + tree.shape.streams))


def _advance(
    state: DecodeState, acceptance: Acceptance, streams: torch.Tensor | None, above: torch.Tensor
) -> None:
    last = (acceptance.counts - 1)[:, None]
    state.root = acceptance.tokens.gather(1, last)[:, 0]
    state.lengths = state.lengths + acceptance.counts.masked_fill(state.finished, 0)
    if streams is not None:
        index = above.gather(1, last)[:, :, None, None].expand(-1, -1, *streams.shape[2:])
        state.stream_hidden = streams.gather(1, index)[:, 0]


def _forward(
    model, cache: StaticTreeCache, state: DecodeState, tree: DraftTree, keep: int | None
) -> tuple[torch.Tensor, torch.Tensor | None, Survivors | None]:
    """Returns node states, stream states and the survivors of pruning."""
    shape = tree.shape
    tables = shape.tables(state.root.device)
    streams = shape.streams
    cache.base = state.longest
    cache.check_step(shape.rows if keep is None else max(shape.nodes, keep * (1 + streams)))
    limit = model.config.max_position_embeddings
    positions = state.lengths[:, None] + tables.depths
    if len(state.lengths) > 1:
        # A finished sequence keeps stepping with the others; its rows must not run past the last position.
        positions = positions.clamp(max=limit - 1)
    masks = _masks(model, state, tables.ancestors[None, None], positions)
    hidden = model.run_below(tree.tokens, positions, masks, cache)
    survivors = None
    ancestors = tables.ancestors[None]
    if keep is not None and keep < shape.nodes:
        survivors = prune(model.early_scores(hidden), tree, keep)
        hidden = hidden.gather(1, survivors.nodes[:, :, None].expand(-1, -1, hidden.shape[2]))
        positions = positions.gather(1, survivors.nodes)
        ancestors = ancestors.expand(len(positions), -1, -1)
        ancestors = ancestors.gather(1, survivors.nodes[:, :, None].expand(-1, -1, shape.nodes))
        ancestors = ancestors.gather(2, survivors.nodes[:, None, :].expand(-1, keep, -1))
    if streams:
        numbers = torch.arange(1, streams + 1, device=positions.device)
        positions = torch.cat([positions, (positions[:, :, None] + numbers).flatten(1)], dim=1)
        block = tables.block if survivors is None else stream_block(ancestors, streams)
        masks = _masks(model, state, block, positions)
    elif survivors is not None:
        masks = _masks(model, state, ancestors[:, None], positions)
    nodes, stream_states = model.run_above(hidden, positions, masks, cache, streams=streams)
    return nodes, stream_states, survivors


def _masks(model, state: DecodeState, block: torch.Tensor, positions: torch.Tensor):
    """Returns the mask of every kind of layer; `None` where each row sees all there is."""
    ragged = state.longest != state.shortest
    farthest = state.longest + block.shape[-1]
    built: dict[int | None, torch.Tensor | None] = {}
    result = {}
    for window in model.layer_windows():
        active = window if window is not None and farthest > window else None
        if active not in built:
            if active is None and not ragged and block.shape[-1] == 1:
                built[active] = None
            else:
                visible = visible_in_step(block, positions, state.lengths, state.longest, active, ragged)
                built[active] = attention_mask_from(visible, model.dtype)
        result[window] = built[active]
    return result


def prune(early: torch.Tensor, tree: DraftTree, keep: int) -> Survivors:
    """Returns the `keep` nodes most likely by the early head.

    A node's score is what its *parent's* row says of the node's token; the product along the path ranks the nodes. A product
    never grows with depth and ties go to the shallower node, so the kept set holds every parent of its members.

    Args:
        early: (batch, nodes, vocab) next-token probabilities at each node.
        tree: the draft tree.
        keep: nodes to keep, root included.
    """
    tables = tree.shape.tables(early.device)
    own = early[:, tables.parents].gather(2, tree.tokens[:, :, None])[:, :, 0]
    logs = own.clamp_min(torch.finfo(own.dtype).tiny).log()
    logs[:, 0] = 0.0
    total = (logs.double() @ tables.ancestors.T.double()) - 1e-6 * tables.depths
    nodes = total.topk(keep, dim=1).indices.sort(dim=1).values
    mask = torch.zeros_like(tree.tokens, dtype=torch.bool).scatter(1, nodes, True)
    return Survivors(nodes, mask, mask.long().cumsum(1) - 1)
