"""Prompts of a given length with no meaning, for pure speed.

No tokenizer is known here. A prompt holds as many words as tokens were asked for; each word is at least one
token in any tokenizer, so the text is never too short, and the worker cuts it to `context["prompt_tokens"]`
tokens exactly.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets_code.base import SPLITS, Dataset, Example, LoadedSet, Prompt, Row, Score
from datasets_code.sources import check_choice

DEFAULT_PROMPTS = 32
COMMON_WORDS = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they
which one you were her all she there would their we him been has when who will more no if out so said
what up its about into than them can only other new some could time these two may then do first any my
now such like our over man me even most made after also did many before must through back years where
much your way well down should because each just those people how too little state good very make world
still own see men work long get here between both life being
"""


class Synthetic(Dataset):
    """Random words: what a prompt of N tokens costs, whatever it says. It reads and scores nothing."""

    name = "synthetic"
    has_samples = False

    def __init__(self, prompt_tokens: int = 256) -> None:
        """Sets the prompts' length in tokens.

        Raises:
            ValueError: if it is below 1.
        """
        super().__init__()
        if prompt_tokens < 1:
            raise ValueError(f"--prompt_tokens is {prompt_tokens}; it must be at least 1.")
        self.prompt_tokens = prompt_tokens

    def load(
        self,
        split: str = "test",
        data_dir: Path | None = None,  # noqa: ARG002
        limit: int | None = None,
        seed: int = 0,
        source: str = "auto",  # noqa: ARG002
    ) -> LoadedSet:
        """Returns `limit` prompts (32 if None) drawn with the seed; `data_dir` and `source` have no say."""
        check_choice("split", split, SPLITS)
        if limit is not None and limit < 1:
            raise ValueError(f"--limit is {limit}; it must be at least 1.")
        row = {"seed": seed}
        examples = [self.example(row, index, split) for index in range(limit or DEFAULT_PROMPTS)]
        return LoadedSet(examples, "generated", [])

    def read(self, folder: Path, split: str) -> list[Any]:  # noqa: ARG002
        """Returns nothing: there is no file to read."""
        return []

    def example(self, row: Row, index: int, split: str) -> Example:
        """Returns prompt number `index` of a seed; it does not depend on how many are drawn."""
        random_words = random.Random(f"{row['seed']} {split} {index}").choices(
            COMMON_WORDS.split(), k=self.prompt_tokens
        )
        return Example(
            id=f"synthetic_{index}",
            prompt=Prompt(" ".join(random_words)),
            references=(),
            context={"prompt_tokens": self.prompt_tokens},
        )

    def completion(self, example: Example) -> str:  # noqa: ARG002
        """Returns nothing: random words have no right continuation."""
        return ""

    def score(self, predictions: Sequence[str], examples: Sequence[Example]) -> Score:  # noqa: ARG002
        """Returns an empty score."""
        return Score()
