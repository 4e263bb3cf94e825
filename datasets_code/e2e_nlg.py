"""E2E-NLG: restaurant descriptions from meaning representations (Novikova et al., SIGDIAL 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets_code.base import Dataset, Example, Prompt, Row, Score, one_line, text_field
from datasets_code.files import read_csv
from datasets_code.hub import HubSource
from datasets_code.text_scores import BLEU, ROUGE, bleu, rouge

FILES = {"train": "trainset.csv", "validation": "devset.csv", "test": "testset_w_refs.csv"}


class E2ENLG(Dataset):
    """Say a meaning representation in words; rows of one meaning are one example, except for training."""

    name = "e2e_nlg"
    metrics = (*ROUGE, *BLEU)
    hub = HubSource("tuetschek/e2e_nlg", {"meaning_representation": "mr", "human_reference": "ref"})
    merged_splits = frozenset({"validation", "test"})

    def read(self, folder: Path, split: str) -> list[Any]:
        """Returns the rows of the split's CSV file."""
        return list(read_csv(folder / FILES[split], ("mr", "ref")))

    def example(self, row: Row, index: int, split: str) -> Example:
        """Returns one meaning representation with one reference."""
        return Example(
            id=f"{split}_{index}",
            prompt=Prompt(f"Meaning: {one_line(text_field(row, 'mr'))}\nText:"),
            references=(one_line(text_field(row, "ref")),),
        )

    def score(self, predictions: Sequence[str], examples: Sequence[Example]) -> Score:
        """Returns ROUGE and BLEU against all references of a meaning."""
        references = [item.references for item in examples]
        return rouge(predictions, references).merged(bleu(predictions, references))
