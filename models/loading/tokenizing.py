"""Text to ids and back, with the checks that keep a wrong tokenizer from going unnoticed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

SAMPLE = "a word"


class ByteTokenizer:
    """Bytes as tokens: stands in where weights are random and no tokenizer is at hand, so that speed can be measured."""

    bos_token_id: int | None = 0
    eos_token_id: int | None = None
    pad_token_id: int | None = 0

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return min(256, self.vocab_size)

    def encode(self, text: str) -> list[int]:
        """Returns the UTF-8 bytes of a text, folded into the vocabulary."""
        return [byte % self.vocab_size for byte in text.encode()]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of ids below 256; others become a replacement character."""
        del skip_special_tokens
        return bytes(token if token < 256 else 0xFF for token in ids).decode(errors="replace")


def load_tokenizer(checkpoint: str, vocab_size: int, random_weights: bool) -> tuple[Any, list[str]]:
    """Returns the checkpoint's tokenizer and what had to stand in for it.

    Raises:
        ValueError: there is none, or it knows more tokens than the model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
        # Without files, upstream may build an empty tokenizer of the architecture's usual class.
        reason = "" if tokenizer.encode(SAMPLE) else "it knows no tokens"
    except (OSError, ValueError, KeyError) as error:
        reason = _first_line(error)
    if reason and random_weights:
        return ByteTokenizer(vocab_size), ["no tokenizer: bytes as tokens"]
    if reason:
        raise ValueError(
            f"{checkpoint} has no usable tokenizer ({reason}); copy tokenizer.json and tokenizer_config.json beside the weights."
        )
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer of {checkpoint} has {len(tokenizer)} tokens, but the model's vocabulary has {vocab_size}; put the "
            "tokenizer that the model was trained with beside the weights."
        )
    return tokenizer, []


def encode(tokenizer: Any, text: str) -> list[int]:
    """Returns a prompt's ids; half of a surrogate pair, which no tokenizer takes, becomes `?`."""
    return list(tokenizer.encode(text.encode("utf-8", "replace").decode()))


def encode_continuation(tokenizer: Any, prompt: str, text: str) -> list[int]:
    """Returns a text's ids as they follow a prompt's.

    Tokenised with the prompt in front where the prompt's ids stay the same: to some tokenizers the start of a text is special.
    """
    before, whole = encode(tokenizer, prompt), encode(tokenizer, prompt + text)
    if whole[: len(before)] == before:
        return whole[len(before) :]
    return list(tokenizer.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False))


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Returns the text of ids without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
