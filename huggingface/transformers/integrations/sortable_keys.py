"""A score and its number as one integer, for Triton kernels.

Keys sort by score and then by lower number, so that a comparison of keys is at once a choice of the best and the rule for ties.
"""

from __future__ import annotations

from .triton_support import jit, tl


@jit
def sortable_bits(score):
    """Returns int32 numbers in the order of float32 scores."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # zeros of both signs tie
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def bits_score(bits):
    """Returns the scores of such numbers."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def sortable_key(score, token):
    """Returns int64 keys whose order is (score, then lower token)."""
    return (sortable_bits(score).to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@jit
def key_token(key):
    """Returns the token of a key."""
    return (0x7FFFFFFF - (key & 0x7FFFFFFF)).to(tl.int32)


@jit
def key_score(key):
    """Returns the score of a key."""
    return bits_score((key >> 32).to(tl.int32))


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
