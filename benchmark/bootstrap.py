"""Intervals by paired bootstrap: requests are drawn anew with replacement, the same draw for both techniques and all repeats.

A technique's speed on a draw is what the table shows: tokens over seconds, pooled over requests, median over repeats.
"""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
FEWEST_REQUESTS = 2

Table = Sequence[Sequence[float]]
Interval = tuple[float, float]


def speed_interval(tokens: Table, seconds: Table, seed: int) -> Interval | None:
    """Returns the 95 % interval of tokens/s.

    Args:
        tokens: output tokens by repeat and request.
        seconds: seconds, likewise.
        seed: seed of the draws.
    """
    draws = _draws(tokens, seed)
    return None if draws is None else _interval(_speeds(draws, tokens, seconds))


def ratio_interval(
    tokens: Table, seconds: Table, base_tokens: Table, base_seconds: Table, seed: int
) -> Interval | None:
    """Returns the 95 % interval of tokens/s over the baseline's, requests paired.

    Args:
        tokens: output tokens by repeat and request.
        seconds: seconds, likewise.
        base_tokens: the baseline's on the same requests.
        base_seconds: likewise.
        seed: seed of the draws.
    """
    draws = _draws(tokens, seed)
    if draws is None:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        return _interval(_speeds(draws, tokens, seconds) / _speeds(draws, base_tokens, base_seconds))


def _draws(tokens: Table, seed: int) -> "np.ndarray | None":
    """Returns how often each request is drawn, (resamples, requests); None if there are too few to say anything."""
    requests = len(tokens[0]) if tokens else 0
    if requests < FEWEST_REQUESTS:
        return None
    return np.random.default_rng(seed).multinomial(requests, np.full(requests, 1 / requests), size=RESAMPLES)


def _speeds(draws: np.ndarray, tokens: Table, seconds: Table) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        by_repeat = (draws @ np.asarray(tokens, dtype=float).T) / (draws @ np.asarray(seconds, dtype=float).T)
    return np.asarray(np.median(by_repeat, axis=1))


def _interval(values: np.ndarray) -> Interval | None:
    finite = values[np.isfinite(values)]
    if len(finite) < len(values):  # a draw without any token or second has no speed
        return None
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(finite, [tail, 100 - tail])
    return float(low), float(high)
