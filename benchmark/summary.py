"""Records -> one row a cell: what the table prints and the figures draw. Nothing here runs or times anything."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmark import metrics
from benchmark.bootstrap import Interval, ratio_interval, speed_interval
from benchmark.divergence import Divergence
from benchmark.metrics import Totals
from benchmark.plan import Cell, RunPlan
from benchmark.records import OK, SETTLED, SKIPPED, Record

Repeats = list[dict[str, Totals]]


@dataclass(frozen=True)
class SummaryRow:
    """One cell of a run. `benchmark.metrics` defines the numbers; None where there is none.

    `output_tokens` and `decode_steps` are those of the first repeat, speeds the median over repeats; `breakdown_reason` says
    what went wrong in the breakdown run.
    """

    model_type: str
    dataset: str
    batch_size: int
    group: int = 0
    dtype: str | None = None
    status: str = OK
    reason: str | None = None
    random_weights: bool = False
    prompts: int = 0
    tokens_per_s: float | None = None
    tokens_per_s_ci95: Interval | None = None
    decode_tokens_per_s: float | None = None
    speedup: float | None = None
    speedup_ci95: Interval | None = None
    decode_speedup: float | None = None
    decode_speedup_ci95: Interval | None = None
    tokens_per_s_repeats: tuple[float | None, ...] = ()
    decode_tokens_per_s_repeats: tuple[float | None, ...] = ()
    ttft_s: float | None = None
    tpot_s: float | None = None
    draft_nodes: int | None = None
    draft_source: str | None = None
    runner: str | None = None
    capture_s: float | None = None
    capture_bytes: int | None = None
    decode_steps: int | None = None
    output_tokens: int = 0
    acceptance_length: float | None = None
    acceptance_rate: float | None = None
    call_reduction: float | None = None
    match_rate: float | None = None
    exact_rate: float | None = None
    divergences: int | None = None
    divergence_gap_max: float | None = None
    peak_memory_bytes: int | None = None
    weight_bytes: int | None = None
    kv_bytes: int | None = None
    quality: Mapping[str, float] = field(default_factory=dict)
    quality_unavailable: Mapping[str, str] = field(default_factory=dict)
    breakdown_s: Mapping[str, float] | None = None
    breakdown_reason: str | None = None
    prompts_truncated: int = 0
    prompts_skipped: int = 0
    answers_cut: int = 0
    fallbacks: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Returns the row as JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Quality:
    """How good a cell's answers are: metric -> value, and metric -> why it could not be computed."""

    values: Mapping[str, float] = field(default_factory=dict)
    unavailable: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What the summary needs beside the records.

    Args:
        loaded: technique -> what its worker said when it had loaded.
        skipped: technique -> why it cannot run here.
        breakdown: records of the breakdown run.
        divergences: scored first differences.
        random_weights: no trained weights were used.
    """

    loaded: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    breakdown: Sequence[Record] = ()
    divergences: Sequence[Divergence] = ()
    random_weights: bool = False


def summarise(
    records: Iterable[Record], plan: RunPlan, quality: Mapping[Cell, Quality], facts: Facts
) -> list[SummaryRow]:
    """Returns the rows of a run: its cells in table order, then the techniques that cannot run here.

    Args:
        records: all answers.
        plan: the run.
        quality: scores of the cells whose answers were scored.
        facts: what else is known of the run.
    """
    by_cell: dict[Cell, list[Record]] = {}
    for record in records:
        cell = Cell(record.model_type, record.dataset, record.batch_size, record.group)
        by_cell.setdefault(cell, []).append(record)
    rows = [_row(cell, by_cell, plan, quality.get(cell, Quality()), facts) for cell in plan.cells()]
    for name, reason in facts.skipped.items():
        for dataset in plan.prompt_ids:
            for size in plan.batch_sizes:
                rows.append(SummaryRow(name, dataset, size, status=SKIPPED, reason=reason))
    return rows


def _row(
    cell: Cell, by_cell: Mapping[Cell, list[Record]], plan: RunPlan, quality: Quality, facts: Facts
) -> SummaryRow:
    loaded = facts.loaded.get(cell.model_type, {})
    recipe = plan.contenders[cell.model_type].recipe
    common: dict[str, Any] = {
        "model_type": cell.model_type,
        "dataset": cell.dataset,
        "batch_size": cell.batch_size,
        "group": cell.group,
        "dtype": loaded.get("dtype") or recipe.get("dtype"),
        "random_weights": facts.random_weights,
        "weight_bytes": loaded.get("weight_bytes"),
    }
    status, reason = _status(cell, by_cell, plan)
    if status != OK:
        return SummaryRow(
            **common, status=status, reason=reason, prompts_skipped=_skipped(by_cell.get(cell, ()))
        )
    records = [record for record in by_cell[cell] if record.status == OK]
    return SummaryRow(
        **common,
        **_counts(by_cell[cell], records),
        **_speeds(cell, by_cell, plan),
        **_agreement(cell, by_cell, plan, facts.divergences),
        quality=dict(quality.values),
        quality_unavailable=dict(quality.unavailable),
        **_breakdown(cell, facts.breakdown),
        fallbacks=tuple(dict.fromkeys([*(loaded.get("fallbacks") or ()), *_fallbacks(records)])),
    )


def _status(cell: Cell, by_cell: Mapping[Cell, list[Record]], plan: RunPlan) -> tuple[str, str | None]:
    """Returns the worst that happened in a cell, and why."""
    refusal = plan.contenders[cell.model_type].refusal(cell.batch_size)
    if refusal is not None:
        return SKIPPED, refusal
    records = by_cell.get(cell, [])
    for record in records:
        if record.status not in SETTLED:
            return record.status, record.reason
    if len(records) < plan.repeats * len(plan.prompt_ids[cell.dataset]):
        return "error", "answers are missing; the same command asks for them"
    if all(record.status == SKIPPED for record in records):
        return SKIPPED, records[0].reason
    return OK, None


def _draft_tree(records: Sequence[Record]) -> dict[str, Any]:
    """Returns the size of the draft tree and who decided it: the most frequent, since a worker that starts anew tunes anew."""
    used = Counter((r.draft_nodes, r.draft_source) for r in records if r.draft_nodes)
    nodes, source = used.most_common(1)[0][0] if used else (None, None)
    return {"draft_nodes": nodes, "draft_source": source}


def _runner(records: Sequence[Record]) -> dict[str, Any]:
    """Returns how most calls ran their steps, and what their graphs cost: the most that any call told of."""
    used = Counter(record.runner for record in records if record.runner)
    return {
        "runner": used.most_common(1)[0][0] if used else None,
        "capture_s": max((r.capture_s for r in records if r.capture_s is not None), default=None),
        "capture_bytes": max((r.capture_bytes for r in records if r.capture_bytes is not None), default=None),
    }


def _counts(every: Sequence[Record], records: Sequence[Record]) -> dict[str, Any]:
    first = [record for record in records if record.repeat == 0]
    return {
        "prompts": len(first),
        "ttft_s": metrics.ttft_s(records),
        "tpot_s": metrics.tpot_s(records),
        "output_tokens": sum(len(record.token_ids) for record in first),
        **_draft_tree(records),
        **_runner(records),
        "decode_steps": metrics.decode_steps(first),
        "acceptance_length": metrics.acceptance_length(records),
        "acceptance_rate": metrics.acceptance_rate(records),
        "call_reduction": metrics.call_reduction(records),
        "peak_memory_bytes": max((r.peak_memory_bytes for r in records if r.peak_memory_bytes), default=None),
        "kv_bytes": max((record.kv_bytes for record in records if record.kv_bytes), default=None),
        "prompts_truncated": sum(record.truncated for record in first),
        "prompts_skipped": _skipped(every),
        "answers_cut": sum(record.finish_reason in ("length", "limit") for record in first),
    }


def _skipped(records: Iterable[Record]) -> int:
    """Returns how many prompts could not be answered."""
    return sum(record.status == SKIPPED and record.repeat == 0 for record in records)


def _speeds(cell: Cell, by_cell: Mapping[Cell, list[Record]], plan: RunPlan) -> dict[str, Any]:
    own = _repeats(by_cell[cell], plan)
    speeds = [metrics.tokens_per_s(repeat.values()) for repeat in own]
    decode_speeds = [metrics.decode_tokens_per_s(repeat.values()) for repeat in own]
    tokens, seconds = _tables(own, _shared(own), "output_tokens", "total_s")
    result: dict[str, Any] = {
        "tokens_per_s": metrics.over_repeats(speeds),
        "tokens_per_s_ci95": speed_interval(tokens, seconds, plan.seed),
        "tokens_per_s_repeats": tuple(speeds),
        "decode_tokens_per_s": metrics.over_repeats(decode_speeds),
        "decode_tokens_per_s_repeats": tuple(decode_speeds),
    }
    base_cell = Cell(plan.baseline, cell.dataset, cell.batch_size, cell.group)
    if _status(base_cell, by_cell, plan)[0] != OK:
        return result
    base = _repeats(by_cell[base_cell], plan)
    return result | {
        "speedup": _over(result["tokens_per_s"], [metrics.tokens_per_s(r.values()) for r in base]),
        "decode_speedup": _over(
            result["decode_tokens_per_s"], [metrics.decode_tokens_per_s(r.values()) for r in base]
        ),
        "speedup_ci95": _ratio_interval(own, base, "output_tokens", "total_s", plan.seed),
        "decode_speedup_ci95": _ratio_interval(own, base, "decode_tokens", "decode_s", plan.seed),
    }


def _repeats(records: Sequence[Record], plan: RunPlan) -> Repeats:
    return [metrics.totals(r for r in records if r.repeat == repeat) for repeat in range(plan.repeats)]


def _shared(*sides: Repeats) -> list[str]:
    """Returns the requests that every repeat of every side answered, in order."""
    repeats = [repeat for side in sides for repeat in side]
    return [request for request in repeats[0] if all(request in repeat for repeat in repeats)]


def _tables(side: Repeats, requests: Sequence[str], tokens: str, seconds: str) -> tuple[Any, Any]:
    def table(part: str) -> list[list[Any]]:
        return [[getattr(repeat[name], part) for name in requests] for repeat in side]

    return table(tokens), table(seconds)


def _ratio_interval(own: Repeats, base: Repeats, tokens: str, seconds: str, seed: int) -> Interval | None:
    requests = _shared(own, base)
    return ratio_interval(
        *_tables(own, requests, tokens, seconds), *_tables(base, requests, tokens, seconds), seed
    )


def _over(own: float | None, base: Iterable[float | None]) -> float | None:
    reference = metrics.over_repeats(base)
    return own / reference if own is not None and reference else None


def _agreement(
    cell: Cell, by_cell: Mapping[Cell, list[Record]], plan: RunPlan, found: Iterable[Divergence]
) -> dict[str, Any]:
    if not plan.greedy:
        return {}  # two right samplers draw different tokens
    here = [
        d for d in found if (d.model_type, d.dataset, d.batch_size, d.group) == tuple(asdict(cell).values())
    ]
    twin = plan.contenders[cell.model_type].twin
    match = _match_rate(by_cell[cell], by_cell.get(_cell_of(plan.baseline, cell), ()))
    return {
        "match_rate": match,
        "exact_rate": None
        if twin is None
        else _match_rate(by_cell[cell], _of_any_group(twin, cell, by_cell)),
        "divergences": None if match is None else len(here),
        "divergence_gap_max": max((d.gap for d in here if d.gap is not None), default=None),
    }


def _cell_of(name: str, like: Cell) -> Cell:
    return Cell(name, like.dataset, like.batch_size, like.group)


def _of_any_group(name: str, like: Cell, by_cell: Mapping[Cell, list[Record]]) -> Sequence[Record]:
    """Returns a technique's records from whichever group ran it: tokens, unlike times, compare across groups."""
    if _cell_of(name, like) in by_cell:
        return by_cell[_cell_of(name, like)]
    cells = (
        c for c in by_cell if (c.model_type, c.dataset, c.batch_size) == (name, like.dataset, like.batch_size)
    )
    return next((by_cell[cell] for cell in cells), ())


def _match_rate(own: Iterable[Record], other: Iterable[Record]) -> float | None:
    """Share of prompts whose whole token sequence is the other's in every repeat; None if they share no prompt."""
    tokens = {(r.prompt_id, r.repeat): r.token_ids for r in other if r.status == OK}
    equal: dict[str, bool] = {}
    for record in own:
        key = (record.prompt_id, record.repeat)
        if record.status == OK and key in tokens:
            equal[record.prompt_id] = equal.get(record.prompt_id, True) and record.token_ids == tokens[key]
    return sum(equal.values()) / len(equal) if equal else None


def _breakdown(cell: Cell, records: Iterable[Record]) -> dict[str, Any]:
    """Returns phase -> seconds over the set, or why it is incomplete; answers of one call share its phases, which count once."""
    own = [
        record
        for record in records
        if (record.model_type, record.dataset, record.batch_size)
        == (cell.model_type, cell.dataset, cell.batch_size)
    ]
    for record in own:
        if record.status not in SETTLED:
            return {"breakdown_reason": f"{record.status}: {record.reason}"}
    calls = {(record.request, record.call): record.phases_s for record in own if record.status == OK}
    phases: dict[str, float] = {}
    for part in calls.values():
        for name, seconds in (part or {}).items():
            phases[name] = phases.get(name, 0.0) + seconds
    return {"breakdown_s": phases or None}


def _fallbacks(records: Iterable[Record]) -> list[str]:
    return [text for record in records for text in record.fallbacks]
