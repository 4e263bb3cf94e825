"""Perplexity as a quality column: each technique's worker says how well its own weights predict given texts.

`wikitext2` is one running text, the same for every row of a technique; `references` are those of a row's own data set, after
their prompts. All of it comes after what is timed. A line a technique and text is appended to `perplexity.jsonl`; a resumed run
asks only for what is not there, and again for what failed.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmark.checkpoint import positions_of
from benchmark.config import REFERENCES, WIKITEXT2, RunConfig
from benchmark.crew import Crew
from benchmark.errors import UsageError
from benchmark.files import Appender, write_lines
from benchmark.plan import Cell, RunPlan
from benchmark.preparation import Data
from benchmark.progress import Progress
from benchmark.records import OK, Record
from benchmark.run_directory import RunDirectory
from benchmark.summary import Quality
from benchmark.table import PREFIX
from benchmark.typed import build
from benchmark.worker_client import WorkerError

logger = logging.getLogger(__name__)
FILE = "perplexity.jsonl"
LONGEST_WINDOW = 2048  # as in `models.loading.loaded_model`, which imports torch
KINDS = {WIKITEXT2: "text", REFERENCES: "reference"}


@dataclass(frozen=True)
class Task:
    """One text that one technique is asked about.

    Args:
        model_type: the technique.
        text: `wikitext2` or `references`.
        dataset: whose references; None for a text that belongs to no data set.
    """

    model_type: str
    text: str
    dataset: str | None = None


@dataclass(frozen=True)
class Told:
    """What a worker said of a task, or why it said nothing; `models.answer.Perplexity` says what the numbers are.

    Args:
        task: what was asked.
        status: `ok`, or what went wrong.
        reason: why there is no number.
    """

    task: Task
    status: str = OK
    reason: str | None = None
    perplexity: float | None = None
    nll: float | None = None
    tokens: int = 0
    window: int | None = None
    stride: int | None = None
    skipped: int = 0

    def as_json(self) -> dict[str, Any]:
        """Returns it as JSON types, the task's fields first."""
        values = asdict(self)
        return values.pop("task") | values


def from_json(values: Mapping[str, Any]) -> Told:
    """Returns what a line of `perplexity.jsonl` holds. Raises TypeError if it is of another kind."""
    return build(Told, {**values, "task": build(Task, values)})


def check_flags(config: RunConfig, model_config: Mapping[str, Any]) -> None:
    """Raises UsageError for windows that the model cannot read, or references that no data set has."""
    if REFERENCES in config.perplexity and set(config.datasets) == {"synthetic"}:
        raise UsageError(
            "--perplexity references needs a data set with references; synthetic prompts have none."
        )
    positions = positions_of(model_config)
    if WIKITEXT2 not in config.perplexity or not positions:
        return
    window = config.perplexity_window
    if window == "auto":
        window = min(positions, LONGEST_WINDOW)
    if int(window) > positions:
        raise UsageError(
            f"--perplexity_window got {window}, expected at most {positions}: the model has no more positions."
        )
    if config.perplexity_stride != "auto" and int(config.perplexity_stride) > int(window):
        raise UsageError(
            f"--perplexity_stride got {config.perplexity_stride}, expected at most {window}, the window: "
            "tokens between windows would not be judged."
        )


def tasks(config: RunConfig, plan: RunPlan, data: Data, records: Iterable[Record]) -> Iterator[Task]:
    """Yields what is to be asked: of techniques that answered, and of the data sets they answered."""
    answered = {(record.model_type, record.dataset) for record in records if record.status == OK}
    for name in plan.contenders:
        datasets = [dataset for dataset in plan.prompt_ids if (name, dataset) in answered]
        if datasets and WIKITEXT2 in config.perplexity:
            yield Task(name, WIKITEXT2)
        if REFERENCES in config.perplexity:
            yield from (Task(name, REFERENCES, dataset) for dataset in datasets if _pairs(data, dataset))


def measure_perplexity(
    config: RunConfig, plan: RunPlan, data: Data, crew: Crew, directory: RunDirectory
) -> list[Told]:
    """Returns what the workers say of all tasks, asking for what is not on disk yet.

    Args:
        config: the run's options.
        plan: tells which techniques fit into memory together.
        data: the texts.
        crew: the workers.
        directory: the run's files.
    """
    known = _repair(directory)
    done = {told.task for told in known}
    left = [task for task in tasks(config, plan, data, directory.records()) if task not in done]
    with (
        Progress(len(left), "perplexity") as progress,
        closing(Appender(directory.file(FILE))) as file,
    ):
        for names in reversed(plan.groups):  # the last group's workers are still there
            part = [task for task in left if task.model_type in names]
            left = [task for task in left if task not in part]
            if part:
                crew.assemble(task.model_type for task in part)
            for task in part:
                told = _ask(task, config, data, crew)
                file.append([told.as_json()])
                known.append(told)
                progress.advance()
    return known


def _repair(directory: RunDirectory) -> list[Told]:
    """Returns what was answered before, and leaves only this in the file."""
    every = directory.lines(FILE, from_json)
    kept = list({told.task: told for told in every if told.status == OK}.values())
    write_lines(directory.file(FILE), (told.as_json() for told in kept))
    return kept


def _ask(task: Task, config: RunConfig, data: Data, crew: Crew) -> Told:
    request = _request(task, config, data)
    try:
        answer = crew.ask(task.model_type, f"{KINDS[task.text]}_perplexity", config.timeout_s, **request)
    except WorkerError as error:
        logger.warning("no perplexity of %s for %s: %s", task.dataset or task.text, task.model_type, error)
        return Told(task, error.status, str(error))
    return replace(Told(task), **answer)


def _request(task: Task, config: RunConfig, data: Data) -> dict[str, Any]:
    if task.dataset is not None:
        return {"pairs": _pairs(data, task.dataset)}
    assert data.text is not None
    auto = {"auto": None}
    return {
        "text": data.text.text,
        "window": auto.get(str(config.perplexity_window), config.perplexity_window),
        "stride": auto.get(str(config.perplexity_stride), config.perplexity_stride),
        "tokens": config.perplexity_tokens,
    }


def _pairs(data: Data, dataset: str) -> list[tuple[str, str]]:
    """Returns prompt and continuation of every reference."""
    return [
        (example.prompt.text, continuation)
        for example in data.loaded[dataset].examples
        for continuation in data.sets[dataset].continuations(example)
    ]


def with_perplexity(quality: Mapping[Cell, Quality], every: Sequence[Told]) -> dict[Cell, Quality]:
    """Returns the scores of cells with their technique's perplexities among them.

    Args:
        quality: scores of each cell's answers.
        every: what the workers said.
    """
    return {cell: _added(cell, scores, every) for cell, scores in quality.items()}


def _added(cell: Cell, scores: Quality, every: Sequence[Told]) -> Quality:
    values, unavailable = dict(scores.values), dict(scores.unavailable)
    for told in every:
        if told.task.model_type != cell.model_type or told.task.dataset not in (None, cell.dataset):
            continue
        name = PREFIX + told.task.text
        if told.perplexity is not None:
            values[name] = told.perplexity
        else:
            unavailable[name] = f"{told.status}: {told.reason}"
    return Quality(values, unavailable)


def is_missing(row: Mapping[str, Any]) -> bool:
    """Returns whether a summary's row lacks a perplexity that was asked for."""
    return any(name.startswith(PREFIX) for name in row.get("quality_unavailable") or ())
