"""A score and its token as one integer, for Triton kernels.

Keys sort by score and then by lower token, so that a maximum over keys is at once a choice of the best token and the rule for
ties.
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
