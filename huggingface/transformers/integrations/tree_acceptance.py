"""What follows the forward pass of a step: the target's tokens, the accepted path, the next step's state, the committed rows.

All of it stays on the device: no number that varies from step to step is known to the host, which reads `packed` once a step and
nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .tree_acceptance_kernels import accept_kernel, best_tokens_kernel, commit_kernel
from .tree_drafting import TreeTensors, next_power_of_two
from .triton_support import overlap_options, unavailable

VOCABULARY_BLOCK = 1024
"""Logits a program of :func:`best_tokens` reads at once: 8 for each of 128 threads, 16 bytes in half precision."""
PROGRAMS = 256
"""Programs that keep a large GPU busy; more rows than that leave one program to each row."""
STATE_BLOCK = 2048
"""Numbers of a stream that one program copies."""


@dataclass(frozen=True)
class StepState:
    """What one step hands to the next, at fixed addresses.

    Attributes:
        root: (batch,) int64 last committed tokens; they have no cache row yet.
        lengths: (batch,) int64 committed rows.
        finished: (batch,) bool; such a sequence grows no longer.
        stream_states: (batch, streams, width) what the streams of the last accepted node hold, states or logits, zeros where
            there are none; `None` without streams.
        history: (batch, capacity) int64 tokens by position, the root at `lengths`; `None` where nobody reads them.
        base: (batch,) int64 committed rows before the last step, where that step's rows begin.
    """

    root: torch.Tensor
    lengths: torch.Tensor
    finished: torch.Tensor
    stream_states: torch.Tensor | None
    history: torch.Tensor | None
    base: torch.Tensor


@dataclass(frozen=True)
class BestTokensWorkspace:
    """What the programs of :func:`best_tokens` leave each other.

    Attributes:
        keys: (rows, blocks) int64 best key of each part of the vocabulary.
        arrivals: (rows,) int32 programs that have finished; zero between launches.
    """

    keys: torch.Tensor
    arrivals: torch.Tensor

    @classmethod
    def allocate(cls, rows: int, vocab: int, device: torch.device | str = "cpu") -> BestTokensWorkspace:
        """Returns the workspace for `rows` rows (batch times nodes) of `vocab` logits."""
        blocks = min(-(-vocab // VOCABULARY_BLOCK), max(1, PROGRAMS // rows))
        return cls(
            torch.zeros(rows, blocks, dtype=torch.int64, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
        )


def best_tokens(
    logits: torch.Tensor, workspace: BestTokensWorkspace | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the (batch, nodes) int64 most likely tokens; ties go to the lowest.

    Args:
        logits: (batch, nodes, vocab), the last dimension contiguous, without NaN.
        workspace: of :meth:`BestTokensWorkspace.allocate`; `None` makes one.
        out: (batch, nodes) int64, written and returned; `None` makes it.
    """
    if out is None:
        out = torch.empty(logits.shape[:2], dtype=torch.int64, device=logits.device)
    if unavailable(logits.device) is not None or logits.dtype == torch.float64:
        return best_tokens_reference(logits, workspace, out)
    vocab = logits.shape[-1]
    if workspace is None:
        workspace = BestTokensWorkspace.allocate(out.numel(), vocab, logits.device)
    blocks = workspace.keys.shape[1]
    best_tokens_kernel[(blocks, out.numel())](
        logits,
        workspace.keys,
        workspace.arrivals,
        out,
        vocab,
        logits.shape[1],
        *logits.stride()[:2],
        TILES=-(-vocab // (blocks * VOCABULARY_BLOCK)),
        BLOCK=VOCABULARY_BLOCK,
        BLOCKS=next_power_of_two(blocks),
        **overlap_options(logits.device),
    )
    return out


def best_tokens_reference(
    logits: torch.Tensor, workspace: BestTokensWorkspace | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns what :func:`best_tokens` returns, in plain PyTorch."""
    best = (logits == logits.amax(-1, keepdim=True)).to(torch.int8).argmax(-1)
    return best if out is None else out.copy_(best)


def accept_and_advance(
    chosen: torch.Tensor,
    tree: TreeTensors,
    stream_states: torch.Tensor | None,
    state: StepState,
    packed: torch.Tensor,
    path: torch.Tensor,
) -> None:
    """Finds the longest path whose every token is the one picked at its parent, and sets `state` to its end.

    The bonus token, picked at the last accepted node, becomes the root. `history` gains the emitted tokens, never past its end.
    `lengths` and `history` of a finished sequence stay.

    Where the last accepted node carries no streams, its nearest ancestor's that does are taken: those that guess what is still to
    come, moved to the front, zeros behind them.

    Args:
        chosen: (batch, nodes) int64 tokens that the target picks at each node.
        tree: the verified trees.
        stream_states: (batch, carriers, streams, width) of the first nodes, the last dimension contiguous; `None` if the state
            holds none.
        state: advanced in place.
        packed: (batch, depth + 2) int64, becomes: number of emitted tokens, the tokens, zeros.
        path: (batch, depth + 1) int64, becomes: accepted nodes, root first, the last one repeated. Deeper nodes are rejected.
    """
    if unavailable(chosen.device) is not None:
        accept_and_advance_reference(chosen, tree, stream_states, state, packed, path)
        return
    batch, nodes = chosen.shape
    held, strides = state.stream_states, (0, 0, 0)
    carriers, streams, width = 1, 0, 0
    if held is not None and stream_states is not None:
        carriers, streams, width = stream_states.shape[1:]
        strides = stream_states.stride()[:3]
    accept_kernel[(batch, 1 + streams * -(-width // STATE_BLOCK))](
        chosen,
        tree.tokens,
        tree.parents,
        tree.depths,
        tree.ancestors,
        stream_states,
        state.root,
        state.lengths,
        state.finished,
        held,
        state.history,
        state.base,
        packed,
        path,
        nodes,
        path.shape[1] - 1,
        carriers,
        streams,
        width,
        state.history.shape[1] if state.history is not None else 0,
        *strides,
        STREAMS=held is not None,
        HISTORY=state.history is not None,
        NODES=next_power_of_two(nodes),
        COLUMNS=next_power_of_two(packed.shape[1]),
        BLOCK=STATE_BLOCK,
        **overlap_options(chosen.device),
    )


def accept_and_advance_reference(
    chosen: torch.Tensor,
    tree: TreeTensors,
    stream_states: torch.Tensor | None,
    state: StepState,
    packed: torch.Tensor,
    path: torch.Tensor,
) -> None:
    """Does what :func:`accept_and_advance` does, in plain PyTorch, one sequence at a time."""
    packed.zero_()
    for row, picked in enumerate(chosen.tolist()):
        tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
        paths = [[0]]
        for node, parent in enumerate(parents[1:], start=1):
            agrees = bool(paths[parent]) and tokens[node] == picked[parent]
            paths.append([*paths[parent], node] if agrees else [])
        accepted = max((nodes for nodes in paths if len(nodes) <= path.shape[1]), key=len)
        emitted = [picked[node] for node in accepted]
        count = len(accepted)
        packed[row, : count + 1] = torch.tensor([count, *emitted])
        path[row] = torch.tensor(accepted + accepted[-1:] * (path.shape[1] - count))
        length = int(state.lengths[row])
        state.base[row] = length
        state.root[row] = emitted[-1]
        if state.stream_states is not None and stream_states is not None:
            carrier = max(node for node in accepted if node < stream_states.shape[1])
            passed = count - 1 - accepted.index(carrier)
            left = stream_states[row, carrier, passed:]
            state.stream_states[row, : len(left)] = left
            state.stream_states[row, len(left) :] = 0
        if not state.finished[row]:
            state.lengths[row] = length + count
            if state.history is not None:
                room = state.history[row, length + 1 : length + 1 + count]
                room.copy_(torch.tensor(emitted)[: len(room)])


def commit_rows(
    block: torch.Tensor,
    path: torch.Tensor,
    packed: torch.Tensor,
    base: torch.Tensor,
    finished: torch.Tensor,
) -> None:
    """Copies the accepted rows of the last step to their positions, in place, in one launch.

    Row `base + path[i]` goes to slot `base + i`. Nothing but the accepted rows of sequences that still grow is written.

    Args:
        block: (layers, 2, batch, kv_heads, slots, head_dim) keys and values.
        path: (batch, depth + 1) int64 accepted nodes, root first, rising.
        packed: (batch, depth + 2) int64; column 0 is the number of accepted nodes.
        base: (batch,) int64 slot of the step's first row.
        finished: (batch,) bool sequences that are left alone.
    """
    if unavailable(block.device) is not None:
        commit_rows_reference(block, path, packed, base, finished)
        return
    layers, _, batch, heads, slots, size = block.shape
    commit_kernel[(layers * 2 * heads, batch)](
        block,
        path,
        packed,
        base,
        finished,
        heads,
        slots,
        path.shape[1],
        *block.stride()[:5],
        SIZE=size,
        LANES=next_power_of_two(size),
        ROWS=next_power_of_two(path.shape[1]),
        **overlap_options(block.device),
    )


def commit_rows_reference(
    block: torch.Tensor, path: torch.Tensor, packed: torch.Tensor, base: torch.Tensor, finished: torch.Tensor
) -> None:
    """Does what :func:`commit_rows` does, in plain PyTorch, row by row."""
    slots = block.shape[4]
    for row, nodes in enumerate(path.tolist()):
        if finished[row]:
            continue
        start = int(base[row])
        for place in range(1, int(packed[row, 0])):
            if start + nodes[place] < slots:
                block[:, :, row, :, start + place] = block[:, :, row, :, start + nodes[place]]
