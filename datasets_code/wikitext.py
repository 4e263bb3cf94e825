"""WikiText-2 raw: Wikipedia articles as one running text, for perplexity (Merity et al., ICLR 2017).

The text is the hub's rows joined by a blank line, as upstream's documented recipe has it; rows made from the official file are
the hub's own, so the text does not depend on where it came from. It is no data set of prompts: nothing is asked or scored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets_code.files import read_text
from datasets_code.hub import HubSource
from datasets_code.sources import SOURCES, DataError, MissingDataError, RowSource, check_choice

SPLIT = "test"
FILES = ("raw/wiki.test.raw", "wiki.test.raw")
BETWEEN_ROWS = "\n\n"


@dataclass(frozen=True)
class LoadedText:
    """A running text, and where it came from.

    Attributes:
        text: all of it.
        source: 'data_dir:<folder>', 'hub:<repository>@<revision>' or 'samples'.
        note: why an earlier source was not used; empty if the first choice was.
    """

    text: str
    source: str
    note: str = ""


class WikiText2(RowSource):
    """The raw test text. The project's own sample has its form, a few short articles written for it, and is no WikiText."""

    name = "wikitext-2"
    flag = "--perplexity"
    hub = HubSource("Salesforce/wikitext", config="wikitext-2-raw-v1")

    def read(self, folder: Path, split: str) -> list[Any]:  # noqa: ARG002 - there is one file
        """Returns one row a line of the official file, as the hub has them: a blank line is an empty text.

        Raises:
            MissingDataError: if the file is neither in the folder nor in its `raw/`.
            DataError: if it cannot be read.
        """
        paths = [folder / name for name in FILES]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise MissingDataError(
                f"{paths[-1]} not found; expected WikiText-2's raw test file there or as {paths[0]}."
            )
        lines = read_text(path).split("\n")
        return [{"text": line} for line in (lines if lines[-1] else lines[:-1])]

    def load(self, data_dir: Path | None = None, source: str = "auto") -> LoadedText:
        """Returns the test text.

        Args:
            data_dir: folder that holds `wikitext-2/`.
            source: 'auto' takes `data_dir` where given, else the hub, else the own sample.

        Raises:
            ValueError: for an unknown source. MissingDataError: if `data_dir` or the file in it does not exist.
            DataError: if the text cannot be read or is blank, or if the hub was asked for and is out of reach.
        """
        check_choice("source", source, SOURCES)
        rows, origin, note = self.raw_rows(SPLIT, data_dir, source)
        text = BETWEEN_ROWS.join(self._texts(rows, origin))
        if not text.strip():
            raise DataError(f"{self.name} {SPLIT} ({origin}) holds no text; fetch the file again.")
        return LoadedText(text, origin, note)

    def _texts(self, rows: Iterable[Any], origin: str) -> Iterable[str]:
        """Yields each row's text: with its line end, or empty where it is blank."""
        for index, row in enumerate(rows):
            text = row.get("text") if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise DataError(f"{self.name} {SPLIT} ({origin}): row {index} has no field 'text'.")
            yield text.rstrip("\r\n") + "\n" if text.strip() else ""
