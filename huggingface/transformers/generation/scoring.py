"""What a model says of given tokens: one forward pass, no decoding loop, so that it can judge any decoder's output.

Besides log-probabilities it tells how close each choice was: where two decoders' tokens part, a small margin there means that
rounding decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenScores:
    """Teacher-forced scores of given tokens, float32, in order.

    Attributes:
        logprobs: (seq,) log-probability of each token.
        margins: (seq,) logit of the likeliest token minus that of the second.
        gaps: (seq,) logit of the likeliest token minus that of the given one; 0 where the given token is the likeliest.
    """

    logprobs: torch.Tensor
    margins: torch.Tensor
    gaps: torch.Tensor


@torch.no_grad()
def score_tokens(model, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> TokenScores:
    """Returns the scores of tokens after a prompt, computed in float32 from the model's logits.

    Args:
        model: a causal language model.
        prompt_ids: at least one id.
        token_ids: the tokens to judge; each is judged after all before it.

    Raises:
        ValueError: there is no prompt, so nothing says what the first token follows.
    """
    if not prompt_ids:
        raise ValueError("tokens are scored after a prompt of at least one token; got none.")
    if not token_ids:
        none = torch.zeros(0, device=model.device)
        return TokenScores(none, none, none)
    ids = torch.tensor([[*prompt_ids, *token_ids]], device=model.device)
    output = model(input_ids=ids, use_cache=False, logits_to_keep=len(token_ids) + 1)
    logits = output.logits[0, :-1].float()
    given = torch.tensor(token_ids, device=logits.device)[:, None]
    own = logits.gather(1, given)[:, 0]
    best = logits.topk(2, dim=-1).values
    return TokenScores(
        logprobs=own - logits.logsumexp(-1), margins=best[:, 0] - best[:, 1], gaps=best[:, 0] - own
    )
