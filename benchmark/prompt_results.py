"""Each prompt's acceptance length beside its speed-up over the baseline, from a run's records.

Only techniques that draft appear: the others have no acceptance length. Batch size 1 only, since every row of a larger
batch lasts as long as its slowest.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from benchmark import metrics
from benchmark.records import OK, Record

Rate = Callable[[Collection[metrics.Totals]], float | None]
RATES: tuple[Rate, Rate] = (metrics.tokens_per_s, metrics.decode_tokens_per_s)


@dataclass(frozen=True)
class PromptResult:
    """One prompt under one drafting technique, medians over the repeats.

    Args:
        acceptance_length: tokens emitted per decode step, bonus token included.
        speedup: tokens/s over the baseline's on this prompt, prefill inside.
        decode_speedup: the same after the first token.
    """

    model_type: str
    dataset: str
    prompt_id: str
    output_tokens: int
    decode_steps: int
    acceptance_length: float
    speedup: float
    decode_speedup: float


def from_records(
    records: Iterable[Record], baseline: str, drafting: Collection[str]
) -> Iterator[PromptResult]:
    """Yields one result per drafting technique and prompt whose baseline answer stands in the same group."""
    answers: dict[tuple[int, str, str], dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.status == OK and record.batch_size == 1:
            answers[record.group, record.dataset, record.prompt_id][record.model_type].append(record)
    for techniques in answers.values():
        for model_type, own in techniques.items():
            if baseline in techniques and model_type != baseline and model_type in drafting:
                yield from _compare(own, techniques[baseline])


def to_table(results: Iterable[PromptResult]) -> dict[str, Any]:
    """Returns the results as field names and rows of values, which commits small."""
    names = [field.name for field in fields(PromptResult)]
    return {
        "fields": names,
        "rows": [[_short(value) for value in asdict(result).values()] for result in results],
    }


def from_table(table: Mapping[str, Any]) -> Iterator[PromptResult]:
    """Yields what `to_table` stored."""
    for values in table["rows"]:
        yield PromptResult(**dict(zip(table["fields"], values, strict=True)))


def _compare(own: list[Record], base: list[Record]) -> Iterator[PromptResult]:
    """Yields the comparison, or nothing for an answer too short to have been decoded step by step."""
    length = metrics.acceptance_length(own[:1])
    ratios = [_speed(own, rate) / (_speed(base, rate) or math.inf) for rate in RATES]
    if length is None or not all(ratios):
        return
    yield PromptResult(
        model_type=own[0].model_type,
        dataset=own[0].dataset,
        prompt_id=own[0].prompt_id,
        output_tokens=len(own[0].token_ids),
        decode_steps=metrics.decode_steps(own[:1]) or 0,
        acceptance_length=length,
        speedup=ratios[0],
        decode_speedup=ratios[1],
    )


def _speed(answers: list[Record], rate: Rate) -> float:
    """Returns the median over the repeats of one prompt's tokens/s, 0 where it has none."""
    return metrics.over_repeats(rate(metrics.totals([answer]).values()) for answer in answers) or 0.0


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
