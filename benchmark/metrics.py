"""The definitions of every number in a result, each beside the code that computes it.

Tokens are ids as emitted, the end-of-text token counted, padding not, by the same rule for every technique. Seconds are
those of a *call*, which answers a whole batch: every record of the call carries them, and `totals` alone sums tokens and
seconds, so that a batch's time is counted once.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from benchmark.records import OK, Record


@dataclass(frozen=True)
class Totals:
    """What one request produced and how long it took: the unit over which numbers are pooled and techniques paired.

    Args:
        output_tokens: ids emitted for all its prompts.
        decode_tokens: the same without each prompt's first token, which prefill yields.
        total_s: seconds, prefill and decoding.
        decode_s: seconds after the first token.
    """

    output_tokens: int
    decode_tokens: int
    total_s: float
    decode_s: float


def totals(records: Iterable[Record]) -> dict[str, Totals]:
    """Returns request -> totals of the answers of one cell and repeat, in order; here alone tokens are summed.

    Requests go by their index within the data set, by which techniques are paired.

    Every answer of a batch saw the seconds of its call, so seconds are taken once a call.
    """
    requests: dict[str, list[Record]] = {}
    for record in records:
        if record.status == OK:
            requests.setdefault(record.request.rpartition("/")[2], []).append(record)
    return {index: _totals(answers) for index, answers in requests.items()}


def _totals(answers: Sequence[Record]) -> Totals:
    # An answer that needed no call at all (no token was wanted) has no seconds.
    calls = {(record.request, record.call): record for record in answers if record.total_s}.values()
    return Totals(
        output_tokens=sum(len(record.token_ids) for record in answers),
        decode_tokens=sum(max(0, len(record.token_ids) - 1) for record in answers),
        total_s=sum(call.total_s or 0.0 for call in calls),
        decode_s=sum(
            max(0.0, (call.total_s or 0.0) - call.ttft_s) for call in calls if call.ttft_s is not None
        ),
    )


def tokens_per_s(requests: Collection[Totals]) -> float | None:
    """Output tokens / (prefill + decode seconds), pooled over the requests of one repeat."""
    return _ratio(sum(one.output_tokens for one in requests), sum(one.total_s for one in requests))


def decode_tokens_per_s(requests: Collection[Totals]) -> float | None:
    """(Output tokens - 1 a prompt) / decode seconds, pooled over the requests of one repeat. None where nothing was decoded."""
    tokens = sum(one.decode_tokens for one in requests)
    return _ratio(tokens, sum(one.decode_s for one in requests)) if tokens else None


def ttft_s(records: Iterable[Record]) -> float | None:
    """Time to first token: seconds from submitting a prompt to its first token, median over answers."""
    return _median(record.ttft_s for record in records)


def tpot_s(records: Iterable[Record]) -> float | None:
    """Time per output token: (time of last token - time of first) / (output tokens - 1), median over answers.

    An answer in a batch lasts as long as its call.
    """
    return _median(
        (record.total_s - record.ttft_s) / (len(record.token_ids) - 1)
        for record in records
        if record.total_s is not None and record.ttft_s is not None and len(record.token_ids) > 1
    )


def decode_steps(records: Iterable[Record]) -> int | None:
    """Forward passes of the target model after prefill, counted once for each answer that took part in them."""
    steps = [record.steps for record in records]
    return (
        None if not steps or any(part is None for part in steps) else sum(len(part or ()) for part in steps)
    )


def drafted(records: Iterable[Record]) -> int:
    """Draft tokens proposed: nodes of all draft trees."""
    return sum(int(step.get("nodes") or 0) for record in records for step in record.steps or ())


def accepted(records: Iterable[Record]) -> int:
    """Draft tokens accepted, bonus tokens excluded."""
    return sum(int(step.get("accepted") or 0) for record in records for step in record.steps or ())


def acceptance_length(records: Sequence[Record]) -> float | None:
    """(Output tokens - 1 a prompt) / decode steps: tokens a step, bonus token included. None where nothing is drafted."""
    tokens = sum(max(0, len(record.token_ids) - 1) for record in records)
    return _ratio(tokens, decode_steps(records) or 0) if drafted(records) else None


def acceptance_rate(records: Sequence[Record]) -> float | None:
    """Accepted draft tokens / drafted tokens, bonus excluded. None where nothing is drafted."""
    return _ratio(accepted(records), drafted(records))


def call_reduction(records: Sequence[Record]) -> float | None:
    """Forward passes that plain decoding needs / those made, prefill counted in both. None where nothing is drafted."""
    if not drafted(records):
        return None
    plain = sum(len(record.token_ids) for record in records)
    return _ratio(plain, (decode_steps(records) or 0) + sum(1 for record in records if record.token_ids))


def over_repeats(values: Iterable[float | None]) -> float | None:
    """Median over the repeats of a number that was pooled over prompts."""
    return _median(values)


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _ratio(above: float, below: float) -> float | None:
    return above / below if below > 0 else None
