"""The text that units and plans are judged by, cut into samples. No torch.

Every second sample judges the units, the others judge the plans: a plan is never praised by the text that chose it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from datasets_code import DATASETS, DataError, WikiText2, get_dataset

WIKITEXT2, REFERENCES = "wikitext2", "references"
SPLIT, REFERENCE_LIMIT = "validation", 256
PROMPT_SETS = ("spider", "dialogsum", "e2e_nlg")

Encode = Callable[[str], list[int]]
Continue = Callable[[str, str], list[int]]


@dataclass(frozen=True)
class Text:
    """What there is to read.

    Attributes:
        running: one running text; empty where there are pairs.
        pairs: prompt and the text that follows it; only the latter is judged.
        source: where it comes from.
    """

    running: str
    pairs: tuple[tuple[str, str], ...]
    source: str

    @property
    def fingerprint(self) -> str:
        """Changes when the text does."""
        whole = "\0".join([self.running, *(part for pair in self.pairs for part in pair)])
        return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class Sample:
    """Tokens that are judged after others that are not.

    Attributes:
        prompt_ids: at least one id.
        token_ids: at least one id.
    """

    prompt_ids: list[int]
    token_ids: list[int]


def read_text(name: str, data_dir: Path | None, split: str = SPLIT) -> Text:
    """Returns the text that a flag names.

    Args:
        name: `wikitext2`, `references` (of rows of the data sets), or a text file.
        data_dir: folder with the official release files; without it the hub, else the project's own samples.
        split: whose rows; WikiText-2 and files have one text.

    Raises:
        MissingDataError: a folder or file is not there. DataError: it cannot be read. ValueError: there is no text in it.
    """
    if name == WIKITEXT2:
        loaded = WikiText2().load(data_dir)
        return Text(loaded.text, (), loaded.source)
    if name == REFERENCES:
        return _references(data_dir, split)
    path = Path(name).expanduser()
    try:
        running = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(
            f"--text {name} cannot be read ({why}); give {WIKITEXT2}, {REFERENCES} or a file of UTF-8 text."
        ) from None
    if not running.strip():
        raise ValueError(f"--text {name} holds no calibration text; give a file that does.")
    return Text(running, (), path.name)


def _references(data_dir: Path | None, split: str) -> Text:
    """Returns prompts and first references, the data sets taking turns."""
    columns, sources = [], []
    for name in (name for name in PROMPT_SETS if name in DATASETS):
        dataset = get_dataset(name)
        loaded = dataset.load(split, data_dir, REFERENCE_LIMIT)
        sources.append(f"{name} ({loaded.source})")
        columns.append(
            [(one.prompt.text, dataset.completion(one)) for one in loaded.examples if one.references]
        )
    pairs = tuple(pair for turn in zip_longest(*columns) for pair in turn if pair is not None)
    if not pairs:
        raise ValueError("--text references: no row has a reference, so there is no calibration text.")
    return Text("", pairs, ", ".join(sources))


def cut(
    text: Text,
    encode: Encode,
    continue_: Continue,
    tokens: int,
    window: int,
    positions: int,
    remedy: str = "give a longer --text",
) -> tuple[list[Sample], list[Sample]]:
    """Returns the samples that judge units, and those that judge plans.

    Args:
        text: what to read.
        encode: a text's ids.
        continue_: a text's ids as they follow a prompt's.
        tokens: how many each half holds; the half ends with the sample that reaches them, or where the text does.
        window: ids of a sample of a running text; its first one is not judged.
        positions: most ids of a sample.
        remedy: what helps where a running text is too short.

    Raises:
        ValueError: the text does not give each half a sample.
    """
    if text.pairs:
        samples = _pair_samples(text.pairs, encode, continue_, tokens, positions)
    else:
        # A tokenizer reads whole texts: far beyond what is needed, it only takes time.
        ids = encode(text.running[: 64 * (tokens + window)])
        starts = range(0, min(len(ids), 2 * (tokens + window)) - window + 1, window)
        samples = [Sample(ids[start : start + 1], ids[start + 1 : start + window]) for start in starts]
        if len(samples) < 2:
            raise ValueError(
                f"the calibration text has {len(ids)} tokens, expected two windows of {window} or more: one half judges the "
                f"layers, the other the plans; {remedy}."
            )
    halves = _up_to(samples[::2], tokens), _up_to(samples[1::2], tokens)
    if not all(halves):
        raise ValueError("the calibration text gives one sample, expected two or more; give a longer --text.")
    return halves


def _pair_samples(
    pairs: Sequence[tuple[str, str]], encode: Encode, continue_: Continue, tokens: int, positions: int
) -> list[Sample]:
    samples: list[Sample] = []
    judged = 0
    for prompt, text in pairs:
        ids = continue_(prompt, text)[: positions - 1]
        before = encode(prompt)[-(positions - len(ids)) :]
        if ids and before:
            samples.append(Sample(before, ids))
            judged += len(ids)
        if judged > 3 * tokens:  # more than both halves can take
            break
    return samples


def _up_to(samples: Sequence[Sample], tokens: int) -> list[Sample]:
    taken: list[Sample] = []
    held = 0
    for sample in samples:
        if held >= tokens:
            break
        taken.append(sample)
        held += len(sample.token_ids)
    return taken
