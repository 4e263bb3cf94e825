"""DialogSum: everyday dialogues and their summaries (Chen et al., Findings of ACL 2021)."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from datasets_code.base import Dataset, Example, Prompt, Row, RowError, Score, one_line, text_field
from datasets_code.files import read_json_lines
from datasets_code.hub import HubSource
from datasets_code.text_scores import ROUGE, rouge

FILES = {
    "train": "dialogsum.train.jsonl",
    "validation": "dialogsum.dev.jsonl",
    "test": "dialogsum.test.jsonl",
}

HUB_TEST_ID = re.compile(r"^(test_\d+)_\d+$")  # the hub's test split has a row for each reference


class DialogSum(Dataset):
    """Summarise a dialogue; the test split has three references, kept as one example with all of them."""

    name = "dialogsum"
    metrics = ROUGE
    hub = HubSource("knkarthick/dialogsum", {"id": "fname"})
    merged_splits = frozenset({"test"})

    def read(self, folder: Path, split: str) -> list[Any]:
        """Returns the rows of `dialogsum.<split>.jsonl`."""
        return read_json_lines(folder / FILES[split])

    def example(self, row: Row, index: int, split: str) -> Example:
        """Returns a dialogue with its summary, or with `summary1`, `summary2`, ... of a test row."""
        turns = "\n".join(line.strip() for line in text_field(row, "dialogue").splitlines() if line.strip())
        fields = sorted(name for name in row if re.fullmatch(r"summary\d*", str(name)))
        if not fields:
            raise RowError("field 'summary' is missing")
        references = tuple(one_line(text_field(row, name)) for name in fields)
        name = row.get("fname")
        return Example(
            id=HUB_TEST_ID.sub(r"\1", name) if isinstance(name, str) and name else f"{split}_{index}",
            prompt=Prompt(f"Dialogue:\n{turns}\nSummary:"),
            references=references,
        )

    def same_input(self, example: Example) -> Hashable:
        """Returns id and prompt: two official test dialogues differ in white space only, and stay two."""
        return example.id, example.prompt

    def score(self, predictions: Sequence[str], examples: Sequence[Example]) -> Score:
        """Returns ROUGE-1, ROUGE-2 and ROUGE-L against all references."""
        return rouge(predictions, [item.references for item in examples])
