"""A user's own task: JSON lines with `prompt` and `completion` (and `id`, if wanted)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets_code.base import (
    Dataset,
    Example,
    Prompt,
    Row,
    RowError,
    Score,
    describe,
    text_field,
)
from datasets_code.files import read_json_lines
from datasets_code.sources import MissingDataError
from datasets_code.text_scores import ROUGE, rouge


class JsonLines(Dataset):
    """Own data: a single file as `data_dir`, or `<data_dir>/jsonl/<split>.jsonl`."""

    name = "jsonl"
    metrics = ROUGE
    has_samples = False
    takes_file = True
    no_hub = "It takes a file of JSON lines, or a folder with jsonl/<split>.jsonl."

    def folder(self, data_dir: Path) -> Path:
        """Returns the file itself where one is given, else the folder as for any other set.

        Raises:
            MissingDataError: if it is not there.
        """
        if not data_dir.exists():
            raise MissingDataError(
                f"{data_dir} not found; expected a file of JSON lines with 'prompt' and 'completion'."
            )
        return data_dir if data_dir.is_file() else super().folder(data_dir)

    def read(self, folder: Path, split: str) -> list[Any]:
        """Returns the rows of the file, or of the split's file in the folder."""
        path = folder if folder.is_file() else folder / f"{split}.jsonl"
        if not path.is_file():
            raise MissingDataError(
                f"{path} not found; expected JSON lines with 'prompt' and 'completion' there."
            )
        return read_json_lines(path)

    def example(self, row: Row, index: int, split: str) -> Example:
        """Returns a prompt without trailing spaces, and a completion without surrounding white space.

        An empty prompt passes: whether a model can start from nothing is for the model to say.
        """
        if "prompt" not in row:
            raise RowError("field 'prompt' is missing")
        if not isinstance(row["prompt"], str):
            raise RowError(f"field 'prompt' is {describe(row['prompt'])}, expected text")
        name = row.get("id", f"{split}_{index}")
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise RowError(f"field 'id' is {describe(name)}, expected text or a number")
        return Example(
            id=str(name),
            prompt=Prompt(row["prompt"].rstrip(" ")),
            references=(text_field(row, "completion"),),
        )

    def score(self, predictions: Sequence[str], examples: Sequence[Example]) -> Score:
        """Returns ROUGE-1, ROUGE-2 and ROUGE-L against the completion."""
        return rouge(predictions, [item.references for item in examples])
