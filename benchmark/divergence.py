"""Where a technique's tokens first leave the baseline's: the position, both tokens, and how close the baseline's call was."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmark.records import OK, Record
from benchmark.typed import build

Key = tuple[str, int, int, str]


@dataclass(frozen=True)
class Divergence:
    """The first difference between an answer and the baseline's, in the first repeat.

    Args:
        model_type: the technique that differs.
        dataset: data set.
        batch_size: batch size of both.
        group: group of both.
        prompt_id: the prompt.
        position: index of the first differing token.
        baseline_token: the baseline's token there, None if its answer had ended.
        token: the technique's, likewise.
        gap: the baseline model's top-1 minus top-2 logit there; a small one means that rounding decided. None if not scored.
    """

    model_type: str
    dataset: str
    batch_size: int
    group: int
    prompt_id: str
    position: int
    baseline_token: int | None
    token: int | None
    gap: float | None = None

    @property
    def identity(self) -> tuple[Any, ...]:
        """What no two divergences of a run share."""
        return self.model_type, self.dataset, self.batch_size, self.group, self.prompt_id, self.position


def from_json(values: Mapping[str, Any]) -> Divergence:
    """Returns the divergence that a line of `divergences.jsonl` holds. Raises TypeError if it is of another kind."""
    return build(Divergence, values)


def first_difference(tokens: Sequence[int], others: Sequence[int]) -> int | None:
    """Returns the first index at which two sequences differ, the shorter one's length where it is a prefix, else None."""
    for index, (token, other) in enumerate(zip(tokens, others, strict=False)):
        if token != other:
            return index
    return None if len(tokens) == len(others) else min(len(tokens), len(others))


def divergences(records: Iterable[Record], baseline: str) -> Iterator[Divergence]:
    """Yields the first difference of every answer that is not the baseline's own, first repeats only."""
    answers = [record for record in records if record.status == OK and record.repeat == 0]
    base = {_key(record): record for record in answers if record.model_type == baseline}
    for record in answers:
        reference = base.get(_key(record))
        if record.model_type == baseline or reference is None:
            continue
        position = first_difference(record.token_ids, reference.token_ids)
        if position is not None:
            yield Divergence(
                record.model_type, record.dataset, record.batch_size, record.group, record.prompt_id, position,
                _at(reference.token_ids, position), _at(record.token_ids, position),
            )  # fmt: skip


def _key(record: Record) -> Key:
    return record.dataset, record.batch_size, record.group, record.prompt_id


def _at(tokens: Sequence[int], position: int) -> int | None:
    return tokens[position] if position < len(tokens) else None
