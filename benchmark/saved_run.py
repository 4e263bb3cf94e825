"""Reads one run directory, full or condensed, into one plain object for tables, figures and the page.

The one idea: everything that is drawn comes through `load_run`, so a figure in the README and a figure on the
measuring machine are made from the same few JSON files. Nothing here imports torch or touches a device.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmark.files import read_lines
from benchmark.prompt_results import PromptResult, from_records, from_table
from benchmark.records import OK, Record, from_json
from benchmark.summary import SummaryRow
from benchmark.typed import build

ROW_FIELDS = ("model_type", "dataset", "batch_size", "status")


class ResultsError(ValueError):
    """A run directory that is missing, incomplete or unreadable; the message says which file and what to do."""


@dataclass(frozen=True)
class SavedRun:
    """What one run left behind.

    Args:
        path: the run directory.
        config: every flag as resolved, and the model's own config.
        environment: versions, device, driver, commit.
        rows: the summary's rows, in plan order.
        sweep: points of the acceptance sweep, empty where none was asked for.
        records: the answers; empty in a condensed directory.
        prompts: one entry per drafting technique, data set and prompt, paired with the baseline.
    """

    path: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]
    sweep: tuple[Mapping[str, Any], ...]
    records: tuple[Record, ...]
    prompts: tuple[PromptResult, ...]

    @property
    def name(self) -> str:
        """The run's name: its directory's."""
        return self.path.resolve().name

    @property
    def baseline(self) -> str:
        """The technique every ratio is taken against: the first of the run."""
        return str(self.rows[0]["model_type"]) if self.rows else "baseline"

    @cached_property
    def techniques(self) -> tuple[str, ...]:
        """Technique names in plan order, each once."""
        return tuple(dict.fromkeys(str(row["model_type"]) for row in self.rows))

    @cached_property
    def datasets(self) -> tuple[str, ...]:
        """Data set names in plan order, each once."""
        return tuple(dict.fromkeys(str(row["dataset"]) for row in self.rows))

    @cached_property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes, smallest first."""
        return tuple(sorted({int(row["batch_size"]) for row in self.rows}))

    def row(self, model_type: str, dataset: str, batch_size: int) -> Mapping[str, Any] | None:
        """Returns the first row of that cell (the baseline may stand in several groups), or None."""
        wanted = (model_type, dataset, batch_size)
        found = (row for row in self.rows if (row["model_type"], row["dataset"], row["batch_size"]) == wanted)
        return next(found, None)

    def ok_rows(self) -> list[Mapping[str, Any]]:
        """Returns the rows that were measured."""
        return [row for row in self.rows if is_measured(row)]


def is_measured(row: Mapping[str, Any] | None) -> bool:
    """Returns whether a row holds a speed."""
    return row is not None and row["status"] == OK and bool(row.get("tokens_per_s"))


def load_run(path: Path) -> SavedRun:
    """Returns the run saved in a directory.

    Raises:
        ResultsError: the directory or its summary is missing, or a file is not what `docs/measurement.md` describes.
    """
    if not path.is_dir():
        raise ResultsError(
            f"no run directory at {path}: give a folder that dataset_tps.py wrote, results/<run_name>"
        )
    summary = read_object(path / "summary.json")
    rows = _rows(summary, path / "summary.json")
    records = tuple(read_records(path / "records.jsonl"))
    return SavedRun(
        path=path,
        config=read_object(path / "config.json", required=False),
        environment=read_object(path / "environment.json", required=False),
        rows=rows,
        sweep=tuple(summary.get("acceptance_sweep") or ()),
        records=records,
        prompts=_prompts(path, records, rows),
    )


def read_object(path: Path, *, required: bool = True) -> dict[str, Any]:
    """Returns the JSON object in a file; an empty one when the file may be absent and is.

    Raises:
        ResultsError: the file is absent, unreadable, or holds something else.
    """
    if not path.exists():
        if required:
            raise ResultsError(
                f"{path} is missing: let dataset_tps.py finish this run first (a rerun resumes it)"
            )
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultsError(
            f"{path} cannot be read ({error}): rerun dataset_tps.py to write it anew"
        ) from error
    if not isinstance(content, dict):
        raise ResultsError(
            f"{path} holds a {type(content).__name__}, expected an object: is it a run's file?"
        )
    return content


def read_records(path: Path) -> list[Record]:
    """Returns the answers of a run; none where there is no file.

    Raises:
        ResultsError: a line is no record; a torn last one is left out.
    """
    try:
        return list(read_lines(path, from_json))
    except ValueError as error:
        raise ResultsError(f"{error}: delete that line and rerun dataset_tps.py") from None


def _rows(summary: Mapping[str, Any], path: Path) -> tuple[Mapping[str, Any], ...]:
    rows = summary.get("rows")
    if not isinstance(rows, list):
        raise ResultsError(f"{path} has no list under 'rows': is it a summary that dataset_tps.py wrote?")
    for index, row in enumerate(rows):
        missing = [field for field in ROW_FIELDS if not isinstance(row, dict) or field not in row]
        if missing:
            raise ResultsError(f"{path}: row {index} has no {', '.join(missing)}: rerun dataset_tps.py")
        try:
            build(SummaryRow, row)
        except TypeError as error:
            raise ResultsError(f"{path}: row {index} is damaged ({error}): rerun dataset_tps.py") from None
    return tuple(rows)


def _prompts(
    path: Path, records: tuple[Record, ...], rows: tuple[Mapping[str, Any], ...]
) -> tuple[PromptResult, ...]:
    if records and rows:
        drafting = {str(row["model_type"]) for row in rows if row.get("acceptance_length") is not None}
        return tuple(from_records(records, str(rows[0]["model_type"]), drafting))
    table = read_object(path / "prompts.json", required=False)
    try:
        return tuple(from_table(table)) if table else ()
    except (KeyError, TypeError, ValueError) as error:
        where = path / "prompts.json"
        raise ResultsError(f"{where} is not a table of prompts ({error}): condense the run again") from error
