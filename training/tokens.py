"""From text to token ids: the byte-level BPE of scratch mode, and examples packed into flat numpy arrays.

61,500 examples are four arrays, not 61,500 objects: an example is a slice, and a batch is cut out of them without Python code
per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from training.data import TextPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
ENCODE_BATCH = 8192


def train_tokenizer(pairs: Sequence[TextPair], vocab_size: int, max_length: int) -> PreTrainedTokenizerBase:
    """Returns a byte-level BPE tokenizer learned from prompts and completions; `<|endoftext|>` opens, ends and pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts_of(pairs), trainer=trainer, length=2 * len(pairs))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def texts_of(pairs: Sequence[TextPair]) -> Iterator[str]:
    """Yields every prompt and completion."""
    for pair in pairs:
        yield pair.prompt
        yield pair.completion


@dataclass(frozen=True)
class TokenSet:
    """Examples as flat arrays; as a torch data set an item is its own index, which the collator cuts out.

    Attributes:
        tokens: (all tokens,) int32, the examples one after another, each prompt then completion.
        starts: (examples + 1,) int64, where each example begins; the last entry is the end.
        prompt_lengths: (examples,) int64.
        set_ids: (examples,) int64, index into `names`.
        names: the sets' names.
    """

    tokens: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    prompt_lengths: npt.NDArray[np.int64]
    set_ids: npt.NDArray[np.int64]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, index: int) -> int:
        return index

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(examples,) tokens of prompt and completion."""
        return np.diff(self.starts)

    def example(self, index: int) -> tuple[list[int], list[int]]:
        """Returns the prompt ids and completion ids of one example."""
        ids = self.tokens[self.starts[index] : self.starts[index + 1]].tolist()
        cut = int(self.prompt_lengths[index])
        return ids[:cut], ids[cut:]


@dataclass
class Encoded:
    """One set's examples as id lists, and what did not fit the context."""

    prompts: list[list[int]]
    completions: list[list[int]]
    skipped_long: int = 0
    cut_completions: int = 0


def encode(tokenizer: Any, texts: Sequence[str], special_tokens: bool) -> list[list[int]]:
    """Returns the token ids of each text; `special_tokens` adds what the tokenizer opens a text with."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), ENCODE_BATCH):
        chunk = list(texts[start : start + ENCODE_BATCH])
        ids += tokenizer(
            chunk,
            add_special_tokens=special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
    return ids


def encode_pairs(tokenizer: Any, pairs: Sequence[TextPair], max_length: int) -> Encoded:
    """Returns the ids of prompts and completions, the latter with the end token.

    A prompt that leaves no room for a completion is skipped and counted; a completion that does not fit is cut and counted.
    """
    prompts = encode(tokenizer, [pair.prompt for pair in pairs], special_tokens=True)
    completions = encode_completions(tokenizer, pairs, prompts)
    encoded = Encoded([], [])
    for prompt, completion in zip(prompts, completions, strict=True):
        room = max_length - len(prompt)
        if room < 2 or not prompt:
            encoded.skipped_long += 1
            continue
        encoded.cut_completions += len(completion) + 1 > room
        encoded.prompts.append(prompt)
        encoded.completions.append((completion + [tokenizer.eos_token_id])[:room])
    return encoded


def encode_completions(
    tokenizer: Any, pairs: Sequence[TextPair], prompts: Sequence[list[int]]
) -> list[list[int]]:
    """Returns each completion's ids as they follow the prompt.

    Tokenised with the prompt in front where the prompt's ids stay the same: to some tokenizers the start of a text is special.
    """
    together = encode(tokenizer, [pair.prompt + pair.completion for pair in pairs], special_tokens=True)
    found: list[list[int]] = []
    apart: list[int] = []
    for index, (prompt, whole) in enumerate(zip(prompts, together, strict=True)):
        if whole[: len(prompt)] != prompt:
            apart.append(index)
        found.append(whole[len(prompt) :])
    for index, ids in zip(apart, encode(tokenizer, [pairs[i].completion for i in apart], False), strict=True):
        found[index] = ids
    return found


def pack(encoded: Sequence[Encoded], names: Sequence[str]) -> TokenSet:
    """Returns all sets' examples as one packed set, set after set."""
    prompts = [ids for part in encoded for ids in part.prompts]
    completions = [ids for part in encoded for ids in part.completions]
    counts = [len(part.prompts) for part in encoded]
    return pack_lists(prompts, completions, np.repeat(np.arange(len(counts)), counts), tuple(names))


def pack_lists(
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    set_ids: npt.NDArray[np.int64],
    names: tuple[str, ...],
) -> TokenSet:
    """Returns the packed set of these prompts, each with its completion and the index of its set."""
    prompt_lengths = np.fromiter((len(ids) for ids in prompts), np.int64, len(prompts))
    lengths = prompt_lengths + np.fromiter((len(ids) for ids in completions), np.int64, len(completions))
    starts = np.zeros(len(prompts) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    joined = chain.from_iterable(chain.from_iterable(zip(prompts, completions, strict=True)))
    tokens = np.fromiter(joined, np.int32, int(starts[-1]))
    return TokenSet(tokens, starts, prompt_lengths, set_ids, names)
