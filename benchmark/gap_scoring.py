"""Asks the baseline how close its choice was wherever another technique's tokens first leave its own."""

import logging
import math
from dataclasses import asdict, replace

from benchmark import divergence
from benchmark.answers import Examples, limits
from benchmark.config import RunConfig
from benchmark.crew import Crew
from benchmark.divergence import Divergence
from benchmark.files import write_lines
from benchmark.records import OK, Record
from benchmark.run_directory import RunDirectory
from benchmark.worker_client import WorkerError

logger = logging.getLogger(__name__)


def score_divergences(
    config: RunConfig, baseline: str, examples: Examples, crew: Crew, directory: RunDirectory
) -> list[Divergence]:
    """Returns the first differences to the baseline, each with its gap, and saves them as `divergences.jsonl`.

    Args:
        config: the run's options.
        baseline: the technique whose worker is asked.
        examples: data set -> prompt id -> example.
        crew: the workers.
        directory: the run's files.
    """
    records = directory.records()
    found = list(divergence.divergences(records, baseline))
    before = directory.lines("divergences.jsonl", divergence.from_json)
    known = {item.identity: item for item in before if item.gap is not None}
    answers = {_key(record): record for record in records if _is_reference(record, baseline)}
    result = []
    for item in found:
        reference = answers[item.dataset, item.batch_size, item.group, item.prompt_id]
        result.append(known.get(item.identity) or _scored(item, reference, config, examples, crew))
    write_lines(directory.file("divergences.jsonl"), map(asdict, result))
    return result


def _scored(
    item: Divergence, reference: Record, config: RunConfig, examples: Examples, crew: Crew
) -> Divergence:
    """Returns a divergence with the baseline's margin at its place; without one where the baseline's answer had ended."""
    if item.baseline_token is None:
        return item
    example = examples[item.dataset][item.prompt_id]
    try:
        scores = crew.ask(
            reference.model_type,
            "score",
            config.timeout_s,
            prompt=example.prompt.text,
            token_ids=list(reference.token_ids[: item.position + 1]),
            limits=limits(config, 0),
            prompt_tokens=example.context.get("prompt_tokens"),
        )
    except WorkerError as error:
        logger.warning("no gap for %s on %s: %s", item.model_type, item.prompt_id, error)
        return item
    gap = scores["margins"][item.position]
    return replace(item, gap=gap if math.isfinite(gap) else None)


def _is_reference(record: Record, baseline: str) -> bool:
    return record.model_type == baseline and record.status == OK and record.repeat == 0


def _key(record: Record) -> tuple[str, int, int, str]:
    return record.dataset, record.batch_size, record.group, record.prompt_id
