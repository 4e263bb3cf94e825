"""The folder of a study: what it stands on, a line a measured unit and plan, and whether a rerun may go on with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmark.errors import RunError, UsageError
from benchmark.files import Appender, read_json, read_lines, write_json, write_lines

CONFIG, UNITS, POINTS = "config.json", "units.jsonl", "plans.jsonl"
VERSION = 1


class StudyFiles:
    """Reads and writes a study's folder; nothing is written before :meth:`begin`.

    Args:
        folder: the study's own; it need not be there.
        resume: go on with what an earlier call measured, instead of measuring anew.
    """

    def __init__(self, folder: Path, resume: bool) -> None:
        self.folder, self.resume = folder, resume

    def check(self, basis: Mapping[str, Any]) -> None:
        """Raises UsageError if the folder holds a study on another basis, or something that is none.

        Args:
            basis: everything that decides a measurement: flags, checkpoint, text.
        """
        path = self.folder / CONFIG
        if not self.resume or not path.exists():
            if self.resume and (self.folder / UNITS).exists():
                raise UsageError(f"{self.folder} has {UNITS} but no {CONFIG}; add --no-resume to start anew.")
            return
        try:
            saved = read_json(path)
        except ValueError:
            saved = None
        if not isinstance(saved, dict) or saved.get("version") != VERSION:
            raise UsageError(
                f"{path} is no study's of this version; give another --output_dir, or --no-resume."
            )
        before = saved["basis"]
        changed = [
            f"{name} {before.get(name)} -> {value}"
            for name, value in basis.items()
            if before.get(name) != value
        ]
        if changed:
            raise UsageError(
                f"{self.folder} holds a study on another basis ({', '.join(changed)}); give the same flags, another "
                "--output_dir, or --no-resume to start anew."
            )

    def begin(self, basis: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Writes what the study stands on; lines of an earlier study go, unless this one resumes it.

        Args:
            basis: everything that decides a measurement.
            about: what else `config.json` says.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.resume:
            for name in (UNITS, POINTS):
                (self.folder / name).unlink(missing_ok=True)
        write_json(self.folder / CONFIG, {"version": VERSION, "basis": dict(basis), **about})

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Returns the whole lines of a file, and leaves only these in it: a call may have been killed while it wrote.

        Raises:
            RunError: a line before the last cannot be parsed.
        """
        path = self.folder / name
        try:
            found = list(read_lines(path, dict))
        except ValueError as error:
            raise RunError(f"{error}; delete that line, or add --no-resume to start anew.") from None
        if path.exists():
            write_lines(path, found)
        return found

    def appender(self, name: str) -> Appender:
        """Returns what appends lines to a file."""
        return Appender(self.folder / name)
