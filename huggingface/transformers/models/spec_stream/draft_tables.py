"""What drafting reads of the vocabulary: the tokens that streams may draft, and the tables that hold a row for each of them.

A draft may hold any token, so drafting need not read every row of the language-model head: of a large vocabulary a fine-tuned
model writes few tokens, and the streams learnt no others. Nor need it read the rows as they are: where decoding waits for memory,
it reads a copy in four bits. Verification reads all rows as they are, so the text stays the same.
(Frequency-ranked drafting: "FR-Spec", arXiv 2502.14856; EAGLE-3's drafters call the number `draft_vocab_size`.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...integrations.quantized_linear import QuantizedLinear, QuantizedWeight, quantized_linear
from ...integrations.skinny_linear import DTYPES, linear
from ...integrations.triton_support import unavailable
from ...quantizers.packing import WeightFormat

AT_ONCE = 16384
"""Rows of a quantised head that are read back at a time."""
COPY = WeightFormat(4, 128)
"""How the copy of the head is stored that is drafted from."""
LEAST_COPIED = 2**24
"""Bytes of a head from which a copy pays: 206 MB are read in 50 us, their copy in 16 (H200, 50,257 x 2,048, 4 rows)."""


@dataclass(frozen=True)
class DraftTables:
    """Factors of the streams' logits, a row for each token that may be drafted.

    Attributes:
        vocabulary: (drafted,) int64 those tokens, rising; `None` for all.
        head: (drafted, hidden) their rows of the language-model head, or a copy in four bits; `None`: the model's own is read.
        head_bias: (drafted,) their part of its bias, or `None`.
        parents: (vocab, rank) and
        tokens: (drafted, rank) factors of the bias that a token gains from the one before it; `None` for no such bias.
    """

    vocabulary: torch.Tensor | None
    head: torch.Tensor | QuantizedWeight | None
    head_bias: torch.Tensor | None
    parents: torch.Tensor | None
    tokens: torch.Tensor | None

    @classmethod
    def of(
        cls,
        vocabulary: torch.Tensor | None,
        head: Any,
        dtype: torch.dtype,
        parents: torch.Tensor | None,
        tokens: torch.Tensor | None,
    ) -> DraftTables:
        """Returns the tables of the tokens in `vocabulary`.

        Args:
            vocabulary: (drafted,) int64, `None` for all tokens.
            head: the language-model head.
            dtype: of its rows; a quantised head is read back.
            parents, tokens: (vocab, rank) factors for the whole vocabulary, or `None`.

        Raises:
            ValueError: `vocabulary` is no rising list of the head's tokens.
        """
        if vocabulary is not None:
            check_draft_vocab(
                vocabulary, len(head.weight), "restore model.safetensors, or train the streams again"
            )
        elif not reads_copy(head, len(head.weight)):
            return cls(None, None, None, parents, tokens)
        rows = slice(None) if vocabulary is None else vocabulary
        packed = isinstance(head, QuantizedLinear)
        weight = head.packed.some(rows).dense(dtype) if packed else head.weight[rows]
        return cls(
            vocabulary,
            QuantizedWeight.of(weight, COPY) if reads_copy(head, len(weight)) else weight,
            head.bias[rows] if head.bias is not None else None,
            parents,
            tokens[rows] if tokens is not None else None,
        )

    @property
    def drafted(self) -> int | None:
        """Number of tokens that may be drafted, `None` for all."""
        return None if self.vocabulary is None else len(self.vocabulary)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the (..., drafted) products of (..., hidden) states with `head`."""
        states = states.contiguous()
        if isinstance(self.head, QuantizedWeight):
            return quantized_linear(states, self.head, self.head_bias)
        assert self.head is not None
        return linear(states, self.head, self.head_bias)

    def bias(self, parent_tokens: torch.Tensor) -> torch.Tensor | None:
        """Returns the (..., drafted) logits that tokens gain from the (...) int64 tokens before them, `None` for none."""
        if self.parents is None or self.tokens is None:
            return None
        return F.linear(F.embedding(parent_tokens, self.parents), self.tokens)

    def named(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the tokens that stand in these rows of the tables, both int64 of any shape."""
        return rows if self.vocabulary is None else self.vocabulary[rows]


def reads_copy(head: Any, rows: int) -> bool:
    """Returns whether so many rows of a head are drafted from in four bits: kernels for it, half precision, bytes enough."""
    weight = head.weight
    return (
        not isinstance(head, QuantizedLinear)
        and weight.dtype in DTYPES
        and unavailable(weight.device) is None
        and weight.shape[1] % COPY.group_size == 0
        and rows * weight[0].nbytes >= LEAST_COPIED
    )


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
