"""Drafting from the context: what followed the last few tokens when they occurred before.

Names in a dialogue and columns of a schema come back word for word. The longest repeated ending counts, and of places that repeat
equally much the latest; so one pass over the history that ranks every place by (repeated tokens, position) finds it.
"""

from __future__ import annotations

import torch

from .triton_support import jit, overlaps_launches, release_dependents, tl, unavailable, wait_for_inputs

BLOCK = 2048
"""Positions compared at once: 8 for each of 256 threads, so that a usual context takes one or two rounds."""
SHORTEST_NGRAM = 2
"""Tokens that must repeat; one repeated token says too little."""


def lookup_continuation(
    history: torch.Tensor,
    lengths: torch.Tensor,
    root: torch.Tensor,
    out: torch.Tensor,
    longest_ngram: int = 3,
) -> None:
    """Writes the tokens that followed the latest earlier occurrence of the last tokens.

    Tried are the last `longest_ngram` tokens, then one less, down to :data:`SHORTEST_NGRAM`.

    Args:
        history: (batch, capacity) int64 tokens by position.
        lengths: (batch,) int64 position of the last known token, the root.
        root: (batch,) int64 last known tokens.
        out: (batch, length) int64, becomes: the continuation; -1 from where nothing is known on.
        longest_ngram: most tokens that are compared.
    """
    if unavailable(history.device) is not None:
        lookup_continuation_reference(history, lengths, root, out, longest_ngram)
        return
    batch, capacity = history.shape
    pdl = overlaps_launches(history.device)
    options = {"launch_pdl": True} if pdl else {}
    _lookup_kernel[(batch,)](
        history,
        lengths,
        root,
        out,
        capacity,
        out.shape[1],
        LONGEST=longest_ngram,
        SHORTEST=SHORTEST_NGRAM,
        BLOCK=BLOCK,
        COLUMNS=1 << (out.shape[1] - 1).bit_length(),
        PDL=pdl,
        num_warps=8,
        **options,
    )


def lookup_continuation_reference(
    history: torch.Tensor,
    lengths: torch.Tensor,
    root: torch.Tensor,
    out: torch.Tensor,
    longest_ngram: int = 3,
) -> None:
    """Does what :func:`lookup_continuation` does, in plain Python, one sequence at a time."""
    out.fill_(-1)
    for row, tokens in enumerate(history.tolist()):
        known = [*tokens[: int(lengths[row])], int(root[row])]
        following = _following(known, longest_ngram)[: out.shape[1]]
        out[row, : len(following)] = torch.tensor(following, dtype=torch.int64)


def _following(known: list[int], longest: int) -> list[int]:
    for size in range(longest, SHORTEST_NGRAM - 1, -1):
        for start in range(len(known) - size - 1, -1, -1):
            if known[start : start + size] == known[-size:]:
                return known[start + size :]
    return []


@jit
def _lookup_kernel(
    history,
    lengths,
    root,
    out,
    capacity,
    length,
    LONGEST: tl.constexpr,
    SHORTEST: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (batch,). A place is named by the position of the last repeated token."""
    release_dependents(PDL)
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    tokens = history + row * capacity
    end = tl.minimum(tl.load(lengths + row), capacity).to(tl.int32)
    final = tl.load(root + row)
    # (repeated tokens, position) in one number; 0 for no place.
    best = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, end, BLOCK):
        position = start + tl.arange(0, BLOCK)
        same = tl.load(tokens + position, mask=position < end, other=-1) == final
        same = same & (position < end)
        repeated = same.to(tl.int32)
        for back in tl.static_range(1, LONGEST):
            earlier = tl.load(tokens + position - back, mask=same & (position >= back), other=-1)
            wanted = tl.load(tokens + end - back, mask=end >= back, other=-2)
            same = same & (earlier == wanted)  # tokens are not negative, so what is missing differs
            repeated += same.to(tl.int32)
        found = (repeated.to(tl.int64) << 32) | position.to(tl.int64)
        best = tl.maximum(best, tl.where(repeated >= SHORTEST, found, 0))
    place = tl.max(best, axis=0)
    column = tl.arange(0, COLUMNS)
    source = (place & 0x7FFFFFFF).to(tl.int32) + 1 + column
    copied = tl.load(tokens + source, mask=(place > 0) & (source < end), other=-1)
    copied = tl.where((place > 0) & (source == end), final, copied)
    tl.store(out + row * length + column, copied, mask=column < length)
