"""Perplexity: how well a model predicts a given text, over windows that move by a stride.

A text longer than the model's positions is read in windows of `window` tokens, each beginning `stride` tokens after the one
before. A window judges only the tokens that no earlier one has judged; those before them are context. With window 6, stride 3:

    text       0 1 2 3 4 5 6 7 8 9
    window 1   . x x x x x              judges 1 to 5: nothing says what token 0 follows
    window 2         . . . x x x        judges 6 to 8 after three tokens of context
    window 3               . . . x      judges 9; the text ends here, and so do the windows

So every token but the text's first is judged exactly once. Where the stride equals the window there is no context, and the first
token of every window goes unjudged. This is upstream's documented recipe ("Perplexity of fixed-length models"), but for one
detail: it weights the mean of each later window by one token fewer than it judged; here every token has the same weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

BATCH_LOGITS = 2**25  # most logits of a batch of windows: 128 MiB in float32
BATCH_TOKENS = 2**14
"""Most tokens of a batch of prompts with what follows them."""
UNJUDGED = -100  # upstream's mark of a target that is ignored


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds some tokens.

    Attributes:
        nll: sum of their negative log-likelihoods, natural logarithm.
        tokens: how many were judged.
    """

    nll: float
    tokens: int

    def __add__(self, other: Likelihood) -> Likelihood:
        return Likelihood(self.nll + other.nll, self.tokens + other.tokens)

    @property
    def perplexity(self) -> float | None:
        """exp(nll / tokens); None where no token was judged, infinite beyond what a float holds."""
        if not self.tokens:
            return None
        try:
            return math.exp(self.nll / self.tokens)
        except OverflowError:
            return math.inf


@dataclass(frozen=True)
class Window:
    """Tokens `begin` to `end` (exclusive) of a text, of which the last `judged` are judged."""

    begin: int
    end: int
    judged: int


def windows(length: int, window: int, stride: int) -> Iterator[Window]:
    """Yields the windows of a text in order, those without a token to judge left out.

    Args:
        length: tokens of the text.
        window: tokens of a window; the last ones may be shorter.
        stride: tokens from one window's begin to the next one's.

    Raises:
        ValueError: a window of fewer than 2 tokens, or a stride that is not 1 to `window`.
    """
    if window < 2:
        raise ValueError(f"a window of {window} tokens judges nothing; it needs 2 or more.")
    if not 1 <= stride <= window:
        raise ValueError(f"a stride of {stride} tokens does not fit windows of {window}; give 1 to {window}.")
    done = 0
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        judged = end - max(done, begin + 1)
        if judged > 0:
            yield Window(begin, end, judged)
        if end == length:
            return
        done = end


@torch.no_grad()
def text_likelihood(
    model, token_ids: Sequence[int], window: int, stride: int, batch_size: int | None = None
) -> Likelihood:
    """Returns how likely a model finds a text: logits in the model's dtype, log-softmax in float32, sums in float64.

    Args:
        model: a causal language model.
        token_ids: the text; one token alone has nothing to follow, so that none is judged.
        window: tokens of a window, at most the model's positions.
        stride: tokens from one window to the next.
        batch_size: most windows of one pass; `None` for as many as `BATCH_LOGITS` allows. It does not change the result, but
            for rounding.

    Raises:
        ValueError: the text is empty, or window and stride cannot be.
    """
    if not token_ids:
        raise ValueError("the text is empty: there is no token to judge.")
    ids = torch.tensor(token_ids, device=model.device)
    nll, tokens = torch.zeros((), dtype=torch.float64, device=ids.device), 0
    for (length, judged), group in groupby(windows(len(ids), window, stride), _shape):
        alike = list(group)
        size = batch_size or max(1, BATCH_LOGITS // (judged * model.config.vocab_size))
        for start in range(0, len(alike), size):
            part = alike[start : start + size]
            nll += _nll(model, torch.stack([ids[one.begin : one.begin + length] for one in part]), judged)
            tokens += judged * len(part)
    return Likelihood(nll.item(), tokens)


@torch.no_grad()
def continuation_likelihood(model, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> Likelihood:
    """Returns how likely a model finds tokens after a prompt, whose own tokens are not judged.

    Args:
        model: a causal language model.
        prompt_ids: at least one id.
        token_ids: the tokens to judge.

    Raises:
        ValueError: there is no prompt, so nothing says what the first token follows.
    """
    return continuation_likelihoods(model, [(prompt_ids, token_ids)])[0]


@torch.no_grad()
def continuation_likelihoods(model, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
    """Returns how likely a model finds each pair's tokens after its prompt, in order; pairs of similar length share a pass.

    Shorter rows of a pass are filled up at their end, which a causal model's earlier tokens do not see.

    Args:
        model: a causal language model.
        pairs: ids of a prompt, one or more, and the tokens to judge after it.

    Raises:
        ValueError: a prompt is empty, so nothing says what the first token follows.
    """
    if not all(len(prompt) for prompt, _ in pairs):
        raise ValueError("tokens are judged after a prompt of at least one token; got none.")
    found = [Likelihood(0.0, 0)] * len(pairs)
    judged = [index for index, (_, tokens) in enumerate(pairs) if len(tokens)]
    for indices in _passes(pairs, judged, model.config.vocab_size):
        sums = _row_nlls(model, [pairs[index] for index in indices])
        for index, nll in zip(indices, sums, strict=True):
            found[index] = Likelihood(nll, len(pairs[index][1]))
    return found


def _passes(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], indices: Sequence[int], vocabulary: int
) -> Iterator[list[int]]:
    """Yields indices of pairs that share a pass: neighbours in length, as many as `BATCH_LOGITS` and `BATCH_TOKENS` allow."""
    group: list[int] = []
    for index in sorted(indices, key=lambda one: sum(map(len, pairs[one]))):
        members = [*group, index]
        width = sum(map(len, pairs[index]))
        kept = width - min(len(pairs[one][0]) for one in members) + 1
        if group and len(members) * max(kept * vocabulary / BATCH_LOGITS, width / BATCH_TOKENS) > 1:
            yield group
            members = [index]
        group = members
    if group:
        yield group


def _row_nlls(model, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
    """Returns each pair's sum of negative log-likelihoods, from one pass."""
    width = max(len(prompt) + len(tokens) for prompt, tokens in pairs)
    kept = width - min(len(prompt) for prompt, _ in pairs) + 1
    ids = torch.zeros(len(pairs), width, dtype=torch.long)
    targets = torch.full_like(ids, UNJUDGED)
    for row, (prompt, tokens) in enumerate(pairs):
        ids[row, : len(prompt) + len(tokens)] = torch.tensor([*prompt, *tokens])
        targets[row, len(prompt) : len(prompt) + len(tokens)] = torch.tensor(tokens)
    ids, targets = ids.to(model.device), targets[:, 1 - kept :].to(model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=UNJUDGED, reduction="none"
    )
    sums: list[float] = losses.double().view(len(pairs), -1).sum(1).tolist()
    return sums


def _shape(window: Window) -> tuple[int, int]:
    return window.end - window.begin, window.judged


def _nll(model, ids: torch.Tensor, judged: int) -> torch.Tensor:
    """Returns the negative log-likelihood of the last `judged` tokens of all rows of ids (batch, seq), one float64 number."""
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=judged + 1).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), ids[:, -judged:].flatten(), reduction="none"
    )
    return losses.double().sum()
