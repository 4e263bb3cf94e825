"""What the rows of a step begin with: embedded tokens at the bottom, and stream rows where the stream layers begin.

Apart, these are half a dozen launches for a few kilobytes; here each is one, which starts while the kernel in front ends.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .triton_support import (
    jit,
    overlap_options,
    release_dependents,
    tl,
    triton,
    unavailable,
    wait_for_inputs,
)

BLOCK = 1024
"""Features that a program writes."""


def embed_nodes(
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    depths: torch.Tensor,
    limit: int,
    token_table: torch.Tensor,
    position_table: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the nodes' input states (batch, nodes, hidden) and their positions (batch, nodes) int64.

    A node's position is `length + depth`, `limit - 1` at most: a sequence at its end must not run past the last position, and
    what it says there is dropped.

    Args:
        tokens: (batch, nodes) int64, contiguous.
        lengths: (batch,) int64 committed rows.
        depths: (batch, nodes) int32, contiguous.
        limit: positions there are.
        token_table: (vocab, hidden), contiguous.
        position_table: (limit or more, hidden), likewise, added to the tokens' rows; `None` where positions are not embedded.
    """
    if token_table.dtype == torch.float64 or unavailable(tokens.device) is not None:
        return embed_nodes_reference(tokens, lengths, depths, limit, token_table, position_table)
    batch, nodes = tokens.shape
    features = token_table.shape[1]
    hidden = token_table.new_empty(batch, nodes, features)
    positions = torch.empty_like(tokens)
    _embed_kernel[(nodes, batch, triton.cdiv(features, BLOCK))](
        tokens,
        lengths,
        depths,
        token_table,
        token_table if position_table is None else position_table,
        hidden,
        positions,
        nodes,
        limit,
        features,
        HAS_POSITIONS=position_table is not None,
        BLOCK=BLOCK,
        **overlap_options(tokens.device),
    )
    return hidden, positions


def embed_nodes_reference(
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    depths: torch.Tensor,
    limit: int,
    token_table: torch.Tensor,
    position_table: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what :func:`embed_nodes` returns, by plain operations."""
    positions = (lengths[:, None] + depths).clamp(max=limit - 1)
    hidden = F.embedding(tokens, token_table)
    if position_table is not None:
        hidden = hidden + F.embedding(positions, position_table)
    return hidden, positions


def start_streams(hidden: torch.Tensor, offsets: torch.Tensor, carriers: int) -> torch.Tensor:
    """Returns (batch, nodes + carriers * streams, hidden): the nodes' rows, then the streams of the first, begun as they are.

    Args:
        hidden: (batch, nodes, hidden) below the stream layers, contiguous.
        offsets: (streams, hidden) what each stream adds to its node's row, contiguous.
        carriers: first nodes that carry streams.
    """
    if hidden.dtype == torch.float64 or unavailable(hidden.device) is not None:
        return start_streams_reference(hidden, offsets, carriers)
    batch, nodes, features = hidden.shape
    streams = len(offsets)
    rows = hidden.new_empty(batch, nodes + carriers * streams, features)
    _start_kernel[(rows.shape[1], batch, triton.cdiv(features, BLOCK))](
        hidden,
        offsets,
        rows,
        nodes,
        streams,
        features,
        BLOCK=BLOCK,
        **overlap_options(hidden.device),
    )
    return rows


def start_streams_reference(hidden: torch.Tensor, offsets: torch.Tensor, carriers: int) -> torch.Tensor:
    """Returns what :func:`start_streams` returns, by plain operations."""
    started = (hidden[:, :carriers, None] + offsets).flatten(1, 2)
    return torch.cat([hidden, started], dim=1)


@jit
def _embed_kernel(
    tokens,
    lengths,
    depths,
    token_table,
    position_table,
    hidden,
    positions,
    nodes,
    limit,
    features,
    HAS_POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (nodes, batch, parts of the features)."""
    release_dependents(PDL)
    row = tl.program_id(1).to(tl.int64)
    node = row * nodes + tl.program_id(0)
    feature = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < features
    wait_for_inputs(PDL)
    position = tl.minimum(tl.load(lengths + row) + tl.load(depths + node), limit - 1)
    value = tl.load(token_table + tl.load(tokens + node) * features + feature, mask=inside)
    if HAS_POSITIONS:
        added = tl.load(position_table + position * features + feature, mask=inside)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)
    tl.store(hidden + node * features + feature, value, mask=inside)
    if tl.program_id(2) == 0:
        tl.store(positions + node, position)


@jit
def _start_kernel(hidden, offsets, rows, nodes, streams, features, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid (rows, batch, parts of the features)."""
    release_dependents(PDL)
    row = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    feature = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < features
    beyond = tl.maximum(row - nodes, 0)
    of_stream = inside & (row >= nodes)
    offset = tl.load(offsets + (beyond % streams) * features + feature, mask=of_stream, other=0.0)
    node = tl.where(row < nodes, row, beyond // streams)
    wait_for_inputs(PDL)
    value = tl.load(hidden + (batch * nodes + node) * features + feature, mask=inside)
    value = (value.to(tl.float32) + offset.to(tl.float32)).to(value.dtype)
    tl.store(rows + (batch * tl.num_programs(0) + row) * features + feature, value, mask=inside)
