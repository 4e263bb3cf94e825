"""Computes quality again from saved answers, for a run whose machine lacked the score packages or the databases."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmark.files import write_csv, write_json
from benchmark.records import OK
from benchmark.saved_run import SavedRun, read_object
from benchmark.table import PREFIX
from datasets_code import DataError, Dataset, Example, MissingDataError, Score, get_dataset

Cell = tuple[str, str, int]
UNSCORED = ("synthetic",)


class ScoreError(RuntimeError):
    """Quality cannot be computed from what was saved; the message says what is missing."""


def rescore(run: SavedRun, data_dir: Path | None) -> None:
    """Replaces `quality` in every row of the run's `summary.json` and `summary.csv`, first repeat of each prompt.

    Args:
        run: a full run directory: its records hold the answers' text.
        data_dir: folder with the official release files; None takes what the run used.

    Raises:
        ScoreError: no answers, other prompts than the run's, or a score package is missing.
    """
    if not run.records:
        raise ScoreError(
            f"{run.path} holds no answers to score: give the full run directory with records.jsonl"
        )
    summary = read_object(run.path / "summary.json")
    answers = _answers(run)
    for dataset in run.datasets:
        if dataset in UNSCORED:
            continue
        scorer, examples = _load(run, dataset, data_dir)
        for row in summary["rows"]:
            if row["dataset"] == dataset and row["status"] == OK:
                score = _score(scorer, examples, answers[row["model_type"], dataset, row["batch_size"]])
                row["quality"] = score.values | _perplexities(row.get("quality"))
                row["quality_unavailable"] = score.unavailable | _perplexities(row.get("quality_unavailable"))
    write_json(run.path / "summary.json", summary)
    write_csv(run.path / "summary.csv", summary["rows"])


def _perplexities(quality: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the part of a row's quality that belongs to the weights, which saved answers cannot tell anew."""
    return {name: value for name, value in (quality or {}).items() if name.startswith(PREFIX)}


def _answers(run: SavedRun) -> dict[Cell, dict[str, str]]:
    texts: dict[Cell, dict[str, str]] = defaultdict(dict)
    for record in run.records:
        if record.status == OK:
            texts[record.model_type, record.dataset, record.batch_size].setdefault(
                record.prompt_id, record.text
            )
    return texts


def _load(run: SavedRun, name: str, data_dir: Path | None) -> tuple[Dataset, dict[str, Example]]:
    """Returns the data set and the run's examples by id, drawn as the run drew them."""
    config = run.config
    folder = data_dir or (Path(config["data_dir"]) if config.get("data_dir") else None)
    source = "data_dir" if folder else _saved_source(run, name)
    try:
        dataset = get_dataset(name)
        loaded = dataset.load("test", folder, config.get("limit"), int(config.get("seed", 0)), source)
    except (DataError, MissingDataError, ValueError) as error:
        raise ScoreError(f"{name} cannot be loaded for scoring: {error}") from error
    return dataset, {example.id: example for example in loaded.examples}


def _saved_source(run: SavedRun, name: str) -> str:
    sources = run.config.get("data_source")
    saved = str(sources.get(name) if isinstance(sources, Mapping) else sources)
    return next((kind for kind in ("samples", "hub") if saved.startswith(kind)), "auto")


def _score(dataset: Dataset, examples: Mapping[str, Example], texts: Mapping[str, str]) -> Score:
    unknown = sorted(texts.keys() - examples.keys())
    if unknown:
        raise ScoreError(
            f"{dataset.name}: the data at hand has no prompt '{unknown[0]}' ({len(unknown)} of {len(texts)} unknown); "
            "give the folder the run used with --data_dir"
        )
    score = dataset.score([text.lstrip() for text in texts.values()], [examples[name] for name in texts])
    if not score.values and score.unavailable:
        metric, reason = next(iter(score.unavailable.items()))
        raise ScoreError(f"{dataset.name}: {metric} cannot be computed: {reason}")
    return score
