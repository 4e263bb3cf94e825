"""One run from options to summary. Each stage hands the next a value; nothing reaches back."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from benchmark import environment, metrics, run_directory, selection
from benchmark.checkpoint import Checkpoint
from benchmark.config import RunConfig
from benchmark.crew import Crew
from benchmark.divergence import Divergence
from benchmark.errors import EXIT_DONE, EXIT_INCOMPLETE, RunError, UsageError
from benchmark.files import write_csv, write_json
from benchmark.gap_scoring import score_divergences
from benchmark.lock import RunLock
from benchmark.measure import Measurement
from benchmark.perplexity import Told, check_flags, is_missing, measure_perplexity, with_perplexity
from benchmark.plan import Cell, RunPlan
from benchmark.preparation import (
    ROOT,
    Data,
    check_data_flags,
    check_draft_nodes,
    first_plan,
    load_data,
    open_checkpoint,
    resolved,
    saved_plan,
)
from benchmark.records import OK, SETTLED, SKIPPED, Record
from benchmark.run_directory import SCHEMA_VERSION, RunDirectory
from benchmark.summary import Facts, Quality, SummaryRow, summarise
from benchmark.typed import build

logger = logging.getLogger(__name__)


def carry_out(config: RunConfig, loader: str) -> RunDirectory:
    """Carries out a run, or the rest of it, and returns its directory with the summary written.

    Args:
        config: the options.
        loader: module that workers load techniques with.

    Raises:
        UsageError: options that cannot be, or a technique named alone that cannot run here.
        RunError: the run cannot start or go on.
    """
    selection.wanted(config)
    check_data_flags(config)
    checkpoint = open_checkpoint(config)
    check_flags(config, checkpoint.config)
    check_draft_nodes(config, checkpoint.config)
    selection.check_precision_plan(config, checkpoint.tensors)
    for flag in selection.unused_flags(config):
        logger.warning("%s is of no effect: no technique of this run takes it", flag)
    name = run_directory.run_name(config, checkpoint.fingerprint, datetime.now(UTC).date())
    directory = run_directory.make(config, name)
    with RunLock(directory.path):
        saved = (
            None if config.overwrite else run_directory.check_same(directory, config, checkpoint.fingerprint)
        )
        selection.check_same_weights(config, saved["techniques"] if saved else {})
        if saved is None or not _has_finished(directory):
            _measure(config, checkpoint, load_data(config), directory, saved, loader)
    return directory


def _has_finished(directory: RunDirectory) -> bool:
    """Returns whether a summary says that nothing is left to do; a damaged one is made anew from the records."""
    try:
        summary = directory.read("summary.json", rows=list, exit_code=int)
        rows = [build(SummaryRow, row) for row in summary["rows"]]
        return bool(rows) and is_finished(summary)
    except (RunError, TypeError, KeyError):
        return False


def is_finished(summary: Mapping[str, Any]) -> bool:
    """Returns whether a run has nothing left to do: every cell and point was measured, or cannot be here."""
    return not (
        any(_is_open(row) for row in summary["rows"])
        or any(point["status"] not in SETTLED for point in summary.get("acceptance_sweep") or ())
    )


def _is_open(row: Mapping[str, Any]) -> bool:
    """Returns whether something of a row failed that the same command asks for again."""
    return row["status"] not in SETTLED or is_missing(row) or row.get("breakdown_reason") is not None


def _measure(
    config: RunConfig,
    checkpoint: Checkpoint,
    data: Data,
    directory: RunDirectory,
    saved: Mapping[str, Any] | None,
    loader: str,
) -> None:
    load_request = {
        "checkpoint": str(checkpoint.path),
        "assistant": str(checkpoint.assistant.path) if checkpoint.assistant else None,
        "draft_nodes": config.draft_nodes,
        "random_weights": config.random_weights,
    }
    with Crew(loader, directory.path, load_request) as crew:
        machine = crew.machine(config.device, selection.wanted(config)[0])
        crew.use_device(machine["device"])
        if saved is None:
            plan, saved = _begin(config, checkpoint, data, directory, machine)
        else:
            plan = saved_plan(config, saved, data)
            _check_machine(directory, machine)
        crew.contenders = plan.contenders
        measurement = Measurement(config, plan, data.examples, crew, directory, saved["alone"])
        measurement.headline()
        if config.breakdown:
            measurement.breakdown()
        if config.acceptance_sweep:
            measurement.sweep()
        found: Sequence[Divergence] = ()
        if plan.greedy:
            found = score_divergences(config, plan.baseline, data.examples, crew, directory)
        perplexities = measure_perplexity(config, plan, data, crew, directory)
    _summarise(config, plan, data, directory, saved, found, perplexities)


def _begin(
    config: RunConfig, checkpoint: Checkpoint, data: Data, directory: RunDirectory, machine: Mapping[str, Any]
) -> tuple[RunPlan, dict[str, Any]]:
    """Returns the plan of a new run and writes down what it stands on."""
    chosen = selection.select(config, machine, checkpoint.config, checkpoint.quantized)
    if config.acceptance_sweep and not any(contender.sweeps for contender in chosen.contenders.values()):
        raise UsageError("--acceptance_sweep needs a technique that drafts with our engine: add spec_stream.")
    plan, memory = first_plan(config, chosen, data, checkpoint, machine)
    if config.overwrite:
        directory.clear()
    write_json(directory.file("environment.json"), environment.collect(machine, ROOT))
    shown = replace(resolved(config, machine), run_name=directory.path.name)
    saved: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        **shown.as_json(),
        "flags_given": config.decides_results(),
        "model_config": checkpoint.config,
        "assistant_config": checkpoint.assistant.config if checkpoint.assistant else None,
        "checkpoint_fingerprint": checkpoint.fingerprint,
        "techniques": {
            name: {"recipe": dict(one.recipe), "twin": one.twin, "largest_batch": one.largest_batch}
            for name, one in plan.contenders.items()
        },
        "skipped": dict(chosen.skipped),
        "alone": chosen.alone,
        "groups": [list(names) for names in plan.groups],
        **memory,
        **data.as_json(),
    }
    write_json(directory.file("config.json"), saved)
    return plan, saved


def _check_machine(directory: RunDirectory, machine: Mapping[str, Any]) -> None:
    before = directory.read("environment.json", device_name=str)["device_name"]
    if before != machine["device_name"]:
        raise UsageError(
            f"{directory.path} was begun on {before}, and this is {machine['device_name']}: times would not compare; "
            "give another --run_name, or --overwrite."
        )


def _summarise(
    config: RunConfig,
    plan: RunPlan,
    data: Data,
    directory: RunDirectory,
    saved: Mapping[str, Any],
    found: Sequence[Divergence],
    perplexities: Sequence[Told],
) -> None:
    records = directory.records()
    facts = Facts(
        loaded=directory.loaded(),
        skipped=saved["skipped"],
        breakdown=directory.records("breakdown"),
        divergences=found,
        random_weights=config.random_weights,
    )
    quality = with_perplexity(quality_of(records, data), perplexities)
    rows = [row.as_json() for row in summarise(records, plan, quality, facts)]
    skipped = data.skipped_rows()
    lost = bool(skipped) or any(row["prompts_skipped"] for row in rows)
    summary: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "run_name": directory.path.name,
        "exit_code": EXIT_DONE,
        "baseline": plan.baseline,
        "n_failed": sum(map(len, skipped.values())) + sum(row["prompts_skipped"] for row in rows),
        "skipped_rows": skipped,
        "rows": rows,
    }
    if config.acceptance_sweep:
        summary["acceptance_sweep"] = sweep_points(directory.records("sweep"))
    if lost or not is_finished(summary):
        summary["exit_code"] = EXIT_INCOMPLETE
    write_csv(directory.file("summary.csv"), rows)
    write_json(directory.file("summary.json"), summary)


def quality_of(records: Sequence[Record], data: Data) -> dict[Cell, Quality]:
    """Returns the scores of each cell's answers, first repeats; equal answers are scored once."""
    answers: dict[Cell, dict[str, str]] = {}
    for record in records:
        if record.status == OK and record.repeat == 0:
            cell = Cell(record.model_type, record.dataset, record.batch_size, record.group)
            answers.setdefault(cell, {})[record.prompt_id] = record.text.lstrip()
    known: dict[Any, Quality] = {}
    result = {}
    for cell, texts in answers.items():
        examples = [item for item in data.loaded[cell.dataset].examples if item.id in texts]
        predictions = tuple(texts[item.id] for item in examples)
        key = (cell.dataset, tuple(texts), predictions)
        if key not in known:
            score = data.sets[cell.dataset].score(predictions, examples)
            known[key] = Quality(dict(score.values), dict(score.unavailable))
        result[cell] = known[key]
    return result


def sweep_points(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Returns one point a technique, data set, batch size and acceptance ratio: its speed and what was accepted."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        key = (record.model_type, record.dataset, record.batch_size, record.acceptance_ratio)
        groups.setdefault(key, []).append(record)
    names = ("model_type", "dataset", "batch_size", "acceptance_ratio")
    return [dict(zip(names, key, strict=True)) | _point(part) for key, part in groups.items()]


def _point(records: Sequence[Record]) -> dict[str, Any]:
    failed = next((record for record in records if record.status not in (OK, SKIPPED)), None)
    answers = [record for record in records if record.status == OK]
    if failed is not None or not answers:
        return {
            "status": failed.status if failed else SKIPPED,
            "reason": (failed or records[0]).reason,
            "tokens_per_s": None,
        }
    requests = metrics.totals(answers).values()
    return {
        "status": OK,
        "reason": None,
        "tokens_per_s": metrics.tokens_per_s(requests),
        "decode_tokens_per_s": metrics.decode_tokens_per_s(requests),
        "acceptance_length": metrics.acceptance_length(answers),
        "acceptance_rate": metrics.acceptance_rate(answers),
    }
