"""Attention masks from positions, for trees of tokens as well as for plain sequences.

Upstream derives masks from cache slots. In a draft tree two siblings share a position but not a slot, so a local window
counted in slots drops the wrong keys; here every window is counted in positions.

A mask is first a boolean *visibility* (True = may attend) and only at the end becomes what an attention function takes
(:func:`attention_mask_from`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def visible_between(
    query_positions: torch.Tensor, key_positions: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """Returns which keys each query may see in a causal sequence, by position.

    Args:
        query_positions: (batch or 1, queries) int64.
        key_positions: (batch or 1, keys) int64.
        window: a query sees keys at most `window - 1` positions behind it; `None` means no limit.

    Returns:
        Bool, (batch or 1, 1, queries, keys).
    """
    distance = query_positions[:, None, :, None] - key_positions[:, None, None, :]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def visible_in_step(
    block: torch.Tensor,
    positions: torch.Tensor,
    lengths: torch.Tensor,
    base: int,
    window: int | None = None,
    ragged: bool = True,
) -> torch.Tensor:
    """Returns what the rows of one decode step see: the committed cache first, then each other.

    Key slots are `[0, base)` for committed rows (slot = position) and `[base, base + rows)` for the rows of this step::

        slot       0 1 2 3 4 | 5 6 7
        row 0 (root)  x x x x x | x . .
        row 1 (child) x x x x x | x x .
        row 2 (child) x x x x x | x . x

    Args:
        block: (batch or 1, 1, rows, rows) bool, what the rows see of each other.
        positions: (batch, rows) int64 positions of the rows.
        lengths: (batch,) int64 committed rows of each sequence; slots from there to `base` hold nothing valid.
        base: first slot of this step's rows, the largest of `lengths`.
        window: local window in positions, or `None`.
        ragged: False promises that all `lengths` equal `base`.

    Returns:
        Bool, (batch or 1, 1, rows, base + rows).
    """
    if window is None and not ragged:
        return F.pad(block, (base, 0), value=True)
    slots = torch.arange(base, device=positions.device)
    committed = (slots < lengths[:, None])[:, None, None, :].expand(-1, 1, positions.shape[1], -1)
    visible = torch.cat([committed, block.expand(positions.shape[0], -1, -1, -1)], dim=-1)
    if window is None:
        return visible
    key_positions = torch.cat([slots.expand(positions.shape[0], -1), positions], dim=1)
    return visible & (positions[:, None, :, None] - key_positions[:, None, None, :] < window)


def attention_mask_from(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the additive mask that upstream's `sdpa` and `eager` functions both take.

    Additive rather than boolean because SDPA would turn a boolean mask into this one again in every layer. Hidden keys get a
    large number, not the dtype's largest: kernels scale scores to base 2, and where a whole tile of keys is hidden, as behind a
    local window, an overflow to infinity minus itself is NaN.

    Args:
        visible: bool, (batch or 1, 1, queries, keys).
        dtype: floating dtype of the queries.
    """
    hidden = max(-1e9, torch.finfo(dtype).min / 4)
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, hidden)


def visible_with_streams(
    positions: torch.Tensor, anchors: torch.Tensor, streams: int, window: int | None = None
) -> torch.Tensor:
    """Returns what rows see where a causal sequence is followed by the streams of some of its rows.

    Rows are the `seq` tokens, then `streams` rows of each anchor, anchor by anchor. With 3 tokens, one anchor (token 1) and
    2 streams::

                 t0 t1 t2 s1 s2
        t0       x
        t1       x  x
        t2       x  x  x
        s1 of t1 x  x     x
        s2 of t1 x  x     x  x

    Args:
        positions: (1, seq) int64 positions of the tokens.
        anchors: (batch, anchors) int64 indices of the tokens that carry streams.
        streams: stream rows of each anchor.
        window: local window in positions, or `None`. A stream row's position is its anchor's plus its stream's number.

    Returns:
        Bool, (batch, 1, rows, rows) with rows = seq + anchors * streams.
    """
    batch, count = anchors.shape
    rows = count * streams
    owner = torch.arange(count, device=anchors.device).repeat_interleave(streams)
    number = torch.arange(1, streams + 1, device=anchors.device).repeat(count)
    anchor_positions = positions.expand(batch, -1).gather(1, anchors)[:, owner]
    stream_positions = anchor_positions + number
    main = visible_between(positions, positions, window).expand(batch, -1, -1, -1)
    on_main = anchor_positions[:, None, :, None] >= positions[:, None, None, :]
    if window is not None:
        on_main = on_main & (stream_positions[:, None, :, None] - positions[:, None, None, :] < window)
    siblings = (owner[:, None] == owner) & (number[:, None] >= number)
    upper = torch.cat([main, main.new_zeros(batch, 1, main.shape[2], rows)], dim=-1)
    lower = torch.cat([on_main, siblings.expand(batch, 1, rows, rows)], dim=-1)
    return torch.cat([upper, lower], dim=2)
