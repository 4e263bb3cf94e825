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
from torch import nn

from ...integrations.quantized_linear import QuantizedLinear

AT_ONCE = 16384
"""Rows of a quantised head that are read back at a time."""


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
        check_draft_vocab(
            vocabulary, len(head.weight), "restore model.safetensors, or train the streams again"
        )
        packed = isinstance(head, QuantizedLinear)
        return cls(
            vocabulary,
            head.packed.some(vocabulary).dense(dtype) if packed else head.weight[vocabulary],
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


def factor_of_head(head: Any, factor: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Returns `factor` of each row of the head, (vocab, rank); a quantised head is read back a part at a time."""
    if not isinstance(head, QuantizedLinear):
        return factor(head.weight)
    parts = [slice(start, start + AT_ONCE) for start in range(0, head.out_features, AT_ONCE)]
    return torch.cat([factor(head.packed.some(part).dense(dtype)) for part in parts])


def check_draft_vocab(vocabulary: torch.Tensor, vocab: int, advice: str) -> None:
    """Raises ValueError, with advice, unless `vocabulary` holds different ids of `vocab` tokens in rising order."""
    rising = bool((vocabulary[1:] > vocabulary[:-1]).all())
    if not len(vocabulary) or not rising or int(vocabulary[0]) < 0 or int(vocabulary[-1]) >= vocab:
        raise ValueError(
            f"a draft vocabulary (streams.draft_vocab) lists different token ids below {vocab} in rising order, this one does "
            f"not; {advice}."
        )
