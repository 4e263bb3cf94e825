"""What drafting reads of the vocabulary: the tokens that streams may draft, and the tables that hold a row for each of them.

A draft may hold any token, so drafting need not read every row of the language-model head: of a large vocabulary a fine-tuned
model writes few tokens, and the streams learnt no others. Verification reads all rows, so the text stays the same.
(Frequency-ranked drafting: "FR-Spec", arXiv 2502.14856; EAGLE-3's drafters call the number `draft_vocab_size`.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...integrations.quantized_linear import QuantizedLinear


@dataclass(frozen=True)
class DraftTables:
    """Factors of the streams' logits, a row for each token that may be drafted.

    Attributes:
        vocabulary: (drafted,) int64 those tokens, rising; `None` for all.
        head: (drafted, hidden) their rows of the language-model head; `None` where the model's own is read.
        head_bias: (drafted,) their part of its bias, or `None`.
        parents: (vocab, rank) and
        tokens: (drafted, rank) factors of the bias that a token gains from the one before it; `None` for no such bias.
    """

    vocabulary: torch.Tensor | None
    head: torch.Tensor | None
    head_bias: torch.Tensor | None
    parents: torch.Tensor | None
    tokens: torch.Tensor | None

    @classmethod
    def of(
        cls,
        vocabulary: torch.Tensor,
        head: Any,
        dtype: torch.dtype,
        parents: torch.Tensor | None,
        tokens: torch.Tensor | None,
    ) -> DraftTables:
        """Returns the tables of the tokens in `vocabulary`.

        Args:
            vocabulary: (drafted,) int64.
            head: the language-model head.
            dtype: of its rows; a quantised head is read back.
            parents, tokens: (vocab, rank) factors for the whole vocabulary, or `None`.

        Raises:
            ValueError: `vocabulary` is no rising list of the head's tokens.
        """
        weight = dense_weight(head, dtype)
        check_draft_vocab(vocabulary, len(weight), "restore model.safetensors, or train the streams again")
        return cls(
            vocabulary,
            weight[vocabulary],
            head.bias[vocabulary] if head.bias is not None else None,
            parents,
            tokens[vocabulary] if tokens is not None else None,
        )

    @property
    def drafted(self) -> int | None:
        """Number of tokens that may be drafted, `None` for all."""
        return None if self.vocabulary is None else len(self.vocabulary)

    def bias(self, parent_tokens: torch.Tensor) -> torch.Tensor | None:
        """Returns the (..., drafted) logits that tokens gain from the (...) int64 tokens before them, `None` for none."""
        if self.parents is None or self.tokens is None:
            return None
        return F.linear(F.embedding(parent_tokens, self.parents), self.tokens)

    def named(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the tokens that stand in these rows of the tables, both int64 of any shape."""
        return rows if self.vocabulary is None else self.vocabulary[rows]


def dense_weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """Returns a linear layer's (out, in) weight; a quantised one is read back."""
    return layer.packed.dense(dtype) if isinstance(layer, QuantizedLinear) else layer.weight


def check_draft_vocab(vocabulary: torch.Tensor, vocab: int, advice: str) -> None:
    """Raises ValueError, with advice, unless `vocabulary` holds different ids of `vocab` tokens in rising order."""
    rising = bool((vocabulary[1:] > vocabulary[:-1]).all())
    if not len(vocabulary) or not rising or int(vocabulary[0]) < 0 or int(vocabulary[-1]) >= vocab:
        raise ValueError(
            f"a draft vocabulary (streams.draft_vocab) lists different token ids below {vocab} in rising order, this one does "
            f"not; {advice}."
        )
