import numpy as np
import pytest

from benchmark.bootstrap import ratio_interval, speed_interval

TOKENS = [[10.0, 20.0, 30.0, 5.0]]
SECONDS = [[1.0, 3.0, 2.5, 1.0]]
BASE_SECONDS = [[2.0, 5.0, 6.0, 2.5]]


def test_a_seed_gives_one_interval_and_another_seed_another():
    random = np.random.default_rng(5)
    tokens, seconds, base = (random.uniform(1, 9, size=(3, 30)).tolist() for _ in range(3))
    first = ratio_interval(tokens, seconds, tokens, base, 0)
    assert ratio_interval(tokens, seconds, tokens, base, 0) == first
    assert ratio_interval(tokens, seconds, tokens, base, 1) != first


def test_the_interval_holds_the_ratio():
    low, high = ratio_interval(TOKENS, SECONDS, TOKENS, BASE_SECONDS, 0)
    assert low < sum(BASE_SECONDS[0]) / sum(SECONDS[0]) < high


def test_pairing_makes_an_equal_factor_certain():
    slower = [[3 * seconds for seconds in SECONDS[0]]]
    assert ratio_interval(TOKENS, SECONDS, TOKENS, slower, 0) == (pytest.approx(3.0), pytest.approx(3.0))


def test_the_median_over_repeats_ignores_one_slow_repeat():
    slow = [SECONDS[0], SECONDS[0], [100 * seconds for seconds in SECONDS[0]]]
    assert speed_interval(TOKENS * 3, slow, 0) == pytest.approx(speed_interval(TOKENS, SECONDS, 0))


def test_one_request_or_none_says_nothing():
    assert speed_interval([[1.0]], [[1.0]], 0) is None
    assert speed_interval([], [], 0) is None
    assert speed_interval([[0.0, 0.0]], [[0.0, 0.0]], 0) is None


def test_tokens_and_seconds_are_drawn_together():
    assert speed_interval([[5 * seconds for seconds in SECONDS[0]]], SECONDS, 0) == (
        pytest.approx(5),
        pytest.approx(5),
    )
