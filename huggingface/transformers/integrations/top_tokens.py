"""The best tokens of a large vocabulary for a handful of rows, for Triton kernels.

Beside the scores stand the maxima of every group of tokens and of every block of groups. The best W tokens lie in the W blocks
with the largest maxima, there in the W groups with the largest: what is outside is beaten by W maxima. So the descent compares
some dozens of candidates a step instead of sorting thousands, and it is exact::

    blocks      .9  .2  .7  .1        W = 2: descend into .9 and .7
    groups      .9 .4  .7 .6          into .9 and .7 again
    tokens      .9 .8  .7 .1          .9 and .8

Groups that tie are taken in their order, which is the order of their lowest tokens.
"""

from __future__ import annotations

from .sortable_keys import bits_score, sortable_bits
from .triton_support import jit, tl

NO_MEMBER = tl.constexpr(0x7FFFFFFF) if tl is not None else 0x7FFFFFFF
TAKEN = tl.constexpr(-0x80000000) if tl is not None else -0x80000000
"""Below the bits of every score, -inf included."""


def floats_needed(blocks: int, block: int, group: int) -> int:
    """Returns the float32 numbers that :func:`store_scores` writes for one row."""
    return blocks * (block + block // group + 1)


@jit
def store_scores(
    scores, table, block, BLOCK: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr
):
    """Stores one block's scores and their maxima, and returns the block's maxima (ROWS,).

    Args:
        scores: (BLOCK, ROWS) float32; -inf for what is no token.
        table: of the first row; the rows follow each other.
        block: its number.
        BLOCK, GROUP: tokens of a block and of a group, powers of two; equal if blocks are not divided.
        BLOCKS: blocks of the vocabulary.
    """
    row = tl.arange(0, ROWS) * (BLOCKS * (BLOCK + BLOCK // GROUP + 1))
    token = block * BLOCK + tl.arange(0, BLOCK)
    tl.store(table + row[None, :] + token[:, None], scores)
    table += BLOCKS * BLOCK
    if BLOCK > GROUP:
        scores = tl.max(tl.reshape(scores, (BLOCK // GROUP, GROUP, ROWS)), axis=1)
        group = block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        tl.store(table + row[None, :] + group[:, None], scores)
    best = tl.max(scores, axis=0)
    tl.store(table + BLOCKS * (BLOCK // GROUP) + row + block, best)
    return best


@jit
def top_tokens(
    table,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Returns scores and tokens of the best `WIDTH` of each row, (ROWS, WIDTH) each, best first; -inf where there are fewer.

    Args:
        table: what :func:`store_scores` stored.
        BLOCK, GROUP, BLOCKS, ROWS: as there.
        PADDED: the power of two from `BLOCKS` and `WIDTH` on.
        WIDTH: a power of two.
    """
    tokens = table + tl.arange(0, ROWS)[:, None] * (BLOCKS * (BLOCK + BLOCK // GROUP + 1))
    groups = tokens + BLOCKS * BLOCK
    maxima = groups + BLOCKS * (BLOCK // GROUP)
    score, best = _best_members(maxima, tl.arange(0, ROWS)[:, None] * 0, BLOCKS, PADDED, ROWS, 1, WIDTH)
    if BLOCK > GROUP:
        EACH: tl.constexpr = BLOCK // GROUP
        score, best = _best_members(groups, best, BLOCKS * EACH, EACH, ROWS, WIDTH, WIDTH)
    return _best_members(tokens, best, BLOCKS * BLOCK, GROUP, ROWS, WIDTH, WIDTH)


@jit
def _best_members(
    segment,
    above,
    limit,
    EACH: tl.constexpr,
    ROWS: tl.constexpr,
    ABOVE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Returns scores and numbers of the best members, best first: (ROWS, WIDTH) each.

    One maximum after the other is taken. The compiler deals out the contiguous dimension to the threads of a warp and then the
    first to the warps, so in this shape a row's candidates are held by one warp, and its rounds wait for no other.

    Args:
        segment: (ROWS, 1) of the members' numbers from 0 on.
        above: (ROWS, ABOVE) groups to look into.
        limit: members there are.
        EACH: members of a group.
    """
    LANES: tl.constexpr = min(32, ABOVE * EACH)
    PIECES: tl.constexpr = ABOVE * EACH // LANES
    member = above[:, :, None] * EACH + tl.arange(0, EACH)[None, None, :]
    member = tl.max_contiguous(tl.reshape(member, (ROWS, PIECES, LANES)), (1, 1, min(EACH, LANES)))
    score = tl.load(
        segment[:, :, None] + member, mask=member < limit, other=float("-inf"), cache_modifier=".cg"
    )
    bits = sortable_bits(score)
    place = tl.arange(0, WIDTH)[None, :]
    best = tl.zeros((ROWS, WIDTH), tl.int32)
    number = tl.zeros((ROWS, WIDTH), tl.int32)
    for i in tl.static_range(WIDTH):
        # Whole numbers of 32 bits: a warp finds their maximum in one instruction.
        largest = tl.max(tl.max(bits, axis=1), axis=1)
        first = tl.where(bits == largest[:, None, None], member, NO_MEMBER)
        first = tl.min(tl.min(first, axis=1), axis=1)
        best = tl.where(place == i, largest[:, None], best)
        number = tl.where(place == i, first[:, None], number)
        bits = tl.where(member == first[:, None, None], TAKEN, bits)
    return bits_score(best), number
