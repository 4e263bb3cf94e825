"""Text to train on: the named data sets and own JSON lines, as prompt and completion, with a held-out part of each.

A completion starts with a space, so that prompt and completion can be tokenised apart and joined; the end-of-text token is added
after tokenising. Calibration and held-out checks must not touch what is reported: a set whose public validation split *is* the
reported one (Spider's) gets its held-out part from the train split, whole databases at a time.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets_code import DATASETS, DataError, Dataset, Example, LoadedSet, MissingDataError, get_dataset
from datasets_code.base import SkippedRow

TRAINABLE = tuple(name for name in DATASETS if name not in ("synthetic", "jsonl"))
HELD_OUT_FROM_TRAIN = {"spider": "db_id"}
HELD_OUT_EXAMPLES = 512
HELD_OUT_SHARE = 0.04
OWN_SET = "train_file"


@dataclass(frozen=True)
class TextPair:
    """One example: what the model reads and what it learns to write after it."""

    prompt: str
    completion: str


@dataclass
class TextSet:
    """The train and held-out pairs of one named set, and where they came from.

    Attributes:
        name: the set's name.
        source: where its rows came from.
        train, held_out: the pairs.
        skipped: rows with an unusable field.
        note: why a better source was not used.
    """

    name: str
    source: str
    train: list[TextPair]
    held_out: list[TextPair]
    skipped: int = 0
    note: str = ""


@dataclass
class TextData:
    """All sets of a run, in the order of the command line."""

    sets: list[TextSet] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        """The sets' names."""
        return tuple(part.name for part in self.sets)


def check_sources(names: Sequence[str], data_dir: Path | None, files: dict[str, Path | None]) -> None:
    """Raises ValueError for an unknown set, MissingDataError for a folder or file that does not exist; reads nothing.

    Args:
        names: data sets by name.
        data_dir: folder with the official release files.
        files: flag name to own file.
    """
    for name in names:
        if name not in TRAINABLE:
            raise ValueError(f"--datasets '{name}' cannot be trained on; choose from {', '.join(TRAINABLE)}.")
    if data_dir is not None and not data_dir.is_dir():
        raise MissingDataError(
            f"--data_dir {data_dir}: no such folder; give one that holds {', '.join(names)}."
        )
    for flag, path in files.items():
        if path is not None and not path.is_file():
            raise MissingDataError(
                f"--{flag} {path}: no such file; give JSON lines with 'prompt' and 'completion'."
            )


def load_text(
    names: Sequence[str],
    data_dir: Path | None,
    train_file: Path | None = None,
    validation_file: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> TextData:
    """Returns the train and held-out pairs of the named sets and of the own files.

    Args:
        names: data sets by name.
        data_dir: folder with the official release files; None takes the hub or the project's own samples.
        train_file: own JSON lines with `prompt` and `completion`.
        validation_file: held-out part of the own data; None holds a share of `train_file` out.
        limit: at most so many training examples a set.
        seed: decides which examples a limit or a held-out share takes.

    Raises:
        MissingDataError: for a folder or file that does not exist.
        DataError: for a line that cannot be read (the message holds file and line), or a set without a usable example.
    """
    data = TextData([load_named_set(name, data_dir, limit, seed) for name in names])
    if train_file is not None:
        data.sets.append(load_own_set(train_file, validation_file, limit, seed))
    return data


def load_named_set(name: str, data_dir: Path | None, limit: int | None, seed: int) -> TextSet:
    """Returns one named set's pairs; see :func:`load_text`."""
    dataset = get_dataset(name)
    train = without_broken(dataset, dataset.load("train", data_dir, seed=seed))
    if name in HELD_OUT_FROM_TRAIN:
        key = HELD_OUT_FROM_TRAIN[name]
        return text_set(
            dataset, name, train, None, [item.context[key] for item in train.examples], limit, seed
        )
    validation = without_broken(
        dataset, dataset.load("validation", data_dir, limit=HELD_OUT_EXAMPLES, seed=seed)
    )
    return text_set(dataset, name, train, validation, [], limit, seed)


def load_own_set(train_file: Path, validation_file: Path | None, limit: int | None, seed: int) -> TextSet:
    """Returns the pairs of the user's own files; see :func:`load_text`."""
    dataset = get_dataset("jsonl")
    train = without_broken(dataset, dataset.load("train", train_file, seed=seed))
    if validation_file is None:
        groups = [item.prompt.text for item in train.examples]
        return text_set(dataset, OWN_SET, train, None, groups, limit, seed)
    validation = without_broken(
        dataset, dataset.load("validation", validation_file, limit=HELD_OUT_EXAMPLES, seed=seed)
    )
    return text_set(dataset, OWN_SET, train, validation, [], limit, seed)


def without_broken(dataset: Dataset, loaded: LoadedSet) -> LoadedSet:
    """Returns a split without the examples that hold half a surrogate pair, which no tokenizer takes: they count as skipped.

    Raises:
        DataError: if no example is left.
    """
    kept: list[Example] = []
    skipped = list(loaded.skipped)
    for index, example in enumerate(loaded.examples):
        try:
            (example.prompt.text + dataset.completion(example)).encode()
            kept.append(example)
        except UnicodeEncodeError:
            skipped.append(SkippedRow(index, "the text holds half of a surrogate pair"))
    if not kept:
        raise DataError(
            f"{dataset.name} ({loaded.source}): every row holds half of a surrogate pair, such as \\ud800; check the files."
        )
    return replace(loaded, examples=kept, skipped=skipped)


def text_set(
    dataset: Dataset,
    name: str,
    train: LoadedSet,
    validation: LoadedSet | None,
    groups: Sequence[Hashable],
    limit: int | None,
    seed: int,
) -> TextSet:
    """Returns a set's pairs; without a validation split, whole groups of the train split are held out."""
    if validation is None:
        kept, held_out = split_by_group(train.examples, groups, seed)
        skipped = len(train.skipped)
    else:
        kept, held_out = train.examples, validation.examples
        skipped = len(train.skipped) + len(validation.skipped)
    kept = draw(kept, limit, seed)
    return TextSet(
        name, train.source, list(pairs(dataset, kept)), list(pairs(dataset, held_out)), skipped, train.note
    )


def pairs(dataset: Dataset, examples: Sequence[Example]) -> Iterator[TextPair]:
    """Yields the prompt and completion of each example. Raises DataError for an empty prompt."""
    for example in examples:
        if not example.prompt.text:
            raise DataError(
                f"example '{example.id}' has an empty prompt; a model needs a token to start from."
            )
        yield TextPair(example.prompt.text, dataset.completion(example))


def split_by_group(
    examples: Sequence[Example], groups: Sequence[Hashable], seed: int
) -> tuple[list[Example], list[Example]]:
    """Returns (kept, held out): whole groups, drawn by seed, until 4 % of the examples are held out.

    A single group cannot be parted; then nothing is held out.
    """
    order = sorted(set(groups), key=str)
    random.Random(seed).shuffle(order)
    wanted = max(1, min(HELD_OUT_EXAMPLES, round(HELD_OUT_SHARE * len(examples))))
    chosen: set[Hashable] = set()
    count = 0
    sizes: dict[Hashable, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    for group in order[:-1]:
        if count >= wanted:
            break
        chosen.add(group)
        count += sizes[group]
    kept = [item for item, group in zip(examples, groups, strict=True) if group not in chosen]
    held_out = [item for item, group in zip(examples, groups, strict=True) if group in chosen]
    return kept, held_out


def draw(items: Sequence[Any], limit: int | None, seed: int) -> list[Any]:
    """Returns at most `limit` items, drawn by seed, in their own order."""
    if limit is None or limit >= len(items):
        return list(items)
    chosen = sorted(random.Random(seed).sample(range(len(items)), limit))
    return [items[index] for index in chosen]
