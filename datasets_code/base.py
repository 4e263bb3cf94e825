"""What every data set shares: the central types, the order of sources, sampling, unusable rows.

A data set says three things of its own: how its official files are read (`read`), what a row means
(`example`), and how answers are scored (`score`). The project's own samples lie in the official formats, so
that they take the same path.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from datasets_code.sources import SOURCES, DataError, RowSource, check_choice

SPLITS = ("train", "validation", "test")

Row = Mapping[str, Any]


class RowError(ValueError):
    """One well-formed row with an unusable field: the row is skipped and the rest goes on."""


@dataclass(frozen=True)
class Prompt:
    """What a worker gets: text without a trailing space, and an image's path for models that look at one."""

    text: str
    image: str | None = None


@dataclass(frozen=True)
class Example:
    """One example. References and context stay with whoever scores; only the prompt reaches a model."""

    id: str
    prompt: Prompt
    references: tuple[str, ...]
    context: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SkippedRow:
    """A row that was left out: its index in the source (from 0, before any grouping) and why."""

    index: int
    reason: str


@dataclass(frozen=True)
class LoadedSet:
    """Examples in the source's order, and where they came from.

    Attributes:
        examples: the sample that was drawn.
        source: 'data_dir:<folder>', 'hub:<repository>@<revision>', 'samples' or 'generated'.
        skipped: unusable rows of the whole split, also where a limit was given.
        note: why an earlier source was not used; empty if the first choice was.
    """

    examples: list[Example]
    source: str
    skipped: list[SkippedRow]
    note: str = ""


@dataclass(frozen=True)
class Score:
    """Quality of a list of answers.

    Attributes:
        values: metric -> number; rates and ROUGE lie in 0 to 1, BLEU in 0 to 100.
        unavailable: metric -> why it could not be computed; such a metric is absent from `values`.
        notes: metric -> how it was computed, such as sacrebleu's signature.
    """

    values: dict[str, float | int] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def merged(self, other: Score) -> Score:
        """Returns both scores as one."""
        return Score(
            {**self.values, **other.values},
            {**self.unavailable, **other.unavailable},
            {**self.notes, **other.notes},
        )


class Dataset(RowSource):
    """A data set. Subclasses set the class attributes and define `read`, `example` and `score`.

    Attributes:
        name: name on the command line, and the folder's name under `--data_dir`.
        metrics: what `score` reports when everything it needs is there.
        takes_file: whether `--data_dir` may be a single file instead of a folder.
        merged_splits: splits in which rows of one prompt become one example with all their references.
    """

    metrics: ClassVar[tuple[str, ...]] = ()
    takes_file: ClassVar[bool] = False
    merged_splits: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def example(self, row: Row, index: int, split: str) -> Example:
        """Returns a raw row as an example.

        Raises:
            RowError: if a field is missing or unusable.
        """

    @abstractmethod
    def score(self, predictions: Sequence[str], examples: Sequence[Example]) -> Score:
        """Returns the quality of one answer an example."""

    def completion(self, example: Example) -> str:
        """Returns the training target as it follows `prompt.text`: one space, then the first reference."""
        return self.continuations(example)[0]

    def continuations(self, example: Example) -> list[str]:
        """Returns every reference as it follows `prompt.text`, one space in front; none where there is no reference."""
        return [f" {reference}" for reference in example.references]

    def same_input(self, example: Example) -> Hashable:
        """Returns what the rows of one example have in common, for the splits that are merged."""
        return example.prompt

    def load(
        self,
        split: str = "test",
        data_dir: Path | None = None,
        limit: int | None = None,
        seed: int = 0,
        source: str = "auto",
    ) -> LoadedSet:
        """Returns a sample of a split, the same for everyone who gives the same limit and seed.

        Args:
            split: 'train', 'validation' or 'test'.
            data_dir: folder with one subfolder a data set, in the official release's files.
            limit: number of examples; None, or more than there are, gives all.
            seed: decides which examples a limit takes; a larger limit keeps those of a smaller one.
            source: 'auto' takes `data_dir` where given, else the hub, else the own samples.

        Raises:
            ValueError: for an unknown split or source, or a limit below 1. MissingDataError: if `data_dir` or
            a file expected in it does not exist. DataError: if the data cannot be read or holds no usable
            row, or if the hub was asked for and is out of reach.
        """
        check_choice("split", split, SPLITS)
        check_choice("source", source, SOURCES)
        if limit is not None and limit < 1:
            raise ValueError(f"--limit is {limit}; it must be at least 1.")
        rows, origin, note = self.raw_rows(split, data_dir, source)
        examples, skipped = self._examples(rows, split)
        if not examples:
            reason = f"row {skipped[0].index}: {skipped[0].reason}" if skipped else "it holds no row"
            raise DataError(f"{self.name} {split} ({origin}) has no usable row; {reason}. Check the files.")
        return LoadedSet(draw(examples, limit, seed), origin, skipped, note)

    def _examples(self, rows: Iterable[Any], split: str) -> tuple[list[Example], list[SkippedRow]]:
        """Returns all usable rows as examples with unique ids, and the rest with reasons."""
        examples: list[Example] = []
        skipped: list[SkippedRow] = []
        for index, row in enumerate(rows):
            try:
                if not isinstance(row, Mapping):
                    raise RowError(f"the row is {describe(row)}, expected an object with named fields")
                examples.append(self.example(row, index, split))
            except RowError as error:
                skipped.append(SkippedRow(index, str(error)))
        if split in self.merged_splits:
            examples = merge_references(examples, self.same_input)
        return with_unique_ids(examples), skipped


def text_field(row: Row, name: str) -> str:
    """Returns a row's text field, stripped.

    Raises:
        RowError: if it is missing, null, no text, or blank.
    """
    if name not in row:
        raise RowError(f"field '{name}' is missing")
    value = row[name]
    if not isinstance(value, str):
        raise RowError(f"field '{name}' is {describe(value)}, expected text")
    if not value.strip():
        raise RowError(f"field '{name}' is empty")
    return value.strip()


def describe(value: object) -> str:
    """Returns what kind of value this is, in a reader's words."""
    kinds = {
        bool: "a truth value",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
        str: "text",
    }
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def one_line(text: str) -> str:
    """Returns a text with every run of white space as one space."""
    return " ".join(text.split())


def merge_references(examples: Iterable[Example], key: Callable[[Example], Hashable]) -> list[Example]:
    """Returns one example a key, in order of first appearance, with the references of all its rows."""
    merged: dict[Hashable, Example] = {}
    for item in examples:
        first = merged.setdefault(key(item), item)
        if first is not item:
            merged[key(item)] = replace(first, references=first.references + item.references)
    return list(merged.values())


def with_unique_ids(examples: Iterable[Example]) -> list[Example]:
    """Returns the examples with '#2', '#3', ... appended where an id was taken before."""
    result: list[Example] = []
    taken: set[str] = set()
    for item in examples:
        name, copy = item.id, 1
        while name in taken:
            copy += 1
            name = f"{item.id}#{copy}"
        taken.add(name)
        result.append(item if name == item.id else replace(item, id=name))
    return result


def draw(examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    """Returns `limit` examples chosen by the seed, in their original order."""
    if limit is None or limit >= len(examples):
        return examples
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    return [examples[index] for index in sorted(order[:limit])]
