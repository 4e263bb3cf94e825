"""The two ends of a worker's `generate`: options and a turn become a request, its generations become records."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmark.config import RunConfig
from benchmark.plan import Turn
from benchmark.records import OK, SKIPPED, Record
from datasets_code import Example

Examples = Mapping[str, Mapping[str, Example]]


def limits(config: RunConfig, index: int) -> dict[str, Any]:
    """Returns how long and by which rule to decode: the same for every technique and repeat, its seed by request."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "ignore_eos", "on_long")
    return {name: getattr(config, name) for name in names} | {"seed": config.seed + index}


def records_of(turn: Turn, answer: Mapping[str, Any]) -> Iterator[Record]:
    """Yields one record a prompt of a turn."""
    for prompt_id, generation in zip(turn.prompt_ids, answer["generations"], strict=True):
        yield _record(
            turn,
            prompt_id,
            call=generation.get("call") or 0,
            status=SKIPPED if generation.get("error") else OK,
            reason=generation.get("error"),
            prompt_tokens=generation["prompt_tokens"],
            token_ids=tuple(generation["token_ids"]),
            text=generation["text"],
            ttft_s=generation["ttft_s"],
            total_s=generation["total_s"],
            steps=None if generation["steps"] is None else tuple(generation["steps"]),
            finish_reason=generation["finish_reason"],
            fallbacks=tuple(generation.get("fallbacks") or ()),
            truncated=bool(generation.get("truncated")),
            phases_s=generation.get("phases_s"),
            peak_memory_bytes=answer.get("peak_memory_bytes"),
            kv_bytes=answer.get("kv_bytes"),
            draft_nodes=answer.get("draft_nodes"),
            draft_source=answer.get("draft_source"),
            runner=answer.get("runner"),
            capture_s=answer.get("capture_s"),
            capture_bytes=answer.get("capture_bytes"),
            wall_s=answer.get("wall_s"),
        )


def failed_records(turn: Turn, status: str, reason: str) -> list[Record]:
    """Returns the records of a turn that ended its cell."""
    return [_record(turn, prompt_id, status=status, reason=reason) for prompt_id in turn.prompt_ids]


def _record(turn: Turn, prompt_id: str, **values: Any) -> Record:
    return Record(
        model_type=turn.cell.model_type,
        dataset=turn.cell.dataset,
        batch_size=turn.cell.batch_size,
        prompt_id=prompt_id,
        repeat=turn.repeat,
        group=turn.cell.group,
        request=turn.request,
        request_size=len(turn.prompt_ids),
        acceptance_ratio=turn.acceptance_ratio,
        **values,
    )
