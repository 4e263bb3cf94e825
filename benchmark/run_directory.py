"""One run's directory: its name, its files, and whether an earlier run in it is the same one."""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmark.config import PLACE_FIELDS, RunConfig
from benchmark.errors import RunError, UsageError
from benchmark.files import Read, read_json, read_lines, write_atomically, write_json, write_lines
from benchmark.records import Record, from_json, settled

SCHEMA_VERSION = 1
RECORD_FILES = ("records", "warmup", "breakdown", "sweep")
OTHER_FILES = (
    "config.json",
    "environment.json",
    "techniques.json",
    "divergences.jsonl",
    "perplexity.jsonl",
    "summary.json",
    "summary.csv",
)

SAVED: dict[str, Any] = {
    "flags_given": dict,
    "techniques": dict,
    "skipped": dict,
    "groups": list,
    "data_source": dict,
    "data_fingerprint": dict,
    "model_name_or_path": str,
    "random_weights": bool,
}  # what resuming and showing a run takes from its config.json


@dataclass(frozen=True)
class RunDirectory:
    """The files of a run.

    Args:
        path: the directory.
    """

    path: Path

    def file(self, name: str) -> Path:
        """Returns the path of one of its files."""
        return self.path / name

    def records(self, kind: str = "records") -> list[Record]:
        """Returns the records of `records`, `warmup`, `breakdown` or `sweep`; a torn last line is left out.

        Raises:
            RunError: another line is no record.
        """
        return self.lines(f"{kind}.jsonl", from_json)

    def lines(self, name: str, read: Callable[[dict[str, Any]], Read]) -> list[Read]:
        """Returns what the lines of a file hold, as `read_lines` reads them.

        Raises:
            RunError: a line that is not torn cannot be read.
        """
        try:
            return list(read_lines(self.file(name), read))
        except ValueError as error:
            raise RunError(f"{error}; delete that line, or add --overwrite to start anew.") from None

    def repair(self, kind: str) -> list[Record]:
        """Returns the records worth keeping, and leaves only these in the file: torn and failed ones are asked for anew."""
        kept = settled(self.records(kind))
        write_lines(self.file(f"{kind}.jsonl"), (record.as_json() for record in kept))
        return kept

    def loaded(self) -> dict[str, dict[str, Any]]:
        """Returns technique -> what its worker said when it had loaded.

        Raises:
            RunError: the file is damaged.
        """
        path = self.file("techniques.json")
        if not path.exists():
            return {}
        loaded = self.read(path.name)
        if not all(isinstance(values, dict) for values in loaded.values()):
            raise RunError(f"{path} holds no objects; add --overwrite to start anew.")
        return loaded

    def read(self, name: str, **wanted: type) -> dict[str, Any]:
        """Returns the JSON object in one of its files.

        Args:
            name: the file.
            wanted: fields that it must have, with their types.

        Raises:
            RunError: it is missing, damaged, or something else.
        """
        path = self.file(name)
        if not path.exists():
            raise RunError(f"{path} is missing; put it back, or add --overwrite to start anew.")
        try:
            values = read_json(path)
        except (ValueError, RecursionError) as error:
            raise RunError(f"{path} cannot be read ({error}); add --overwrite to start anew.") from None
        if not isinstance(values, dict):
            raise RunError(f"{path} holds no object; add --overwrite to start anew.")
        for field, kind in wanted.items():
            if not isinstance(values.get(field), kind):
                raise RunError(f"{path} has no usable '{field}'; add --overwrite to start anew.")
        return values

    def save_loaded(self, loaded: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds what workers said when they had loaded."""
        before = self.loaded()
        if any(before.get(name) != values for name, values in loaded.items()):
            write_json(self.file("techniques.json"), before | dict(loaded))

    def clear(self) -> None:
        """Deletes what an earlier run wrote, and nothing else; logs are emptied, since a new worker may hold one open."""
        names = [*OTHER_FILES, *(f"{kind}.jsonl" for kind in RECORD_FILES)]
        for path in [*map(self.file, names), *self.path.glob("figures/*.png")]:
            path.unlink(missing_ok=True)
        for path in self.path.glob("worker_*.log"):
            os.truncate(path, 0)


def run_name(config: RunConfig, fingerprint: str, today: date) -> str:
    """Returns the run's name: the one asked for, else date and hash of all that decides results.

    A run of the same hash that did not finish is resumed under the date it began on.
    """
    if config.run_name is not None:
        return config.run_name
    text = json.dumps(config.decides_results() | {"checkpoint": fingerprint}, sort_keys=True)
    digest = sha256(text.encode()).hexdigest()[:8]
    earlier = sorted(path for path in Path(config.output_dir).glob(f"????-??-??_{digest}") if path.is_dir())
    if config.resume and earlier and not (earlier[-1] / "summary.json").exists():
        return earlier[-1].name
    return f"{today.isoformat()}_{digest}"


def make(config: RunConfig, name: str) -> RunDirectory:
    """Makes the directory and checks that files can be written in it.

    Raises:
        UsageError: a file is in the way.
        RunError: the place cannot be written.
    """
    path = Path(config.output_dir) / name
    _make_folder(path)
    return RunDirectory(path)


@contextmanager
def output_folder(path: Path) -> Iterator[None]:
    """Makes a program's folder, and checks that files can be written in it, before it measures; left empty, it goes again.

    Raises:
        UsageError: it cannot be made, or not be written.
    """
    made = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
    try:
        try:
            _make_folder(path)
        except RunError as error:
            raise UsageError(str(error)) from None
        yield
    finally:
        for folder in made:
            with suppress(OSError):  # it holds something
                folder.rmdir()


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / ".probe", "x" * 4096)
        (path / ".probe").unlink()
    except (FileExistsError, NotADirectoryError):
        raise UsageError(
            f"--output_dir: {path} cannot be a folder, a file is in the way; choose another."
        ) from None
    except OSError as error:
        raise RunError(describe_os_error(error, path)) from None


def check_same(directory: RunDirectory, config: RunConfig, fingerprint: str) -> dict[str, Any] | None:
    """Returns the saved config of an earlier run of the same options, None where there is no earlier run.

    Raises:
        UsageError: the earlier run had other options, which are named, or resuming is off.
        RunError: its config is damaged.
    """
    if not directory.file("config.json").exists():
        if directory.file("records.jsonl").exists():
            raise UsageError(
                f"{directory.path} holds records without a config.json; add --overwrite to start anew."
            )
        return None
    saved = directory.read("config.json")
    if not config.resume:
        raise UsageError(
            f"{directory.path} holds an earlier run; add --overwrite, or give another --run_name."
        )
    if saved.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(
            f"{directory.path} was written by another version of this project (schema {saved.get('schema_version')}, "
            f"expected {SCHEMA_VERSION}); give another --run_name, or --overwrite."
        )
    directory.read("config.json", **SAVED)
    asked = saved["flags_given"]
    now = config.decides_results()
    differing = [
        f"--{name}" for name in sorted({*now, *asked} - set(PLACE_FIELDS)) if now.get(name) != asked.get(name)
    ]
    if differing:
        changes = ", ".join(f"{flag} {_shown(asked, flag)} -> {_shown(now, flag)}" for flag in differing)
        raise UsageError(
            f"{directory.path} was begun with other options ({changes}); give the same, another --run_name, or --overwrite."
        )
    if saved.get("checkpoint_fingerprint") != fingerprint:
        raise UsageError(
            f"{directory.path} was begun with other weights in {config.model_name_or_path}{_assistant(config)}, or with another "
            "tokenizer or generation_config.json there; give another --run_name, or --overwrite."
        )
    return saved


def _assistant(config: RunConfig) -> str:
    return f" or {config.assistant_model}" if config.assistant_model else ""


def _shown(values: Mapping[str, Any], flag: str) -> str:
    value = values.get(flag[2:])
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def describe_os_error(error: OSError, path: Path | str | None = None) -> str:
    """Returns what a failed write means for the user, in one line; `path` is given where the output folder was made."""
    place = error.filename or path or "the output folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full or a size limit is reached at {place} ({error.strerror}): free space, then run again."
    if path is not None or error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{place} cannot be written ({error.strerror}): choose another --output_dir."
    return f"{place}: {error.strerror or error}"
