"""Draft trees of tokens, made on the device step by step; nothing of their shape is known to the host.

Stream j scores the tokens of depth j; a low-rank bias from the parent's token sets the children of one node apart from those of
another. Level by level the best `beam` candidates are expanded, each by its best `beam` tokens, and the tree is the root with the
best `nodes - 1` of all candidates, by the sum of log-probabilities on the way from the root. A sum never rises from parent to
child, so what is chosen holds every parent of its members, and nodes are numbered from the best to the worst. A chain of tokens
copied from the context may join the candidates.

The whole vocabulary is scored at every parent: preselecting tokens before the bias is added costs acceptance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .chain_drafting import draft_chain
from .tree_drafting_kernels import draft_level_kernel, draft_selection_kernel
from .tree_drafting_workspace import (
    SELECTION_WARPS,
    DraftWorkspace,
    block_warps,
    kernel_sizes,
    level_stages,
    next_power_of_two,
    padded_rank,
)
from .triton_support import unavailable

MOST_NODES = 64
"""Largest tree: the ancestors of a node are the bits of one int64."""


@dataclass(frozen=True)
class TreeTensors:
    """The draft trees of a step, at fixed addresses; every step fills them anew.

    Nodes are numbered by what speaks for them, the root first; so parents come before their children. Where there are fewer
    candidates than nodes the last nodes are padding: children of the root with token 0, as good for verification as any token.

    Attributes:
        tokens: (batch, nodes) int64; column 0 is the root.
        parents: (batch, nodes) int32; the root is its own parent.
        depths: (batch, nodes) int32 distances from the root.
        ancestors: (batch, nodes) int64, bit n set if node n lies on the way from the root to this node, itself included.
        origins: (batch, nodes) int32 who proposed the token: 0 nobody (root and padding), 1 the streams, 2 the context.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor
    ancestors: torch.Tensor
    origins: torch.Tensor

    @classmethod
    def allocate(cls, batch: int, nodes: int, device: torch.device | str = "cpu") -> TreeTensors:
        """Returns trees of padding.

        Raises:
            ValueError: `nodes` is not in 1 .. :data:`MOST_NODES`.
        """
        if not 1 <= nodes <= MOST_NODES:
            raise ValueError(f"a tree has 1 to {MOST_NODES} nodes, got {nodes}.")

        def zeros(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(batch, nodes, dtype=dtype, device=device)

        tree = cls(
            zeros(torch.int64),
            *(zeros(dtype) for dtype in (torch.int32, torch.int32, torch.int64, torch.int32)),
        )
        tree.depths[:, 1:] = 1
        tree.ancestors.copy_(torch.tensor([as_bits({0, node}) for node in range(nodes)]))
        return tree


def as_bits(nodes: set[int]) -> int:
    """Returns the int64 whose bits are `nodes`; bit 63 is the sign."""
    bits = sum(1 << node for node in nodes)
    return bits - (1 << 64) if bits >> 63 else bits


def draft_tree(
    logits: torch.Tensor,
    root: torch.Tensor,
    parent_table: torch.Tensor | None,
    token_table: torch.Tensor | None,
    tree: TreeTensors,
    beam: int,
    workspace: DraftWorkspace | None = None,
    continuation: torch.Tensor | None = None,
    continuation_log_probability: float = -0.5,
    prior: torch.Tensor | None = None,
    trust: float = 1.0,
) -> None:
    """Fills `tree` with the best tree of its number of nodes.

    The tokens at depth j below a node that holds token t have the logits `logits[:, j - 1] + token_table @ parent_table[t]`.
    Ties of logits go to the lower token, ties of sums to the shallower candidate, then to the one with the better parent.
    Candidates without probability are no candidates.

    A model may be surer than it is right. How often the r-th best token of a stream is accepted is measured beforehand; with this
    `prior` a child of rank r (from 0, among the tokens of its parent) at depth j adds `trust * log_softmax + (1 - trust) *
    prior[j - 1, r]` to its parent's sum instead of its log-probability alone.

    Args:
        logits: (batch, streams, vocab) what stream j says of depth j.
        root: (batch,) int64 last committed tokens.
        parent_table: (vocab, rank) and
        token_table: (vocab, rank) factors of the bias that tokens gain from their parent; `None` for no bias.
        tree: filled in place.
        beam: candidates expanded a level, and tokens of each; at most 8.
        workspace: of :meth:`DraftWorkspace.allocate`; `None` makes one, which is not for a captured graph.
        continuation: (batch, length) int64 chain of tokens from the context, ended by -1; may be deeper than the streams. A token
            that the streams propose at the same place is counted once, as theirs, with the larger sum.
        continuation_log_probability: what each token of the chain adds to the sum; at most 0.
        prior: (streams, beam) float32 logarithms of the calibrated accuracy of each rank: finite, at most 0, and never rising
            from one rank to the next.
        trust: weight of the log-probabilities beside the prior, 0 to 1; of no effect without one.

    Raises:
        ValueError: one table without the other, a positive `continuation_log_probability`, a `prior` of another shape, a `trust`
            that is no weight, a workspace of other sizes.
    """
    if (parent_table is None) != (token_table is None):
        raise ValueError("the transition bias needs both of its tables or neither.")
    if continuation_log_probability > 0:
        raise ValueError(f"a log-probability is at most 0, got {continuation_log_probability}.")
    if not 0 <= trust <= 1:
        raise ValueError(f"trust is a weight from 0 to 1, got {trust}.")
    if prior is not None and tuple(prior.shape) != (logits.shape[1], beam):
        raise ValueError(
            f"the prior is (streams, beam) = {(logits.shape[1], beam)}, got {tuple(prior.shape)}."
        )
    if tree.tokens.shape[1] == 1:
        tree.tokens.copy_(root[:, None])
        return
    arguments = (logits, root, parent_table, token_table, tree, beam, workspace, continuation)
    if unavailable(logits.device) is None and logits.dtype != torch.float64:
        _draft_tree_triton(*arguments, continuation_log_probability, prior, trust)
    else:
        draft_tree_reference(*arguments, continuation_log_probability, prior, trust)


def _draft_tree_triton(
    logits: torch.Tensor,
    root: torch.Tensor,
    parent_table: torch.Tensor | None,
    token_table: torch.Tensor | None,
    tree: TreeTensors,
    beam: int,
    workspace: DraftWorkspace | None,
    continuation: torch.Tensor | None,
    step: float,
    prior: torch.Tensor | None,
    trust: float,
) -> None:
    batch, streams, vocab = logits.shape
    nodes = tree.tokens.shape[1]
    rank = parent_table.shape[1] if parent_table is not None else 0
    if workspace is None:
        workspace = DraftWorkspace.allocate(batch, streams, vocab, beam, nodes, logits.device)
    sizes = kernel_sizes(beam, nodes, streams, vocab)
    shape = (batch, streams, sizes["SLOTS"])
    if (workspace.beam, workspace.keep, *workspace.sums.shape) != (beam, sizes["KEEP"], *shape):
        raise ValueError(
            "the workspace was allocated for another batch, beam, number of streams or of nodes."
        )
    if beam == 1 and continuation is None:
        draft_chain(logits, root, parent_table, token_table, tree, workspace)
        return
    if not workspace.scored.numel():
        raise ValueError("the workspace was allocated for chains that no continuation joins.")
    length = continuation.shape[1] if continuation is not None else 0
    lists = (workspace.scored, workspace.parts, workspace.sums, workspace.tokens, workspace.parents)
    warps = block_warps(sizes["BLOCK"])
    for level in range(streams):
        draft_level_kernel[(sizes["BLOCKS"], batch)](
            logits, root, parent_table, token_table, *lists, prior, trust,
            logits.stride(0), logits.stride(1), vocab, rank, level,
            RANK=padded_rank(rank),
            FIRST=level == 0,
            num_warps=warps,
            num_stages=level_stages(rank),
            **sizes,
        )  # fmt: skip
    draft_selection_kernel[(batch,)](
        root, *lists, prior, trust,
        tree.tokens, tree.parents, tree.depths, tree.ancestors, tree.origins,
        continuation, step, nodes, length,
        ENTRIES=next_power_of_two(streams * sizes["SLOTS"]),
        NODES=next_power_of_two(nodes),
        CHAIN=next_power_of_two(length) if length else 0,
        num_warps=SELECTION_WARPS,
        **sizes,
    )  # fmt: skip


@dataclass
class _Candidate:
    """A possible node; `place` orders the candidates of one depth."""

    total: float
    depth: int
    place: int
    token: int
    parent: _Candidate | None
    origin: int


def draft_tree_reference(
    logits: torch.Tensor,
    root: torch.Tensor,
    parent_table: torch.Tensor | None,
    token_table: torch.Tensor | None,
    tree: TreeTensors,
    beam: int,
    workspace: DraftWorkspace | None = None,
    continuation: torch.Tensor | None = None,
    continuation_log_probability: float = -0.5,
    prior: torch.Tensor | None = None,
    trust: float = 1.0,
) -> None:
    """Fills `tree` as :func:`draft_tree` does, in plain PyTorch, one sequence at a time; needs no workspace."""
    nodes = tree.tokens.shape[1]
    step = torch.tensor(continuation_log_probability, dtype=torch.promote_types(logits.dtype, torch.float32))
    for row, first in enumerate(root.tolist()):
        keep = max(nodes - 1, beam)
        pool = _stream_candidates(logits[row], first, parent_table, token_table, beam, keep, prior, trust)
        if continuation is not None:
            _join_chain(pool, continuation[row].tolist(), step)
        pool.sort(key=lambda candidate: (-candidate.total, candidate.depth, candidate.place))
        _write(tree, row, first, pool[: nodes - 1])


def _stream_candidates(
    logits: torch.Tensor,
    root: int,
    parent_table: torch.Tensor | None,
    token_table: torch.Tensor | None,
    beam: int,
    keep: int,
    prior: torch.Tensor | None,
    trust: float,
) -> list[_Candidate]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    pool: list[_Candidate] = []
    frontier: list[_Candidate | None] = [None]
    for depth, scores in enumerate(logits, start=1):
        held = [parent.token if parent else root for parent in frontier]
        scores = scores.expand(len(frontier), -1)
        if parent_table is not None and token_table is not None:
            scores = scores + parent_table[held].to(scores.dtype) @ token_table.to(scores.dtype).T
        best = scores.sort(dim=1, descending=True, stable=True).indices[:, :beam]
        above = torch.tensor([parent.total if parent else 0.0 for parent in frontier], dtype=scores.dtype)
        gains = scores.log_softmax(1).gather(1, best)
        if prior is not None:
            expected = prior[depth - 1, : best.shape[1]].to(gains.dtype)
            gains = torch.where(gains.isfinite(), trust * gains + (1 - trust) * expected, gains)
        sums = above.to(scores.device)[:, None] + gains
        order = sums.flatten().sort(descending=True, stable=True).indices[:keep].tolist()
        level = [
            _Candidate(
                sums.flatten()[i].item(),
                depth,
                place,
                int(best.flatten()[i]),
                frontier[i // best.shape[1]],
                1,
            )
            for place, i in enumerate(order)
        ]
        level = [candidate for candidate in level if candidate.total > float("-inf")]
        pool += level
        frontier = [*level[:beam]]
    return pool


def _join_chain(pool: list[_Candidate], chain: list[int], step: torch.Tensor) -> None:
    """Adds the tokens of `chain` up to its first -1; what the pool already holds at the same place is raised instead."""
    known = {(id(candidate.parent), candidate.token): candidate for candidate in pool}
    parent: _Candidate | None = None
    for depth, token in enumerate(chain, start=1):
        if token < 0:
            return
        total = (depth * step).item()
        same = known.get((id(parent), token))
        if same is None:
            same = _Candidate(total, depth, len(pool), token, parent, 2)
            pool.append(same)
        same.total = max(same.total, total)
        parent = same


def _write(tree: TreeTensors, row: int, root: int, chosen: list[_Candidate]) -> None:
    padding = _Candidate(0.0, 1, 0, 0, None, 0)
    listed = [*chosen, *[padding] * (tree.tokens.shape[1] - 1 - len(chosen))]
    number = {id(candidate): node for node, candidate in enumerate(chosen, start=1)}
    parents = [0, *(number[id(candidate.parent)] if candidate.parent else 0 for candidate in listed)]
    ancestors = [{0}]
    for node, parent in enumerate(parents[1:], start=1):
        ancestors.append(ancestors[parent] | {node})
    columns = (
        (tree.tokens, [root, *(candidate.token for candidate in listed)]),
        (tree.parents, parents),
        (tree.depths, [0, *(candidate.depth for candidate in listed)]),
        (tree.ancestors, [as_bits(nodes) for nodes in ancestors]),
        (tree.origins, [0, *(candidate.origin for candidate in listed)]),
    )
    for target, values in columns:
        target[row] = torch.tensor(values, dtype=target.dtype)
