"""Where raw rows come from: the official files, the hub, or the project's own samples, always in this order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from datasets_code.hub import HubRows, HubSource, HubUnavailable, fetch_rows

SOURCES = ("auto", "data_dir", "hub", "samples")
SAMPLES = Path(__file__).resolve().parent / "samples"

Fetch = Callable[[HubSource, str], HubRows]


class DataError(ValueError):
    """Data that cannot be read; the message holds the file, the line where there is one, and what to do."""


class MissingDataError(ValueError):
    """A folder or file that was asked for and is not there; the message names what was expected and where."""


class RowSource(ABC):
    """Something whose rows lie in official files, on the hub, or among the samples. Subclasses define `read`.

    Attributes:
        name: the folder's name under `--data_dir`.
        flag: the flag that asks for it, for messages.
        hub: where the hub keeps the same rows; None where it does not.
        no_hub: why the hub is no source, where `hub` is None.
        has_samples: whether the project carries its own samples of it.
    """

    name: ClassVar[str]
    flag: ClassVar[str] = "--datasets"
    hub: ClassVar[HubSource | None] = None
    no_hub: ClassVar[str] = ""
    has_samples: ClassVar[bool] = True

    def __init__(self, fetch: Fetch = fetch_rows) -> None:
        """Sets how rows are fetched from the hub; tests pass their own function."""
        self.fetch = fetch

    @abstractmethod
    def read(self, folder: Path, split: str) -> list[Any]:
        """Returns the raw rows of a split from a folder in the official format.

        Raises:
            DataError: for a file or line that cannot be parsed.
            MissingDataError: for a file that is not there.
        """

    def folder(self, data_dir: Path) -> Path:
        """Returns this set's folder under `data_dir`.

        Raises:
            MissingDataError: if either is not there.
        """
        if not data_dir.is_dir():
            raise MissingDataError(
                f"--data_dir {data_dir} is not a folder; give one that holds '{self.name}/'."
            )
        folder = data_dir / self.name
        if not folder.is_dir():
            raise MissingDataError(
                f"--data_dir {data_dir} has no folder '{self.name}'; expected the official files in "
                f"{folder}. Put them there, or leave '{self.name}' out of {self.flag}."
            )
        return folder

    def raw_rows(self, split: str, data_dir: Path | None, source: str) -> tuple[list[Any], str, str]:
        """Returns the raw rows, their source's name, and why an earlier source was passed over."""
        if source == "data_dir" and data_dir is None:
            raise MissingDataError(f"{self.name}: source 'data_dir' needs --data_dir.")
        if source in ("auto", "data_dir") and data_dir is not None:
            folder = self.folder(Path(data_dir))
            return self.read(folder, split), f"data_dir:{folder}", ""
        note = ""
        if source in ("auto", "hub"):
            try:
                return *self._hub_rows(split), ""
            except HubUnavailable as error:
                note = str(error)
                if source == "hub":
                    raise DataError(
                        f"{self.name}: {note}. Give the official files with --data_dir."
                    ) from error
        if not self.has_samples:
            raise MissingDataError(
                f"{self.name} has no samples of its own. Give files with --data_dir. {note}".strip()
            )
        return self.read(SAMPLES / self.name, split), "samples", note

    def _hub_rows(self, split: str) -> tuple[list[Any], str]:
        if self.hub is None:
            raise HubUnavailable(self.no_hub)
        fetched = self.fetch(self.hub, split)
        return fetched.rows, f"hub:{self.hub.repo}@{fetched.revision}"


def check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError if a value is none of the choices."""
    if value not in choices:
        raise ValueError(f"{what} '{value}' is unknown; choose from {', '.join(choices)}.")
