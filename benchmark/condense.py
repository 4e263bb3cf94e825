"""Copies the part of a run that is committed: small, without answers, without paths or names of the machine."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmark.files import write_atomically, write_json
from benchmark.prompt_results import to_table
from benchmark.redaction import redact
from benchmark.saved_run import SavedRun, read_object

ABSOLUTE_PREFIX = re.compile(r"(?<![\w./])/(?:[^\s/:,;'\"]+/)+")
MACHINE_KEY = re.compile(r"hostname|^node$|^user$|^cwd$|^pid$", re.IGNORECASE)


def condense(run: SavedRun, destination: Path, model_label: str | None = None) -> Path:
    """Writes `summary.json`, `config.json`, `environment.json` and `prompts.json` to `destination/<run_name>`.

    Args:
        run: the run to copy.
        destination: folder of committed results.
        model_label: the model in words, stored in the copy of the config so that figures quote it from now on.

    Returns:
        The folder written.
    """
    folder = destination / run.name
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(run.config) | ({"model_label": model_label} if model_label else {})
    write_json(folder / "summary.json", without_machine(read_object(run.path / "summary.json")))
    write_json(folder / "config.json", without_machine(config))
    write_json(folder / "environment.json", without_machine(run.environment))
    write_atomically(
        folder / "prompts.json", json.dumps(to_table(run.prompts)).replace("], [", "],\n[") + "\n"
    )
    return folder


def without_machine(value: Any) -> Any:
    """Returns a JSON value with absolute paths cut to their last part and private entries left out."""
    if isinstance(value, Mapping):
        return {key: without_machine(item) for key, item in value.items() if not MACHINE_KEY.search(str(key))}
    if isinstance(value, list | tuple):
        return [without_machine(item) for item in value]
    return ABSOLUTE_PREFIX.sub("", redact(value)) if isinstance(value, str) else value
