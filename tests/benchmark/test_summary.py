import json
from dataclasses import fields, replace

import pytest

from benchmark.divergence import Divergence, divergences, first_difference
from benchmark.plan import Cell
from benchmark.summary import Facts, Quality, SummaryRow, summarise
from tests.benchmark.builders import a_plan, a_record

DRAFTS = ({"nodes": 3, "accepted": 2}, {"nodes": 3, "accepted": 1})
CONTRACT = {
    "model_type", "dataset", "batch_size", "dtype", "status", "reason", "tokens_per_s", "decode_tokens_per_s",
    "speedup", "speedup_ci95", "decode_speedup", "decode_speedup_ci95", "ttft_s", "tpot_s", "decode_steps",
    "output_tokens", "acceptance_length", "call_reduction", "match_rate", "exact_rate", "peak_memory_bytes",
    "weight_bytes", "kv_bytes", "quality", "breakdown_s",
}  # fmt: skip


def rows_of(plan, records, quality=None, **facts):
    rows = summarise(records, plan, quality or {}, Facts(**facts))
    return {(row.model_type, row.group): row for row in rows}


def hand_worked():
    """Two prompts of 6 tokens. naive: 6 s and 3 s; static: 3 s and 3 s; spec_stream: 1.5 s each, p1 differs."""
    answers = []
    for repeat in range(2):
        for prompt, seconds in (("p0", 6.0), ("p1", 3.0)):
            tokens = [1, 2, 3, 4, 5, 6]
            other = tokens if prompt == "p0" else [1, 2, 9, 4, 5, 6]
            answers += [
                a_record("naive", prompt, tokens, seconds, 1.0, repeat, peak_memory_bytes=10),
                a_record("static", prompt, other, 3.0, 0.5, repeat),
                a_record("spec_stream", prompt, other, 1.5, 0.5, repeat, steps=DRAFTS),
            ]
    return answers


def test_a_row_has_every_field_of_the_contract():
    assert {item.name for item in fields(SummaryRow)} >= CONTRACT


def test_the_hand_worked_run():
    plan = a_plan(repeats=2, twins={"spec_stream": "static"})
    rows = rows_of(plan, hand_worked(), loaded={"naive": {"dtype": "float32", "weight_bytes": 7}})
    naive, static, spec = rows["naive", 0], rows["static", 0], rows["spec_stream", 0]
    assert naive.tokens_per_s == pytest.approx(12 / 9)
    assert naive.decode_tokens_per_s == pytest.approx(10 / 7)
    assert (naive.speedup, naive.match_rate, naive.exact_rate) == (1.0, 1.0, None)
    assert (naive.dtype, naive.weight_bytes, naive.peak_memory_bytes, naive.output_tokens) == (
        "float32",
        7,
        10,
        12,
    )
    assert static.speedup == pytest.approx(9 / 6)
    assert spec.speedup == pytest.approx(9 / 3)
    assert spec.decode_speedup == pytest.approx((10 / 2) / (10 / 7))
    assert spec.speedup_ci95[0] <= spec.speedup <= spec.speedup_ci95[1]
    assert spec.speedup_ci95 == (pytest.approx(2.0), pytest.approx(4.0))
    assert (spec.match_rate, spec.exact_rate) == (0.5, 1.0)
    assert (spec.decode_steps, spec.acceptance_length) == (4, 10 / 4)
    assert spec.call_reduction == pytest.approx(12 / 6)
    assert static.acceptance_length is None
    json.dumps([row.as_json() for row in rows.values()], allow_nan=False)


def test_the_draft_tree_and_who_chose_it():
    """A worker that had to start anew may have tuned another size for its last answers."""
    answers = [a_record("naive", f"p{index}", [1, 2, 3]) for index in range(3)]
    for index, nodes in enumerate((4, 4, 5)):
        tree = {"draft_nodes": nodes, "draft_source": "tuned at load"}
        answers.append(a_record("spec_stream", f"p{index}", [1, 2, 3], **tree))
    rows = rows_of(a_plan(names=("naive", "spec_stream"), prompts=3), answers)
    spec, naive = rows["spec_stream", 0], rows["naive", 0]
    assert (spec.draft_nodes, spec.draft_source) == (4, "tuned at load")
    assert (naive.draft_nodes, naive.draft_source) == (None, None)


def test_the_runner_and_what_its_graphs_cost():
    """A worker that had to start anew captures anew, and a call that fell back to eager steps is the exception."""
    answers = [a_record("naive", f"p{index}", [1, 2, 3]) for index in range(3)]
    for index, (runner, seconds) in enumerate((("cuda graph", 0.5), ("cuda graph", 0.75), ("eager", 0.0))):
        graph = {"runner": runner, "capture_s": seconds, "capture_bytes": int(100 * seconds)}
        reasons = ("no graph: why",) if runner == "eager" else ()
        answers.append(a_record("static", f"p{index}", [1, 2, 3], fallbacks=reasons, **graph))
    loaded = {"static": {"fallbacks": ["no graph: why"]}}
    rows = rows_of(a_plan(names=("naive", "static"), prompts=3), answers, loaded=loaded)
    static, naive = rows["static", 0], rows["naive", 0]
    assert (static.runner, static.capture_s, static.capture_bytes) == ("cuda graph", 0.75, 75)
    assert static.fallbacks == ("no graph: why",)
    assert (naive.runner, naive.capture_s, naive.capture_bytes) == (None, None, None)


def test_the_median_over_repeats():
    plan = a_plan(names=("naive",), prompts=1, repeats=3)
    records = [
        a_record("naive", "p0", [1] * 6, seconds, 0.5, repeat)
        for repeat, seconds in enumerate((1.0, 2.0, 60.0))
    ]
    (row,) = rows_of(plan, records).values()
    assert row.tokens_per_s == 3.0
    assert row.tokens_per_s_repeats == (6.0, 3.0, pytest.approx(0.1))


def test_ratios_stay_within_the_group():
    plan = a_plan(
        groups=(("naive", "static"), ("naive", "spec_stream")), prompts=1, twins={"spec_stream": "static"}
    )
    records = [
        a_record("naive", "p0", [1, 2], 4.0),
        a_record("static", "p0", [1, 2], 2.0),
        a_record("naive", "p0", [1, 2], 8.0, group=1),
        a_record("spec_stream", "p0", [1, 2], 2.0, group=1, steps=DRAFTS),
    ]
    rows = rows_of(plan, records)
    assert rows["static", 0].speedup == 2.0
    assert rows["spec_stream", 1].speedup == 4.0
    assert rows["spec_stream", 1].exact_rate == 1.0
    assert len(rows) == 4


@pytest.mark.parametrize("status", ["oom", "error", "timeout"])
def test_a_failed_cell_has_a_reason_and_no_numbers(status):
    plan = a_plan(names=("naive", "static"))
    records = [r for r in hand_worked() if r.repeat == 0 and r.model_type == "naive"]
    records += [a_record("static", "p0", [1, 2]), a_record("static", "p1", [], status=status, reason="why")]
    row = rows_of(plan, records)["static", 0]
    assert (row.status, row.reason, row.tokens_per_s, row.speedup) == (status, "why", None, None)


def test_without_a_baseline_there_is_no_ratio():
    plan = a_plan(names=("naive", "static"), prompts=1)
    records = [a_record("naive", "p0", [], status="oom", reason="why"), a_record("static", "p0", [1, 2], 2.0)]
    row = rows_of(plan, records)["static", 0]
    assert (row.tokens_per_s, row.speedup, row.match_rate) == (1.0, None, None)


def test_missing_answers_are_not_passed_over():
    row = rows_of(a_plan(names=("naive",)), [a_record("naive", "p0", [1])])["naive", 0]
    assert row.status == "error"


def test_skipped_techniques_and_prompts():
    plan = a_plan(names=("naive", "static"))
    records = [a_record(name, "p0", [1, 2]) for name in ("naive", "static")]
    records += [a_record(name, "p1", [], status="skipped", reason="empty") for name in ("naive", "static")]
    rows = rows_of(plan, records, skipped={"flash": "no CUDA"})
    assert (rows["static", 0].status, rows["static", 0].prompts, rows["static", 0].prompts_skipped) == (
        "ok",
        1,
        1,
    )
    assert (rows["flash", 0].status, rows["flash", 0].reason) == ("skipped", "no CUDA")


def test_quality_breakdown_and_gaps():
    plan = a_plan(names=("naive", "static"))
    records = [r for r in hand_worked() if r.repeat == 0 and r.model_type != "spec_stream"]
    phases = {"prefill": 1.0, "forward": 2.0}
    timed = [a_record("static", p, [1], phases_s=phases, request=p, request_size=1) for p in ("p0", "p1")]
    found = [Divergence("static", "e2e_nlg", 1, 0, "p1", 2, 3, 9, gap=0.01)]
    cell = Cell("static", "e2e_nlg", 1, 0)
    quality = {cell: Quality({"bleu": 5.0}, {"rouge1": "not installed"})}
    row = rows_of(plan, records, quality, breakdown=timed, divergences=found)["static", 0]
    assert row.breakdown_s == {"prefill": 2.0, "forward": 4.0}
    assert (row.divergences, row.divergence_gap_max) == (1, 0.01)
    assert (row.quality, row.quality_unavailable) == ({"bleu": 5.0}, {"rouge1": "not installed"})


def test_sampled_answers_are_not_compared():
    plan = replace(a_plan(repeats=2), greedy=False)
    row = rows_of(plan, hand_worked())["spec_stream", 0]
    assert (row.match_rate, row.divergences) == (None, None)
    assert row.speedup > 1


def test_divergences_are_found_where_they_begin():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1], [1, 3]) == 1
    (found, *_) = divergences([r for r in hand_worked() if r.model_type != "spec_stream"], "naive")
    assert found == Divergence("static", "e2e_nlg", 1, 0, "p1", 2, 3, 9)
    ended = [a_record("naive", "p0", [1]), a_record("static", "p0", [1, 2])]
    assert next(divergences(ended, "naive")).baseline_token is None
