"""One record an answer, appended to `records.jsonl` as it comes; what a killed run left behind is read back here.

A request asks for a batch of prompts; a technique answers it in one call of the model, or in several where it takes one
prompt at a time. Each record carries the wall time of its call. A request counts as done when all its records are there,
so a resumed run drops what is left of a torn one and asks again.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmark.typed import build

OK, SKIPPED, OOM, ERROR, TIMEOUT = "ok", "skipped", "oom", "error", "timeout"
SETTLED = (OK, SKIPPED)


@dataclass(frozen=True)
class Record:
    """One answer, or why there is none.

    The first five fields identify it within its group; the baseline is measured once a group.

    Args:
        model_type: technique as named on the command line.
        dataset: data set.
        batch_size: prompts asked for at once; the last request of a set may have fewer.
        prompt_id: id of the example within its set.
        repeat: from 0 to `num_runs` - 1.
        group: which set of workers ran side by side.
        request: the request this answer belongs to.
        request_size: prompts of that request.
        call: index of the model call within the request; its answers share `ttft_s` and `total_s`.
        status: `ok`; `skipped` (this prompt cannot be answered); `oom`, `error`, `timeout` (the cell ended here).
        reason: why there is no answer.
        prompt_tokens: length of the prompt after any truncation.
        token_ids: ids emitted, the end-of-text token included, padding not.
        text: the answer as text.
        ttft_s: seconds from the call to its first token.
        total_s: seconds of the call, prefill and decoding, device synchronised at both edges.
        wall_s: seconds of the whole request by the worker's clock, text to ids and back included.
        steps: decode steps in which this answer took part (nodes, accepted, emitted, seconds); None if not recorded.
        finish_reason: `eos`, `length` or `limit`.
        fallbacks: paths that ran in place of those asked for.
        truncated: the prompt was cut to fit the model.
        peak_memory_bytes: highest memory of the call.
        kv_bytes: size of the cache at the end of the call.
        draft_nodes: nodes of the draft tree that was used; None where our engine drafts nothing.
        draft_source: who decided that number: `given` (a flag), `tuned` (the checkpoint knows this device), `tuned at load`
            (measured before the first answer) or `default`.
        runner: how our engine ran its steps, `eager` or `cuda graph`; None for upstream's loop.
        capture_s: seconds that capturing graphs for this batch size took, in none of the times above.
        capture_bytes: device memory that these graphs hold.
        phases_s: seconds by phase, in the breakdown run only.
        acceptance_ratio: share of right drafts, in the acceptance sweep only.
    """

    model_type: str
    dataset: str
    batch_size: int
    prompt_id: str
    repeat: int
    group: int
    request: str
    request_size: int
    call: int = 0
    status: str = OK
    reason: str | None = None
    prompt_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    ttft_s: float | None = None
    total_s: float | None = None
    wall_s: float | None = None
    steps: tuple[Mapping[str, float | None], ...] | None = None
    finish_reason: str | None = None
    fallbacks: tuple[str, ...] = ()
    truncated: bool = False
    peak_memory_bytes: int | None = None
    kv_bytes: int | None = None
    draft_nodes: int | None = None
    draft_source: str | None = None
    runner: str | None = None
    capture_s: float | None = None
    capture_bytes: int | None = None
    phases_s: Mapping[str, float] | None = None
    acceptance_ratio: float | None = None

    @property
    def identity(self) -> tuple[str, str, int, str, int, int, float | None]:
        """What no two records of a file share."""
        return (
            self.model_type, self.dataset, self.batch_size, self.prompt_id, self.repeat, self.group,
            self.acceptance_ratio,
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Returns the record as JSON types, without the fields of the other kinds of run."""
        values = asdict(self)
        return {name: value for name, value in values.items() if name not in RARE_FIELDS or value is not None}


RARE_FIELDS = ("phases_s", "acceptance_ratio")


def from_json(values: Mapping[str, Any]) -> Record:
    """Returns the record that a line holds. Raises TypeError if it is of another kind."""
    return build(Record, values)


def settled(records: Iterable[Record]) -> list[Record]:
    """Returns the records worth keeping on resume: of whole requests that did not fail, each identity once, in order."""
    unique: dict[Any, Record] = {}
    for record in records:
        if record.status in SETTLED:
            unique.setdefault(record.identity, record)
    sizes = Counter(record.request for record in unique.values())
    return [record for record in unique.values() if sizes[record.request] == record.request_size]


def done_requests(records: Iterable[Record]) -> set[str]:
    """Returns the ids of the requests that need not be made again."""
    return {record.request for record in settled(records)}
