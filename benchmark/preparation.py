"""Everything that must hold before a model loads: names, folders, checkpoint, data; and the plan that follows from them."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmark import checkpoint as checkpoints
from benchmark.answers import Examples
from benchmark.assistant import open_assistant
from benchmark.checkpoint import Checkpoint, positions_of
from benchmark.config import WIKITEXT2, RunConfig
from benchmark.errors import RunError, UsageError
from benchmark.hub_checkpoint import fetch
from benchmark.plan import Contender, RunPlan, make_groups
from benchmark.selection import Selection, estimates, needs_assistant
from datasets_code import (
    DATASETS,
    DataError,
    Dataset,
    LoadedSet,
    LoadedText,
    MissingDataError,
    WikiText2,
    get_dataset,
)

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[1]
SPLIT = "test"
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Data:
    """The prompts of a run and what scores their answers.

    Args:
        sets: data set -> what scores it.
        loaded: data set -> examples, source, skipped rows.
        text: the running text whose perplexity is asked for, None where none is.
    """

    sets: Mapping[str, Dataset]
    loaded: Mapping[str, LoadedSet]
    text: LoadedText | None = None

    @property
    def examples(self) -> Examples:
        """Data set -> prompt id -> example."""
        return {name: {item.id: item for item in part.examples} for name, part in self.loaded.items()}

    @property
    def prompt_ids(self) -> dict[str, tuple[str, ...]]:
        """Data set -> ids of its prompts."""
        return {name: tuple(item.id for item in part.examples) for name, part in self.loaded.items()}

    def skipped_rows(self) -> dict[str, list[dict[str, Any]]]:
        """Returns data set -> rows that were left out, with their reasons."""
        rows = {
            name: [{"index": row.index, "reason": row.reason} for row in part.skipped]
            for name, part in self.loaded.items()
        }
        return {name: skipped for name, skipped in rows.items() if skipped}

    def as_json(self) -> dict[str, Any]:
        """Returns what `config.json` says of the data."""
        parts: dict[str, LoadedSet | LoadedText] = dict(self.loaded)
        if self.text is not None:
            parts[WIKITEXT2] = self.text
        return {
            "data_source": {name: part.source for name, part in parts.items()},
            "data_fingerprint": {name: _fingerprint(part) for name, part in parts.items()},
            "data_notes": {name: part.note for name, part in parts.items() if part.note},
        }


def _fingerprint(part: LoadedSet | LoadedText) -> str:
    if isinstance(part, LoadedText):
        text = part.text
    else:
        text = "\0".join(f"{item.id}\0{item.prompt.text}\0{item.references}" for item in part.examples)
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def check_data_flags(config: RunConfig) -> None:
    """Raises UsageError for an unknown data set, or a `--data_dir` that is not there or not what they read."""
    for name in config.datasets:
        if name not in DATASETS:
            raise UsageError(f"--datasets got '{name}', expected some of {', '.join(DATASETS)}.")
    if config.data_dir is None:
        return
    folder_only = [name for name in config.datasets if not DATASETS[name].takes_file]
    if not Path(config.data_dir).is_dir() and (folder_only or not Path(config.data_dir).is_file()):
        raise UsageError(
            f"--data_dir {config.data_dir} is not a folder; give the one that holds the release files."
        )


def check_draft_nodes(config: RunConfig, model_config: Mapping[str, Any]) -> None:
    """Raises UsageError for a draft tree with more nodes than the model has positions."""
    positions = positions_of(model_config)
    if config.draft_nodes != "auto" and positions and int(config.draft_nodes) > positions:
        raise UsageError(
            f"--draft_nodes got {config.draft_nodes}, expected at most {positions}: the model has no more positions."
        )


def open_checkpoint(config: RunConfig) -> Checkpoint:
    """Returns the checkpoint of a run, and its assistant where a technique drafts with one, after their checks.

    Raises:
        UsageError: there is none of this name, or the assistant has another vocabulary.
        RunError: one is unsafe, incomplete or corrupt.
    """
    path = checkpoints.locate(config.model_name_or_path, ROOT) or fetch(config.model_name_or_path)
    model = checkpoints.inspect(path, config.random_weights)
    return model.with_assistant(open_assistant(config, model, ROOT)) if needs_assistant(config) else model


def load_data(config: RunConfig) -> Data:
    """Returns the prompts of all data sets, and the running text where one is asked for.

    Raises:
        UsageError: a folder that was asked for is missing.
        RunError: data that cannot be read.
    """
    folder = Path(config.data_dir) if config.data_dir else None
    try:
        text = _load_text(folder) if WIKITEXT2 in config.perplexity else None
        sets = {name: _dataset(name, config) for name in config.datasets}
        loaded = {name: one.load(SPLIT, folder, config.limit, config.seed) for name, one in sets.items()}
    except MissingDataError as error:
        raise UsageError(str(error)) from None
    except DataError as error:
        raise RunError(str(error)) from None
    for name, part in loaded.items():
        _tell(name, part)
    return Data(sets, loaded, text)


def _dataset(name: str, config: RunConfig) -> Dataset:
    return get_dataset(name, **({"prompt_tokens": config.prompt_tokens} if name == "synthetic" else {}))


def _load_text(folder: Path | None) -> LoadedText:
    text = WikiText2().load(folder)
    logger.info("%s: %d characters from %s", WIKITEXT2, len(text.text), _origin(text))
    return text


def _tell(name: str, part: LoadedSet) -> None:
    logger.info("%s: %d prompts from %s", name, len(part.examples), _origin(part))
    if part.skipped:
        first, count = part.skipped[0], len(part.skipped)
        logger.warning("%s: %d rows skipped, the first is row %d: %s", name, count, first.index, first.reason)


def _origin(part: LoadedSet | LoadedText) -> str:
    return f"{part.source} ({part.note})" if part.note else part.source


def first_plan(
    config: RunConfig, selection: Selection, data: Data, checkpoint: Checkpoint, machine: Mapping[str, Any]
) -> tuple[RunPlan, dict[str, Any]]:
    """Returns the plan of a new run, and what `config.json` says of its groups.

    Args:
        config: the run's options.
        selection: its techniques.
        data: its prompts.
        checkpoint: tells how large a worker gets.
        machine: tells how much memory there is.
    """
    names = list(selection.contenders)
    on_device = machine["device"] != "cpu"
    memory = estimates(
        selection.contenders,
        parameters_of(checkpoint),
        on_device,
        parameters_of(checkpoint.assistant) if checkpoint.assistant else 0,
    )
    budget = int(machine["free_bytes"] * MEMORY_SHARE)
    groups = make_groups(names[0], names[1:], memory, budget)
    plan = RunPlan(
        groups,
        data.prompt_ids,
        config.batch_size,
        config.num_runs,
        selection.contenders,
        config.seed,
        config.temperature == 0,
    )
    if len(groups) > 1:
        logger.info("%d groups, since not all workers fit %.1f GiB at once", len(groups), budget / 2**30)
    return plan, {"worker_bytes_estimated": memory, "memory_budget_bytes": budget}


def saved_plan(config: RunConfig, saved: Mapping[str, Any], data: Data) -> RunPlan:
    """Returns the plan of a run that is resumed, as its `config.json` holds it.

    Raises:
        UsageError: the prompts are others than those the run began with.
    """
    before, now = saved["data_fingerprint"], data.as_json()["data_fingerprint"]
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise UsageError(
            f"the prompts of {', '.join(changed)} are not those this run began with ({saved['data_source']}); "
            "restore the data, or give another --run_name, or --overwrite."
        )
    contenders = {
        name: Contender(name, values["recipe"], values.get("twin"), values.get("largest_batch"))
        for name, values in saved["techniques"].items()
    }
    groups = tuple(tuple(names) for names in saved["groups"])
    return RunPlan(
        groups,
        data.prompt_ids,
        config.batch_size,
        config.num_runs,
        contenders,
        config.seed,
        config.temperature == 0,
    )


def parameters_of(checkpoint: Checkpoint) -> int:
    """Returns a checkpoint's parameters; about how many its config describes, where there are no weights to count."""
    if checkpoint.parameters:
        return checkpoint.parameters
    config = checkpoint.config
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 0)
    layers = int(config.get("num_hidden_layers") or config.get("num_layers") or config.get("n_layer") or 0)
    return 12 * layers * hidden * hidden + int(config.get("vocab_size") or 0) * hidden


def resolved(config: RunConfig, machine: Mapping[str, Any]) -> RunConfig:
    """Returns the options with `auto` replaced by what it meant on this machine."""
    device = str(machine["device"])
    dtype = config.dtype if config.dtype != "auto" else ("float32" if device == "cpu" else "bfloat16")
    return replace(config, device=device, dtype=dtype)
