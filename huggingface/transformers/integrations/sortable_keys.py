"""A score and its token as one integer, and sorted lists of such keys, for Triton kernels.

Keys sort by score and then by lower token, so that a maximum over keys is at once a choice of the best token and the rule for
ties. The best few of many are found by networks of comparisons between registers, not by taking one maximum after the other: a
round of the latter crosses all threads, and its rounds wait for each other. Lists stand in the columns of a table, and
neighbouring columns are sorted in opposite directions, so that the larger of the two in every row are the best of both::

    9 1        9
    7 2   ->   7    and these, first rising, then falling or the reverse, take few exchanges to be sorted again
    4 8        8
"""

from __future__ import annotations

from .triton_support import jit, tl


@jit
def sortable_key(score, token):
    """Returns int64 keys whose order is (score, then lower token)."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # zeros of both signs tie
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@jit
def key_token(key):
    """Returns the token of a key."""
    return (0x7FFFFFFF - (key & 0x7FFFFFFF)).to(tl.int32)


@jit
def key_score(key):
    """Returns the score of a key."""
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _exchange(lists, BIT: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Puts the larger first of every two rows whose numbers differ in one bit."""
    APART: tl.constexpr = 1 << BIT
    pairs = tl.reshape(lists, (SIZE // APART // 2, 2, APART, COLUMNS))
    larger = tl.max(pairs, axis=1, keep_dims=True)
    smaller = tl.min(pairs, axis=1, keep_dims=True)
    first = tl.reshape(tl.arange(0, 2), (1, 2, 1, 1)) == 0
    return tl.reshape(tl.where(first, larger, smaller), (SIZE, COLUMNS))


@jit
def _reverse_odd(lists, BIT: tl.constexpr, BY_ROW: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Turns the order of the keys around in every other group of rows or columns; twice is as before."""
    number = tl.arange(0, SIZE)[:, None] if BY_ROW else tl.arange(0, COLUMNS)[None, :]
    return lists ^ -((number >> BIT) & 1).to(tl.int64)


@jit
def _finish_sort(lists, LISTS: tl.constexpr, LOG_SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Sorts columns that rise and then fall, or the reverse: even ones to fall, odd ones to rise; a single list falls."""
    SIZE: tl.constexpr = 1 << LOG_SIZE
    if LISTS > 1:
        lists = _reverse_odd(lists, 0, False, SIZE, COLUMNS)
    for step in tl.static_range(LOG_SIZE):
        lists = _exchange(lists, LOG_SIZE - 1 - step, SIZE, COLUMNS)
    if LISTS > 1:
        lists = _reverse_odd(lists, 0, False, SIZE, COLUMNS)
    return lists


@jit
def sort_lists(lists, LISTS: tl.constexpr, LOG_SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the columns of (1 << LOG_SIZE, COLUMNS), sorted; `LISTS` neighbours will be merged."""
    SIZE: tl.constexpr = 1 << LOG_SIZE
    for stage in tl.static_range(1, LOG_SIZE):
        lists = _reverse_odd(lists, stage, True, SIZE, COLUMNS)
        for step in tl.static_range(stage):
            lists = _exchange(lists, stage - 1 - step, SIZE, COLUMNS)
        lists = _reverse_odd(lists, stage, True, SIZE, COLUMNS)
    return _finish_sort(lists, LISTS, LOG_SIZE, COLUMNS)


@jit
def merge_lists(lists, LOG_LISTS: tl.constexpr, LOG_SIZE: tl.constexpr, ROWS: tl.constexpr):
    """Returns the best of every `1 << LOG_LISTS` neighbouring columns: (1 << LOG_SIZE, ROWS), falling.

    Args:
        lists: (1 << LOG_SIZE, ROWS << LOG_LISTS) int64; even columns fall, odd ones rise, single ones fall.
        LOG_LISTS, LOG_SIZE: binary logarithms of the lists to merge and of their length.
        ROWS: merged lists.
    """
    for stage in tl.static_range(LOG_LISTS):
        lists = _halve(lists, 1 << (LOG_LISTS - 1 - stage), LOG_SIZE, ROWS << (LOG_LISTS - 1 - stage))
    return lists


@jit
def _halve(lists, LISTS: tl.constexpr, LOG_SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    pairs = tl.reshape(lists, (1 << LOG_SIZE, COLUMNS, 2))
    return _finish_sort(tl.max(pairs, axis=2), LISTS, LOG_SIZE, COLUMNS)


@jit
def join_lists(lists, others, LISTS: tl.constexpr, LOG_SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns column by column the best of two tables whose columns are sorted in opposite directions, sorted as `lists`."""
    return _finish_sort(tl.maximum(lists, others), LISTS, LOG_SIZE, COLUMNS)


@jit
def count_larger(keys, COUNT: tl.constexpr, AT_ONCE: tl.constexpr):
    """Returns how many of `keys` (COUNT,) are larger than each; compares with `AT_ONCE` of them at a time."""
    if AT_ONCE >= COUNT:
        larger = tl.sum((keys[None, :] > keys[:, None]).to(tl.int32), axis=1)
    else:
        # The whole table of comparisons does not fit into registers.
        PARTS: tl.constexpr = COUNT // AT_ONCE
        parts = tl.reshape(keys, (PARTS, AT_ONCE))
        part = tl.arange(0, PARTS)[:, None]
        larger = tl.zeros((COUNT,), tl.int32)
        for i in range(PARTS):
            rivals = tl.sum(tl.where(part == i, parts, 0), axis=0)
            larger += tl.sum((rivals[None, :] > keys[:, None]).to(tl.int32), axis=1)
    return larger
