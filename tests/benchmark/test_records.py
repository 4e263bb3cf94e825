import pytest

from benchmark.records import done_requests, from_json, settled
from tests.benchmark.builders import a_record


def test_a_record_survives_its_line():
    record = a_record("naive", "p1", [1, 2], steps=({"nodes": 2, "accepted": 1, "seconds": 0.1},))
    assert from_json(record.as_json()) == record
    assert "phases_s" not in record.as_json()
    assert from_json(record.as_json() | {"later": 1}) == record


@pytest.mark.parametrize(
    "damage",
    [
        {"model_type": 3},
        {"batch_size": "1"},
        {"repeat": True},
        {"request": None},
        {"token_ids": 5},
        {"token_ids": [1, "2"]},
        {"total_s": "1"},
        {"total_s": float("nan")},
        {"steps": [3]},
        {"steps": [{"nodes": "2"}]},
        {"phases_s": [1]},
    ],
)
def test_a_value_of_another_type_is_refused(damage):
    with pytest.raises(TypeError, match=f"'{next(iter(damage))}' has a value of the wrong type"):
        from_json(a_record("naive", "p1", [1, 2]).as_json() | damage)


def test_the_fields_of_the_contract_are_there():
    names = {
        "model_type", "dataset", "batch_size", "prompt_id", "repeat", "group", "status", "prompt_tokens", "token_ids",
        "ttft_s", "total_s", "steps",
    }  # fmt: skip
    assert names <= a_record("naive", "p0", [1]).as_json().keys()


def test_failed_torn_and_doubled_records_are_not_settled():
    whole = [a_record("a", p, [1], request="r1", request_size=2) for p in ("p0", "p1")]
    torn = [a_record("a", "p2", [1], request="r2", request_size=2)]
    failed = [a_record("a", "p4", [], status="oom")]
    skipped = [a_record("a", "p5", [], status="skipped")]
    assert settled(whole + torn + failed + skipped + whole) == whole + skipped
    assert done_requests(whole + torn) == {"r1"}
