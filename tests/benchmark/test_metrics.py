"""Hand-worked: one batch of two prompts, 5 and 3 tokens in a call of 4 s with the first token at 1 s."""

import pytest

from benchmark import metrics
from benchmark.plan import single_pass
from benchmark.run import sweep_points
from tests.benchmark.builders import a_plan, a_record

STEPS = ({"nodes": 3, "accepted": 1}, {"nodes": 3, "accepted": 1})
BATCH = [
    a_record("s", "p0", [1, 2, 3, 4, 5], 4.0, 1.0, request="s/0", request_size=2, steps=STEPS),
    a_record("s", "p1", [1, 2, 3], 4.0, 1.0, request="s/0", request_size=2, steps=STEPS[:1]),
]


def test_a_batch_counts_its_seconds_once():
    (one,) = metrics.totals(BATCH).values()
    assert (one.output_tokens, one.decode_tokens, one.total_s, one.decode_s) == (8, 6, 4.0, 3.0)
    assert metrics.tokens_per_s([one]) == 2.0
    assert metrics.decode_tokens_per_s([one]) == 2.0


def test_calls_of_one_request_add_up():
    split = [BATCH[0], a_record("s", "p1", [1, 2, 3], 2.0, 1.0, request="s/0", request_size=2, call=1)]
    (one,) = metrics.totals(split).values()
    assert (one.output_tokens, one.total_s, one.decode_s) == (8, 6.0, 4.0)


def test_an_answer_without_a_call_takes_no_seconds_from_the_others():
    empty = a_record("s", "p2", [], 0.0, None, request="s/0", request_size=3)
    assert metrics.totals([*BATCH, empty]) == metrics.totals(BATCH)


def test_speeds_are_pooled_not_averaged():
    records = [a_record("s", "p0", [1] * 10, 1.0), a_record("s", "p1", [1] * 10, 4.0)]
    assert metrics.tokens_per_s(metrics.totals(records).values()) == 4.0


def test_latencies():
    records = [
        a_record("s", "p0", [1] * 5, 3.0, 1.0),
        a_record("s", "p1", [1] * 3, 2.0, 0.5),
        a_record("s", "p2", [1]),
    ]
    assert metrics.ttft_s(records) == 0.5
    assert metrics.tpot_s(records) == pytest.approx((0.5 + 0.75) / 2)


def test_acceptance():
    assert metrics.decode_steps(BATCH) == 3
    assert metrics.acceptance_length(BATCH) == 2.0
    assert metrics.acceptance_rate(BATCH) == pytest.approx(3 / 9)
    assert metrics.call_reduction(BATCH) == pytest.approx(8 / 5)


def test_nothing_drafted_has_no_acceptance():
    plain = [a_record("s", "p0", [1, 2], steps=({"nodes": 0, "accepted": 0},))]
    assert metrics.decode_steps(plain) == 1
    for number in (metrics.acceptance_length, metrics.acceptance_rate, metrics.call_reduction):
        assert number(plain) is None
    assert metrics.decode_steps([a_record("s", "p0", [1, 2], steps=None)]) is None


def test_an_answer_of_one_token_has_no_decode_speed():
    one = metrics.totals([a_record("s", "p0", [1], 1.5, 1.0)]).values()
    assert metrics.decode_tokens_per_s(one) is None
    assert metrics.tokens_per_s(one) == pytest.approx(1 / 1.5)


def test_no_tokens_no_number():
    empty = [a_record("s", "p0", [], 0.0, None, steps=())]
    assert metrics.tokens_per_s(metrics.totals(empty).values()) is None
    assert metrics.ttft_s(empty) is None
    assert metrics.tpot_s(empty) is None


def test_prompts_of_one_ratio_of_a_sweep_are_requests_of_their_own():
    plan = a_plan(names=("naive", "spec_stream"), prompts=2)
    turns = single_pass(plan, ["spec_stream"], (), 0.5)
    records = [
        a_record(
            "spec_stream", f"p{turn.index}", [1] * 10, seconds, request=turn.request, acceptance_ratio=0.5
        )
        for turn, seconds in zip(turns, (1.0, 4.0), strict=True)
    ]
    assert len(metrics.totals(records)) == 2
    (point,) = sweep_points(records)
    assert (point["acceptance_ratio"], point["tokens_per_s"]) == (0.5, 20 / 5)
