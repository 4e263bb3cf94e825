"""The data sets: where their rows come from, how a row becomes a prompt, and how answers are scored.

Nothing here knows a tokenizer or a model, and nothing imports torch.
"""

from __future__ import annotations

from typing import Any

from datasets_code.base import (
    SPLITS,
    Dataset,
    Example,
    LoadedSet,
    Prompt,
    Score,
    SkippedRow,
)
from datasets_code.dialogsum import DialogSum
from datasets_code.e2e_nlg import E2ENLG
from datasets_code.jsonl import JsonLines
from datasets_code.sources import DataError, MissingDataError
from datasets_code.spider import Spider
from datasets_code.synthetic import Synthetic
from datasets_code.wikitext import LoadedText, WikiText2

DATASETS: dict[str, type[Dataset]] = {
    "spider": Spider,
    "dialogsum": DialogSum,
    "e2e_nlg": E2ENLG,
    "synthetic": Synthetic,
    "jsonl": JsonLines,
}


def get_dataset(name: str, **options: Any) -> Dataset:
    """Returns the data set called `name`.

    Args:
        name: a key of `DATASETS`.
        options: what the class's constructor takes, such as `prompt_tokens` of `synthetic`.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in DATASETS:
        raise ValueError(f"data set '{name}' is unknown; choose from {', '.join(DATASETS)}.")
    return DATASETS[name](**options)


__all__ = [
    "DATASETS",
    "SPLITS",
    "DataError",
    "Dataset",
    "Example",
    "LoadedSet",
    "LoadedText",
    "MissingDataError",
    "Prompt",
    "Score",
    "SkippedRow",
    "WikiText2",
    "get_dataset",
]
