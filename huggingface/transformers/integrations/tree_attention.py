"""Attention of one decode step over a static KV cache: plain decoding, draft trees and prefill in one kernel.

A step has node rows (tokens) and, with speculative streams, stream rows that look further ahead from a node. The cache holds the
committed rows; the step's own keys are read from the projection that made them, never from the cache, so that writing them there
needs no order between programs::

    tree, 3 nodes (0 -> 1, 0 -> 2), 1 stream        sequence, 3 nodes, 2 streams of anchor 1

          committed   0 1 2  s0 s1 s2                     committed   0 1 2  s1 s2
      0   x x x x     x                               0   x x x x     x
      1   x x x x     x x                             1   x x x x     x x
      2   x x x x     x   x                           2   x x x x     x x x
      s0  x x x x     x      x                        s1  x x x x     x x    x
      s1  x x x x     x x       x                     s2  x x x x     x x    x  x
      s2  x x x x     x   x        x

At batch 1 there are fewer heads than multiprocessors, so the committed keys are split among programs (flash decoding). How many
keys there are is known on the device alone: the number of programs is fixed by the capacity, what each of them reads is not.
Whichever program of a head arrives last merges the parts, always in the same order, so results do not depend on timing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from huggingface.transformers.integrations.rotary import apply_rotary_, apply_rotary_reference_
from huggingface.transformers.integrations.row_attention import (
    padded,
    processors,
    row_attention,
    serves,
    workspace_sizes,
)
from huggingface.transformers.integrations.tree_attention_kernel import tree_attention_kernel
from huggingface.transformers.integrations.triton_support import overlaps_launches, unavailable

KEYS_PER_SPLIT = 128
"""Fewer keys than this at full capacity are not worth a program and a part to merge."""


@dataclass(frozen=True)
class StepRows:
    """Rows of a step: first the token rows, then the stream rows of the carriers (tree) or of one anchor (sequence).

    The carriers of a tree are its first nodes. Stream j (1 ... streams) of node n is row `nodes + n * streams + j - 1` of a tree;
    stream j of the anchor is row `nodes + j - 1` of a sequence.

    Attributes:
        nodes: Token rows; at most 64 in a tree.
        streams: Stream rows of a carrier or of the anchor.
        ancestors: (batch, nodes) int64. Bit i is set if node i lies on the way from the root to this node, itself included.
            `None`: the rows are a sequence, row i sees rows 0 ... i.
        depths: (batch, nodes) int32, distance from the root; trees only.
        anchors: (batch,) int64, the row that carries the streams; sequences with streams only.
        carriers: Nodes with streams, of a tree; `None`: all.
    """

    nodes: int
    streams: int = 0
    ancestors: torch.Tensor | None = None
    depths: torch.Tensor | None = None
    anchors: torch.Tensor | None = None
    carriers: int | None = None

    def __post_init__(self) -> None:
        if self.ancestors is not None and (self.nodes > 64 or self.depths is None):
            raise ValueError(f"a tree needs depths and at most 64 nodes, got {self.nodes}")
        if self.ancestors is None and self.streams and self.anchors is None:
            raise ValueError("streams of a sequence need the row that carries them, got no anchors")
        if self.carriers is not None and (self.ancestors is None or not 1 <= self.carriers <= self.nodes):
            raise ValueError(f"carriers are some of the {self.nodes} nodes of a tree, got {self.carriers}")

    @property
    def total(self) -> int:
        """Token rows and stream rows together."""
        carriers = 1 if self.ancestors is None else self.carriers or self.nodes
        return self.nodes + self.streams * carriers


@dataclass(frozen=True)
class _Partition:
    """How a step is divided among programs: blocks of rows, and parts of the keys (the step's own, splits of the committed)."""

    block_rows: int
    row_blocks: int
    parts: int


class _Size(NamedTuple):
    """What decides how a step is divided among programs."""

    batch: int
    rows: int
    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    itemsize: int
    device: torch.device

    @property
    def is_row(self) -> bool:
        """Whether the kernel for one row serves the step."""
        return self.rows == 1 and serves(self.heads // self.kv_heads, self.slots)


def _partition(size: _Size) -> _Partition:
    packed = size.rows * (size.heads // size.kv_heads)
    # Sixteen rows are the least a tensor core multiplies. At few rows a step waits for memory, so many small programs are better
    # than few large ones; a long prompt computes, and rather shares its keys. (H200, 320 and 1,500 committed keys, heads of 128:
    # 40 rows take 8.9 us in blocks of 16 and 15.4 us in blocks of 64. 224 rows, 400 keys: 13.9 us in blocks of 64 and 21.4 in
    # blocks of 32 with heads of 128, but 10.2 in blocks of 32 with heads of 64.)
    large = 128 if padded(size.head_dim) > 64 else 256
    block_rows = 16 if packed <= 64 else 32 if packed < large else 64
    if size.itemsize == 4 and padded(size.head_dim) > 64:
        # Float32 has no tensor core and keeps whole operands in registers.
        block_rows = min(block_rows, 32)
    row_blocks = -(-packed // block_rows)
    # Merging the parts of a block is one program's work: large blocks want fewer programs and more keys in a part.
    waves, keys = (3, KEYS_PER_SPLIT) if block_rows < 64 else (2, 4 * KEYS_PER_SPLIT)
    room = waves * processors(size.device) // (size.batch * size.kv_heads * row_blocks)
    # A power of two keeps the number of compiled variants small when the number of rows varies (prefill).
    parts = 1 << (max(1, min(room, size.slots // keys + 1)).bit_length() - 1)
    return _Partition(block_rows, row_blocks, parts)


def _tiles(block_rows: int, head_dim: int, itemsize: int) -> tuple[int, int, int]:
    """Returns the keys of a block, the warps of a program and the stages of its pipeline: the largest that spill no registers."""
    width = padded(head_dim)
    if itemsize == 4:
        if block_rows == 16:
            return (32, 4, 2) if width <= 64 else (16, 4, 2)
        return 16, 8, 1
    if block_rows == 32:
        # Two warps are 7 % faster, but spill with heads of more than 64.
        return 32, 2 if width <= 64 else 4, 3
    if block_rows == 64 and width > 64:
        return 32, 4, 3
    # Three stages of keys and values fit the 99 KB of sm_86 up to a width of 64.
    return 64, 4, 3 if width <= 64 else 2


@dataclass(frozen=True)
class AttentionWorkspace:
    """Buffers of the parts' results. One serves any steps that are launched one after the other and are no larger.

    Attributes:
        partials: (elements,) float32, per part: unnormalised outputs, then maxima and sums of the rows.
        arrivals: (blocks,) int32, parts that have arrived per (batch row, kv head, row block); zero between launches.
    """

    partials: torch.Tensor
    arrivals: torch.Tensor

    @classmethod
    def for_step(
        cls,
        batch: int,
        rows: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        slots: int,
        device: torch.device,
    ) -> AttentionWorkspace:
        """Returns the workspace of steps of at most `rows` rows (nodes and streams) over `slots` slots, of any dtype."""
        # Not the longest step needs most: it has so many blocks that its keys are not split.
        sizes = [
            _workspace_sizes(_Size(batch, count, heads, kv_heads, head_dim, slots, itemsize, device))
            for count in range(1, rows + 1)
            for itemsize in (2, 4)
        ]
        blocks, elements = (max(size) for size in zip(*sizes, strict=True))
        return cls(
            torch.empty(elements, dtype=torch.float32, device=device),
            torch.zeros(blocks, dtype=torch.int32, device=device),
        )

    def check(self, blocks: int, elements: int) -> None:
        """Raises `ValueError` if the workspace is too small for a step."""
        if self.arrivals.numel() < blocks or self.partials.numel() < elements:
            raise ValueError(
                f"the workspace has {self.arrivals.numel()} blocks and {self.partials.numel()} elements, the step needs "
                f"{blocks} and {elements}; make it with AttentionWorkspace.for_step for the largest step"
            )


def _workspace_sizes(size: _Size) -> tuple[int, int]:
    """Returns the blocks and the float32 numbers of a step's parts."""
    if size.is_row:
        return workspace_sizes(size.batch * size.heads, size.head_dim, size.slots, size.device)
    partition = _partition(size)
    if partition.parts == 1:
        return 0, 0
    blocks = size.batch * size.kv_heads * partition.row_blocks
    return blocks, blocks * partition.parts * partition.block_rows * (padded(size.head_dim) + 2)


def tree_attention_reference(
    projected: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    rows: StepRows,
    scaling: float,
    window: int | None = None,
    workspace: AttentionWorkspace | None = None,
    out: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    settled: bool = False,
) -> torch.Tensor:
    """Does what `tree_attention` does, batch row by batch row in plain PyTorch; reads the lengths on the host."""
    batch, kv_heads, slots, head_dim = keys.shape
    heads = projected.shape[-1] // head_dim - 2 * kv_heads
    if rotary is not None:
        apply_rotary_reference_(projected, *rotary, heads, kv_heads)
    result = torch.empty_like(projected[..., : heads * head_dim]) if out is None else out
    for b in range(batch):
        length = min(int(lengths[b]), slots)
        per_head = projected[b].unflatten(-1, (-1, head_dim)).transpose(0, 1)
        query, key, value = per_head.split([heads, kv_heads, kv_heads])
        positions, fresh = _positions_and_visibility(rows, b)
        all_positions = torch.cat([torch.arange(length), int(lengths[b]) + positions])
        visible = torch.cat([torch.ones(rows.total, length, dtype=torch.bool), fresh], dim=1)
        if window is not None:
            behind = (int(lengths[b]) + positions)[:, None] - all_positions
            visible &= behind < window
        all_keys = torch.cat([keys[b, :, :length], key], dim=1).repeat_interleave(heads // kv_heads, dim=0)
        all_values = torch.cat([values[b, :, :length], value], dim=1).repeat_interleave(
            heads // kv_heads, dim=0
        )
        scores = (query @ all_keys.transpose(1, 2)).to(
            torch.promote_types(query.dtype, torch.float32)
        ) * scaling
        weights = scores.masked_fill(~visible.to(scores.device), -math.inf).softmax(-1).nan_to_num()
        result[b] = (weights.to(query.dtype) @ all_values).transpose(0, 1).flatten(1)
        written = max(0, min(rows.nodes, slots - length))
        keys[b, :, length : length + written] = key[:, :written]
        values[b, :, length : length + written] = value[:, :written]
    return result


def _positions_and_visibility(rows: StepRows, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the positions of a step's rows after the committed rows, and which of the rows (columns) each row sees."""
    if rows.ancestors is None or rows.depths is None:
        paths, depths = [(2 << node) - 1 for node in range(rows.nodes)], list(range(rows.nodes))
        carriers = [] if rows.anchors is None else [int(rows.anchors[b])]
    else:
        paths, depths = rows.ancestors[b].tolist(), rows.depths[b].tolist()
        carriers = list(range(rows.carriers or rows.nodes))
    places = [(node, 0) for node in range(rows.nodes)]
    places += [(carrier, stream) for carrier in carriers for stream in range(1, rows.streams + 1)]

    def sees(node: int, stream: int, other: int, other_stream: int) -> bool:
        if other_stream:
            return other == node and other_stream <= stream
        return bool(paths[node] >> other & 1)

    positions = torch.tensor([depths[node] + stream for node, stream in places])
    visible = torch.tensor([[sees(*row, *column) for column in places] for row in places])
    return positions, visible


def tree_attention(
    projected: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    rows: StepRows,
    scaling: float,
    window: int | None = None,
    workspace: AttentionWorkspace | None = None,
    out: torch.Tensor | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    settled: bool = False,
) -> torch.Tensor:
    """Returns the attention output of a step's rows and writes the node rows' keys and values into the cache.

    softmax(scaling * query . keys the row sees) . values, the softmax in float32. A row sees the committed rows, the nodes of its
    path, and, if it is stream j of a node, streams 1 ... j of that node. A node's position is its batch row's length plus its
    depth (sequence: plus its row), that of stream j is j further. A row that sees nothing gives zeros.

    Args:
        projected: (batch, rows, (heads + 2 * kv_heads) * head_dim), query, key and value of the rows side by side, contiguous;
            float16, bfloat16 or float32. Not to be read afterwards: queries and keys may have been rotated in place.
        keys: (batch, kv_heads, slots, head_dim) of the same dtype, the last dimension contiguous. Written in place: node row i
            goes to slot length + i, if there is one.
        values: Likewise.
        lengths: (batch,) int64, committed rows: slots 0 ... length - 1. Read on the device only.
        rows: What the rows are.
        scaling: Factor of the scores.
        window: A row sees keys at most `window - 1` positions behind it; `None`: all.
        workspace: Buffers for parts; made if not given.
        out: (batch, rows, heads * head_dim), contiguous, to write to; made if not given.
        rotary: cosines and sines as `apply_rotary_` takes them, for queries and keys that are not rotated yet.
        settled: lengths and committed rows were written before the kernel in front of this one started, so that a single row may
            read them while that runs.

    Raises:
        ValueError: The workspace is too small, or shapes do not fit.
    """
    batch, kv_heads, slots, head_dim = keys.shape
    heads = projected.shape[-1] // head_dim - 2 * kv_heads
    if projected.shape[1] != rows.total or heads < kv_heads or heads % kv_heads:
        raise ValueError(
            f"projected {tuple(projected.shape)} does not fit {rows.total} rows and keys {tuple(keys.shape)}; "
            "its last dimension must be (heads + 2 * kv_heads) * head_dim"
        )
    device = projected.device
    if unavailable(device) is not None:
        return tree_attention_reference(
            projected, keys, values, lengths, rows, scaling, window, workspace, out, rotary
        )
    if out is None:
        out = projected.new_empty(batch, rows.total, heads * head_dim)
    if workspace is None:
        workspace = AttentionWorkspace.for_step(batch, rows.total, heads, kv_heads, head_dim, slots, device)
    itemsize, scale = projected.dtype.itemsize, scaling * math.log2(math.e)
    size = _Size(batch, rows.total, heads, kv_heads, head_dim, slots, itemsize, device)
    workspace.check(*_workspace_sizes(size))
    buffers = workspace.partials, workspace.arrivals
    if size.is_row:
        row_attention(projected, keys, values, lengths, scale, window, rotary, settled, *buffers, out)
        return out
    if rotary is not None:
        apply_rotary_(projected, *rotary, heads, kv_heads)
    partition = _partition(size)
    block_keys, warps, stages = _tiles(partition.block_rows, head_dim, itemsize)
    tree_attention_kernel[(partition.parts * partition.row_blocks, kv_heads, batch)](
        projected, keys, values, lengths, rows.ancestors, rows.depths, rows.anchors, out, *buffers,
        rows.nodes, rows.total, slots, scale,
        *keys.stride()[:3], *values.stride()[:3],
        TREE=rows.ancestors is not None, STREAMS=rows.streams, WINDOW=window or 0, GROUP=heads // kv_heads,
        HEAD_DIM=head_dim, WIDTH=padded(head_dim), PARTS=partition.parts, BLOCK_M=partition.block_rows, BLOCK_N=block_keys,
        PDL=overlaps_launches(device), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
